"""Where the kernels for GPUs are used."""

from __future__ import annotations

import subprocess
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytrain.models import gpu_kernels
from raytrain.models.gpu_kernels import available

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    available.cache_clear()
    monkeypatch.setattr(gpu_kernels, "norm", object())
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.empty(1))


def with_fill(monkeypatch: pytest.MonkeyPatch, fill: Any) -> None:
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    monkeypatch.setattr(gpu_kernels, "noise", SimpleNamespace(fill=fill))


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler"), subprocess.CalledProcessError(1, "gcc"), OSError("no space")]
)
def test_a_machine_without_a_compiler_is_said_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fill(*_: Any) -> None:
        raise error

    with_fill(monkeypatch, fill)
    with pytest.warns(UserWarning, match=r"needs gcc or clang, and Python\.h"):
        assert not available(GPU)
    with warnings.catch_warnings(action="error"):
        assert not available(GPU)


def test_a_kernel_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    with_fill(monkeypatch, lambda *given: tried.append(given))
    assert available(GPU)
    assert available(GPU)
    assert len(tried) == 1


def test_only_gpus_with_triton_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not available(torch.device("cpu"))
    assert not available(torch.device("meta"))
    monkeypatch.setattr(gpu_kernels, "norm", None)
    assert not available(GPU)
