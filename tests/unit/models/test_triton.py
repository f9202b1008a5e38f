"""Kernels for GPUs, by Triton's interpreter and compiled for GPUs that are not here; skipped without Triton.

TRITON_INTERPRET=1 pytest -n 0 tests/unit/models/test_triton.py
pytest -n 0 tests/unit/models/test_triton.py
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

from raytrain.models import gpu_kernels
from raytrain.models.layers import GroupBatchNorm
from raytrain.models.noise import hashes_by_tensors, signed

pytest.importorskip("triton")


INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels take tensors of the CPU. Triton reads it when it is imported."""
interpreted = pytest.mark.skipif(not INTERPRETER, reason="needs TRITON_INTERPRET=1")


def activated(layer: GroupBatchNorm, features: Tensor, mask: Tensor, cover: bool) -> list[Tensor]:
    """Activations, statistics, and the gradients of features, weight and bias."""
    gradient = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features.dtype)
    activations, statistics = layer.activate(features, mask, cover=cover), layer.batch_statistics
    assert statistics is not None
    learnt = [features, layer.weight, layer.bias]
    return [activations, statistics, *torch.autograd.grad(activations, learnt, gradient)]


@interpreted
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cover", [False, True])
def test_a_fused_normalisation_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, cover: bool
) -> None:
    """Two groups of four samples of several lengths; a group's channel takes more than one block."""
    torch.manual_seed(0)
    layer = GroupBatchNorm(3, 4)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    features = (2 * torch.randn(8, 3, 300) + 1).to(kind).requires_grad_()
    lengths = torch.randint(20, 600, (8, 1, 1))
    mask = (torch.arange(600) < lengths).float()[..., ::2]  # strided, as a model's masks are
    plain = activated(layer, features, mask, cover)
    monkeypatch.setattr(gpu_kernels, "available", lambda _: True)
    fused = activated(layer, features, mask, cover)
    names = "activations", "statistics", "features", "weight", "bias"
    for name, found, expected in zip(names, fused, plain, strict=True):
        assert found.dtype == expected.dtype
        limits = {"rtol": 0.01, "atol": 1e-3} if found.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(found, expected, **limits, msg=lambda text, name=name: f"{name}: {text}")


@interpreted
def test_a_nan_is_not_cut_off_by_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "available", lambda _: True)
    features = torch.randn(4, 2, 10)
    features[1, 0, 3] = torch.nan
    activations = GroupBatchNorm(2, 4).activate(features, torch.ones(4, 1, 10), cover=True)
    assert activations[:, 0].isnan().all()
    assert not activations[:, 1].isnan().any()


@interpreted
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("key", [5, signed(0xFEDCBA9876543210)])
def test_hashes_are_those_of_tensors(key: int, stored: bool) -> None:
    samples, words = torch.arange(-1, 9), torch.empty(10, 1500, dtype=torch.int64)
    gpu_kernels.noise.fill(samples, torch.tensor(key) if stored else key, words)
    assert torch.equal(words, hashes_by_tensors(samples, key, 1500))


@pytest.mark.skipif(INTERPRETER, reason="the interpreter does not compile")
@pytest.mark.parametrize("architecture", [75, 90])
@pytest.mark.parametrize("kind", ["fp16", "fp32"])
def test_kernels_compile_for_gpus(architecture: int, kind: str) -> None:
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    forward = ["features", "mask", "weight", "bias", "output", "statistics"]
    backward = ["of_output", *forward[:4], "statistics", "of_features", "of_parameters"]
    in_kind = {"features", "output", "of_output", "of_features"}
    sizes = dict.fromkeys(("groups", "channels", "length", "size", "of_sample", "of_position"), "i32")
    for kernel, tensors in ((gpu_kernels.norm._forward, forward), (gpu_kernels.norm._backward, backward)):
        signature = {name: f"*{kind if name in in_kind else 'fp32'}" for name in tensors} | sizes
        signature |= {"epsilon": "fp32", "COVER": "constexpr", "BLOCK": "constexpr"}
        source = ASTSource(fn=kernel, signature=signature, constexprs={"COVER": True, "BLOCK": 1024})
        assert compile_kernel(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]
