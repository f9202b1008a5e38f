"""Kernels for GPUs, by Triton's interpreter and compiled for GPUs that are not here; skipped without Triton.

TRITON_INTERPRET=1 pytest -n 0 tests/unit/models/test_triton.py tests/unit/models/test_fused_norm.py
pytest -n 0 tests/unit/models/test_triton.py
"""

from __future__ import annotations

import os

import pytest
import torch

from raytrain.models import gpu_kernels
from raytrain.models.noise import hashes_by_tensors, signed

pytest.importorskip("triton")


INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels take tensors of the CPU. Triton reads it when it is imported."""
interpreted = pytest.mark.skipif(not INTERPRETER, reason="needs TRITON_INTERPRET=1")


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
