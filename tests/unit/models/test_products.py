"""Products on CPUs: the same values and gradients as PyTorch's own, whatever lies how in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from raytrain.models import products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [False, True], ids=["contiguous", "apart"])
def test_a_linear_layer_is_that_of_pytorch(dtype: torch.dtype, apart: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, 7, generator=generator, dtype=dtype)
    features = features.permute(2, 0, 1) if apart else features.reshape(7, 3, 5)
    weight, bias = (torch.randn(*size, generator=generator, dtype=dtype) for size in ((11, 5), (11,)))
    ways = []
    for layer in (products.linear, F.linear):
        inputs = [value.clone().requires_grad_() for value in (features, weight, bias)]
        outputs = layer(*inputs)
        outputs.sin().sum().backward()
        ways.append([outputs.detach(), *(value.grad for value in inputs)])
    for ours, theirs in zip(*ways, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert_close(products.linear(features, weight, bias), ways[1][0])


def test_a_linear_layer_of_constant_features_has_gradients_of_its_weights_alone() -> None:
    features = torch.randn(4, 3)
    weight, bias = torch.randn(2, 3, requires_grad=True), torch.zeros(2)
    for summand in (bias, None):
        weight.grad = None
        products.linear(features, weight, summand).sum().backward()
    assert features.grad is None
    assert bias.grad is None
    assert_close(weight.grad, features.sum(0).expand(2, 3))


def test_a_linear_layer_computes_in_the_type_of_autocast() -> None:
    features, weight, bias = torch.randn(4, 3), torch.randn(2, 3), torch.zeros(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.linear(features, weight, bias).dtype == torch.bfloat16
