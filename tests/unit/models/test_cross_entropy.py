"""The cross-entropy of CPUs against PyTorch's."""

from __future__ import annotations

import math
import platform
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba.core.caching import FunctionCache
from torch import Tensor

from raytrain.data.vocabulary import DROP, NUM_OUTPUTS, PAD, SIZE, STOP
from raytrain.models import compiled, cpu_kernels, cross_entropy
from raytrain.models.cross_entropy import CrossEntropy
from raytrain.models.heads import negative_log_likelihood

ROWS = 40
TYPES = pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])


@pytest.fixture
def targets() -> Tensor:
    """Every fifth is ignored; the first and the last symbol occur."""
    drawn = torch.randint(NUM_OUTPUTS, (ROWS,), generator=torch.Generator().manual_seed(0))
    drawn[::5], drawn[1], drawn[2] = PAD, 0, NUM_OUTPUTS - 1
    return drawn


def logits(kind: torch.dtype) -> Tensor:
    drawn = 5 * torch.randn(ROWS, NUM_OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn[3] = -torch.linspace(100, 400, NUM_OUTPUTS)  # all are below 0, and far apart
    return drawn.to(kind).requires_grad_()


def pytorchs(values: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(values.double(), wanted, ignore_index=PAD, reduction="none")


@TYPES
def test_losses_and_gradients_are_pytorchs(kind: torch.dtype, targets: Tensor) -> None:
    values = logits(kind)
    weights = torch.linspace(-1, 1, ROWS).to(torch.promote_types(kind, torch.float32))
    losses, expected = CrossEntropy.apply(values, targets, PAD), pytorchs(values, targets)
    wide = {"rtol": 1e-12, "atol": 1e-13} if kind == torch.float64 else {"rtol": 1e-6, "atol": 1e-5}
    torch.testing.assert_close(losses.double(), expected, **wide)
    (found,) = torch.autograd.grad(losses, values, weights)
    (wanted,) = torch.autograd.grad(expected, values, weights.double())
    narrow = {"rtol": 0.004, "atol": 1e-6} if kind == torch.bfloat16 else wide
    torch.testing.assert_close(found, wanted, **narrow)


@TYPES
def test_any_number_of_pieces_is_scored_as_by_pytorch(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = 3000
    values = (5 * torch.randn(2, 9, NUM_OUTPUTS + longer)).to(kind).requires_grad_()
    targets = torch.randint(SIZE, SIZE + longer, (2, 9))
    targets[:, :4] = torch.tensor([0, STOP, SIZE, SIZE + longer - 1])  # SIZE is the output of PAD's number
    targets[:, 7:] = PAD
    losses = negative_log_likelihood(values, targets)
    assert not losses[:, 7:].any()
    assert losses[:, :7].all()
    monkeypatch.setattr(cpu_kernels, "loss", None)
    expected = negative_log_likelihood(values, targets)
    torch.testing.assert_close(losses, expected.to(losses.dtype), rtol=1e-5, atol=1e-5)
    (found,), (wanted,) = (torch.autograd.grad(each.sum(), values) for each in (losses, expected))
    torch.testing.assert_close(found, wanted, rtol=0.008 if kind == torch.bfloat16 else 1e-4, atol=1e-5)


def test_gradients_are_those_of_small_steps() -> None:
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda each: CrossEntropy.apply(each, torch.tensor([2, 4, 0]), 4), values)


@TYPES
def test_what_is_ignored_and_what_has_no_weight_has_no_gradient(kind: torch.dtype, targets: Tensor) -> None:
    values = logits(kind)
    losses = CrossEntropy.apply(values, targets, PAD)
    assert not losses[::5].any()
    weights = torch.full_like(losses, math.nan)
    weights[1] = 0
    (found,) = torch.autograd.grad(losses, values, weights)
    assert not found[::5].any()
    assert not found[1].any()
    others = [row for row in range(2, ROWS) if row % 5]
    assert found[others].isnan().all()


@TYPES
@pytest.mark.parametrize(("value", "loss"), [(math.nan, math.nan), (math.inf, math.nan), (-math.inf, None)])
def test_logits_that_are_not_finite_count_as_in_pytorch(kind: torch.dtype, value: float, loss: float | None) -> None:
    values = torch.zeros(1, 40, dtype=kind)
    values[0, 7] = value
    found = CrossEntropy.apply(values, torch.tensor([3]), PAD)
    expected = math.log(39) if loss is None else loss
    torch.testing.assert_close(found, torch.full_like(found, expected), equal_nan=True)


@pytest.mark.parametrize("target", [DROP, -1])
def test_a_target_that_is_no_symbol_is_refused(targets: Tensor, target: int) -> None:
    targets[4] = target
    with pytest.raises(IndexError, match=f"target {target} is none of 257 symbols"):
        CrossEntropy.apply(logits(torch.float32), targets, PAD)


def test_models_use_it_on_cpus_and_pytorchs_elsewhere(targets: Tensor) -> None:
    values = logits(torch.float32)
    losses = negative_log_likelihood(values[None], targets[None])
    assert losses.shape == (1, ROWS)
    torch.testing.assert_close(losses[0].double(), pytorchs(values, targets), rtol=1e-6, atol=1e-5)
    elsewhere = negative_log_likelihood(values[None].to("meta"), targets[None].to("meta"))
    assert (elsewhere.shape, elsewhere.device.type) == ((1, ROWS), "meta")


def test_several_threads_compute_the_same_bits(monkeypatch: pytest.MonkeyPatch, targets: Tensor) -> None:
    monkeypatch.setattr(compiled, "_LEAST", 100)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        values = logits(torch.float32)
        losses = CrossEntropy.apply(values, targets, PAD)
        losses.sum().backward()
        found.append((losses.detach(), values.grad))
    for one, several in zip(*found, strict=True):
        assert torch.equal(one, several)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of instructions")
def test_the_sums_use_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without, a loss takes four times as long."""
    monkeypatch.setattr(FunctionCache._impl_class, "_locator_classes", [])  # the text of what was stored is gone
    kernel: Any = cross_entropy._forward
    fresh: Any = compiled.compiled_in_any_order(kernel.py_func)
    nats = np.zeros((2, ROWS), np.float32)
    fresh(np.zeros((ROWS, NUM_OUTPUTS), np.uint16), np.zeros(ROWS, np.int64), PAD, nats[0], nats[1], 0, ROWS)
    (text,) = fresh.inspect_asm().values()
    assert "mulps" in text
    assert "pmaxsw" in text
