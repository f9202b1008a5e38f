"""Kernels that normalise by groups of samples: those of Numba, and those of Triton by its interpreter.

TRITON_INTERPRET=1 pytest -n 0 tests/unit/models/test_fused_norm.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytrain.models import cpu_kernels, fused_norm, gpu_kernels
from raytrain.models.layers import GroupBatchNorm

KERNELS = ["numba", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]
pytestmark = pytest.mark.skipif(cpu_kernels.norm is None, reason="needs Numba")


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Any:
    """The module with the kernels of a library."""
    return {"numba": cpu_kernels.norm, "triton": gpu_kernels.norm}[request.param]


def activated(layer: GroupBatchNorm, features: Tensor, mask: Tensor, cover: bool) -> list[Tensor]:
    """Activations, statistics, and the gradients of features, weight and bias."""
    gradient = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features.dtype)
    activations, statistics = layer.activate(features, mask, cover=cover), layer.batch_statistics
    assert statistics is not None
    learnt = [features, layer.weight, layer.bias]
    return [activations, statistics, *torch.autograd.grad(activations, learnt, gradient)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cover", [False, True])
def test_a_fused_normalisation_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, kernels: Any, kind: torch.dtype, cover: bool, threads: int
) -> None:
    """Three groups of four samples of several lengths, more than a block of a kernel or a thread takes."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    layer = GroupBatchNorm(17, 4)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    features = (2 * torch.randn(12, 17, 300) + 1).to(kind).requires_grad_()
    lengths = torch.randint(20, 600, (12, 1, 1))
    mask = (torch.arange(600) < lengths).float()[..., ::2]  # strided, as a model's masks are
    monkeypatch.setattr(fused_norm, "kernels_for", lambda _: None)
    plain = activated(layer, features, mask, cover)
    monkeypatch.setattr(fused_norm, "kernels_for", lambda _: kernels)
    fused = activated(layer, features, mask, cover)
    torch.set_num_threads(before)
    names = "activations", "statistics", "features", "weight", "bias"
    for name, found, expected in zip(names, fused, plain, strict=True):
        assert found.dtype == expected.dtype
        limits = {"rtol": 0.01, "atol": 1e-3} if found.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(found, expected, **limits, msg=lambda text, name=name: f"{name}: {text}")


def test_a_nan_is_not_cut_off_by_relu(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    monkeypatch.setattr(fused_norm, "kernels_for", lambda _: kernels)
    features = torch.randn(4, 2, 10)
    features[1, 0, 3] = torch.nan
    activations = GroupBatchNorm(2, 4).activate(features, torch.ones(4, 1, 10), cover=True)
    assert activations[:, 0].isnan().all()
    assert not activations[:, 1].isnan().any()


def test_a_group_is_normalised_alike_whatever_stands_beside_it(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norm, "kernels_for", lambda _: kernels)
    features, mask, layer = torch.randn(12, 5, 8), torch.ones(12, 1, 8), GroupBatchNorm(5, 4)
    whole = layer.activate(features, mask, cover=True)
    assert torch.equal(layer.activate(features[4:8], mask[4:8], cover=True), whole[4:8])
