"""Convolutions by matrix products and look-ups are those of PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.data.vocabulary import PAD, SIZE, STOP
from raytrain.models.convolutions import Doubling, Halving
from raytrain.models.symbols import OneHot


def with_gradients(layer: nn.Module, call: Callable[[], Tensor], *inputs: Tensor) -> list[Tensor]:
    """The outputs of a call, and the gradients of its inputs and of the layer's parameters."""
    outputs = call()
    gradient = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=outputs.dtype)
    return [outputs, *torch.autograd.grad(outputs, [*inputs, *layer.parameters()], gradient)]


@pytest.mark.parametrize("length", [2, 12])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_halving_is_a_convolution_of_stride_2(length: int, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Halving(3, 5).to(kind)
    features = torch.randn(4, 3, length, dtype=kind, requires_grad=True)
    expected = with_gradients(
        layer, lambda: F.conv1d(features, layer.weight, layer.bias, stride=2, padding=1), features
    )
    torch.testing.assert_close(with_gradients(layer, lambda: layer(features), features), expected)
    assert expected[0].shape == (4, 5, length // 2)


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_doubling_is_a_transposed_convolution_of_stride_2(length: int, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Doubling(3, 5).to(kind)
    features = torch.randn(4, 3, length, dtype=kind, requires_grad=True)

    def plain() -> Tensor:
        return F.conv_transpose1d(features, layer.weight, layer.bias, stride=2, padding=1, output_padding=1)

    expected = with_gradients(layer, plain, features)
    torch.testing.assert_close(with_gradients(layer, lambda: layer(features), features), expected)
    assert expected[0].shape == (4, 5, 2 * length)


def test_symbols_are_looked_up_as_their_one_hot_vectors_are_convolved() -> None:
    torch.manual_seed(0)
    layer, one_hot = Halving(SIZE, 5), OneHot()
    symbols = torch.randint(0, 256, (4, 12))
    symbols[0, 5], symbols[0, 6:] = STOP, PAD
    symbols[1, 0], symbols[1, 1:] = STOP, PAD

    def plain() -> Tensor:
        return F.conv1d(one_hot(symbols).transpose(1, 2), layer.weight, layer.bias, stride=2, padding=1)

    expected = with_gradients(layer, plain)
    found = with_gradients(layer, lambda: layer.of_symbols(symbols, one_hot))
    torch.testing.assert_close(found, expected)
    assert not found[1][:, PAD].any()


@pytest.mark.parametrize("layer", [Halving(8, 16), Doubling(8, 16)])
def test_autocast_makes_products_narrow(layer: nn.Module) -> None:
    features = torch.randn(4, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(features)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), layer(features), rtol=0.02, atol=0.02)
