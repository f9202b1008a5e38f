"""The compiled gates of the CPU's LSTM against PyTorch's functions."""

from __future__ import annotations

import math
import platform
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numba.core.caching import FunctionCache
from torch import Tensor

from raytrain.models import compiled, lstm_kernels
from raytrain.models.compiled import Array, array

COUNT = 1000
TYPES = pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
SPECIAL = [0.0, -0.0, 1e-30, 88.0, -88.0, 1e30, -1e30, math.inf, -math.inf, math.nan]


def step(kind: torch.dtype, product: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gates, after = torch.empty(4, len(cell), dtype=cell.dtype), torch.empty_like(cell)
    output = torch.empty(len(cell), dtype=kind)
    lstm_kernels.forward(array(product), array(gates), array(cell), array(after), array(output))
    return gates, after, output


def plain(product: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = product.to(cell.dtype)
    gates = torch.stack((wide[0].sigmoid(), wide[1].sigmoid(), wide[2].tanh(), wide[3].sigmoid()))
    after = gates[1] * cell + gates[0] * gates[2]
    return gates, after, (gates[3] * after.tanh()).to(product.dtype)


def tolerance(kind: torch.dtype) -> dict[str, float]:
    return {"rtol": 0, "atol": 1e-15 if kind == torch.float64 else 5e-7}


@TYPES
def test_a_step_is_that_of_the_equations(kind: torch.dtype) -> None:
    product = (10 * torch.randn(4, COUNT)).to(kind)
    product[:, : len(SPECIAL)] = torch.tensor(SPECIAL)
    cell = torch.randn(COUNT).to(torch.promote_types(kind, torch.float32))
    for name, ours, expected in zip(
        ("gates", "cells", "output"), step(kind, product, cell), plain(product, cell), strict=True
    ):
        limits = {"rtol": 0.008, "atol": 1e-6} if ours.dtype == torch.bfloat16 else tolerance(kind)
        torch.testing.assert_close(ours, expected, **limits, equal_nan=True, msg=lambda text, name=name: name + text)


@TYPES
def test_gradients_are_those_of_autograd(kind: torch.dtype) -> None:
    wide = torch.promote_types(kind, torch.float32)
    product = torch.randn(4, COUNT).to(kind).to(wide).requires_grad_()
    cell = torch.randn(COUNT, dtype=wide, requires_grad=True)
    of_output, of_hidden = (torch.randn(COUNT).to(kind) for _ in range(2))
    of_after = torch.randn(COUNT, dtype=wide)
    _, after, output = plain(product, cell)
    expected = torch.autograd.grad(
        (after, output), (product, cell), (of_after, of_output.to(wide) + of_hidden.to(wide))
    )

    gates, after, _ = step(kind, product.detach().to(kind), cell.detach())
    of_product, of_cell = torch.empty(4, COUNT, dtype=kind), of_after.clone()
    reads = (array(part) for part in (of_output, of_hidden, gates, cell.detach(), after, of_cell, of_product))
    lstm_kernels.backward(*reads)
    absolute = 1e-12 if kind == torch.float64 else 2e-6
    torch.testing.assert_close(of_cell, expected[1], rtol=1e-5, atol=absolute)
    relative = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.005}[kind]
    torch.testing.assert_close(of_product.to(wide), expected[0], rtol=relative, atol=absolute)


def test_several_threads_compute_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_LEAST", 100)
    product, cell, of_state = torch.randn(4, COUNT), torch.randn(COUNT), torch.randn(2, COUNT)
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            gates, after, output = step(torch.float32, product, cell)
            of_cell, of_product = torch.ones(COUNT), torch.empty(4, COUNT)
            lstm_kernels.backward(*(array(part) for part in (*of_state, gates, cell, after, of_cell, of_product)))
            found.append((gates, after, output, of_cell, of_product))
    finally:
        torch.set_num_threads(threads)
    assert numba.threading_layer() == "workqueue"  # the second time, threads were started
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_threads_that_meet_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a lock the layer ends the process."""
    monkeypatch.setattr(compiled, "_LEAST", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    product, cell = torch.randn(4, 10 * COUNT), torch.randn(10 * COUNT)
    expected = step(torch.float32, product, cell)[2]
    with ThreadPoolExecutor(4) as pool:
        for output in pool.map(lambda _: step(torch.float32, product, cell)[2], range(400)):
            assert torch.equal(output, expected)


def test_bfloat16_is_rounded_as_pytorch_rounds_it() -> None:
    """The cell forgets 0 and takes all of a candidate of 1, so the outputs are tanh(1) times the last gate."""
    product = torch.full((4, COUNT), 200.0)
    product[1] = -200
    product[3] = torch.linspace(-20, 20, COUNT)
    narrow = product.bfloat16()
    _, _, output = step(torch.bfloat16, narrow, torch.zeros(COUNT))
    _, _, exact = step(torch.float32, narrow.float(), torch.zeros(COUNT))
    assert torch.equal(output, exact.bfloat16())
    assert len(output.unique()) > COUNT // 4


def test_a_nan_stays_one() -> None:
    for kind in (torch.float32, torch.bfloat16):
        for gate in range(4):
            product = torch.zeros(4, COUNT, dtype=kind)
            product[gate, 7] = math.nan
            gates, _, output = step(kind, product, torch.zeros(COUNT))
            assert gates.isnan().nonzero().tolist() == [[gate, 7]]
            assert output.isnan().nonzero().tolist() == [[7]]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of instructions")
def test_the_loops_use_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without, a step takes seven times as long."""
    monkeypatch.setattr(FunctionCache._impl_class, "_locator_classes", [])  # the text of what was stored is gone
    kernel: Any = lstm_kernels._forward
    fresh: Any = compiled.compiled(kernel.py_func)
    bits, wide = np.zeros((4, COUNT), np.uint16), np.zeros((4, COUNT), np.float32)
    fresh(bits, wide, wide[0], wide[1], bits[0], 0, COUNT)
    (text,) = fresh.inspect_asm().values()
    assert "mulps" in text


def test_machine_code_is_kept_where_there_is_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(values: Array) -> None:
        values *= 2

    assert isinstance(compiled.compiled(double)._cache, FunctionCache)  # type: ignore[attr-defined]
    monkeypatch.setattr(FunctionCache._impl_class, "_locator_classes", [])
    values = np.ones(3)
    compiled.compiled(double)(values)
    assert values.tolist() == [2, 2, 2]
