"""Kernels that normalise by groups of samples: those of Numba, and those of Triton by its interpreter.

TRITON_INTERPRET=1 pytest -n 0 tests/unit/models/test_fused_norm.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytrain.models import cpu_kernels, fused_norm, gpu_kernels
from raytrain.models.normalisation import GroupBatchNorm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["numba", *(["triton"] if INTERPRETED else [])])
def kernels(request: pytest.FixtureRequest) -> Any:
    """The module with the kernels of a library."""
    module = {"numba": cpu_kernels.norm, "triton": gpu_kernels.norm}[request.param]
    if module is None:
        pytest.skip(f"needs {request.param}")
    return module


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Kernels may use two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def activated(layer: GroupBatchNorm, features: Tensor, mask: Tensor, cover: bool) -> list[Tensor]:
    """Activations, statistics, and the gradients of features, weight and bias."""
    gradient = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features.dtype)
    activations, statistics = layer.activate(features, mask, cover=cover), layer.batch_statistics
    assert statistics is not None
    learnt = [features, layer.weight, layer.bias]
    return [activations, statistics, *torch.autograd.grad(activations, learnt, gradient)]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cover", [False, True])
def test_a_fused_normalisation_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, kernels: Any, kind: torch.dtype, cover: bool
) -> None:
    """Three groups of four samples of several lengths; a group's channel takes more than one block."""
    torch.manual_seed(0)
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


@pytest.mark.usefixtures("two_threads")
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_kernels.norm is None:
        pytest.skip("needs Numba")
    monkeypatch.setattr(fused_norm, "kernels_for", lambda _: cpu_kernels.norm)
    torch.manual_seed(0)
    layer, features, mask = GroupBatchNorm(17, 4), torch.randn(12, 17, 300, requires_grad=True), torch.ones(12, 1, 300)
    together = activated(layer, features, mask, cover=True)
    torch.set_num_threads(1)
    for alone, other in zip(activated(layer, features, mask, cover=True), together, strict=True):
        assert torch.equal(alone, other)


def test_a_far_mean_costs_no_digits(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    features = (10 + 0.1 * torch.randn(16, 3, 128, dtype=torch.float64)).float().requires_grad_()
    layer, mask = GroupBatchNorm(3, 16), torch.ones(16, 1, 128)
    nn.init.constant_(layer.bias, 4)  # nothing is near the edge of ReLU
    monkeypatch.setattr(fused_norm, "kernels_for", lambda _: None)
    expected = activated(layer, features, mask, cover=True)
    monkeypatch.setattr(fused_norm, "kernels_for", lambda _: kernels)
    for found, plain in zip(activated(layer, features, mask, cover=True), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_a_batch_of_half_a_group_is_refused(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norm, "kernels_for", lambda _: kernels)
    with pytest.raises(ValueError, match="a batch of 7 samples has no groups of 2"):
        GroupBatchNorm(3, 2).activate(torch.randn(7, 3, 4), torch.ones(7, 1, 4), cover=True)
