"""The LSTM of our own against PyTorch's."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from raytrain.data.vocabulary import DROP, PAD, SIZE, STOP
from raytrain.models import buffers, cpu_lstm
from raytrain.models.lstm import Lstm, State, continue_lstm, run_lstm
from raytrain.models.symbols import OneHot

BATCH, LENGTH, WIDTH, FEATURES = 5, 7, 6, 3
READS = pytest.mark.parametrize(("reads_symbols", "reads_dense"), [(True, False), (False, True), (True, True)])


def tokens(seed: int = 0) -> Tensor:
    """Documents of several lengths, padded; DROP and bytes beyond ASCII occur."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(256, (BATCH, LENGTH), generator=generator)
    for row, length in zip(rows, (6, 2, 4, 1, 6), strict=True):
        row[length - 1], row[length:] = STOP, PAD
    rows[0, 1] = DROP
    return rows


class Case:
    """An LSTM in double precision, what it reads, and PyTorch's outputs."""

    def __init__(self, reads_symbols: bool, reads_dense: bool, has_state: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.symbols = tokens(seed) if reads_symbols else None
        self.lstm = Lstm(FEATURES * reads_dense + SIZE * reads_symbols, WIDTH).double()
        for parameter in self.lstm.parameters():
            nn.init.uniform_(parameter, -1, 1, generator=generator)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

        self.dense = normal(BATCH, LENGTH, FEATURES) if reads_dense else None
        self.state: State | None = (normal(BATCH, WIDTH), normal(BATCH, WIDTH)) if has_state else None
        self.weights = normal(BATCH, LENGTH, WIDTH).detach()
        """Of the outputs in the loss."""

    @property
    def learnt(self) -> list[Tensor]:
        """Everything that takes a gradient."""
        dense = [] if self.dense is None else [self.dense]
        return [*dense, *(self.state or ()), *self.lstm.parameters()]

    def ours(self) -> Tensor:
        return run_lstm(self.lstm, OneHot().double(), self.symbols, self.dense, self.state)

    def pytorchs(self) -> Tensor:
        parts = [] if self.dense is None else [self.dense]
        if self.symbols is not None:
            parts.append(OneHot().double()(self.symbols))
        first = None if self.state is None else (self.state[0][None], self.state[1][None])
        outputs: Tensor = self.lstm(torch.cat(parts, dim=-1), first)[0]
        return outputs

    def gradients(self, outputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((outputs * self.weights).sum(), self.learnt)


@READS
@pytest.mark.parametrize("has_state", [False, True])
def test_outputs_and_gradients_are_pytorchs(reads_symbols: bool, reads_dense: bool, has_state: bool) -> None:
    case = Case(reads_symbols, reads_dense, has_state)
    torch.testing.assert_close(case.ours(), case.pytorchs(), rtol=1e-12, atol=1e-12)
    ours, pytorchs = case.gradients(case.ours()), case.gradients(case.pytorchs())
    for found, expected in zip(ours, pytorchs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@READS
@pytest.mark.parametrize("enabled", [True, False])
def test_what_follows_goes_on_from_the_last_state(
    monkeypatch: pytest.MonkeyPatch, reads_symbols: bool, reads_dense: bool, enabled: bool
) -> None:
    """The state after a part is the first of the rest, and takes no gradient."""
    monkeypatch.setattr(cpu_lstm, "ENABLED", enabled)
    case = Case(reads_symbols, reads_dense, has_state=True)

    def part(steps: slice, state: State | None) -> tuple[Tensor, State]:
        symbols, dense = (None if all_ is None else all_[:, steps] for all_ in (case.symbols, case.dense))
        return continue_lstm(case.lstm, OneHot().double(), symbols, dense, state)

    first, carried = part(slice(0, 4), case.state)
    rest, last = part(slice(4, None), carried)
    torch.testing.assert_close(torch.cat((first, rest), 1), case.pytorchs(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last[0], rest[:, -1].detach(), rtol=0, atol=0)
    assert not any(state.requires_grad for state in (*carried, *last))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_state_is_float32_whatever_the_type_of_the_products(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    monkeypatch.setattr(cpu_lstm, "ENABLED", enabled)
    lstm = Lstm(SIZE, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = continue_lstm(lstm, OneHot(), tokens())
        outputs, (hidden, cell) = continue_lstm(lstm, OneHot(), tokens(), None, state)
    assert outputs.dtype == torch.bfloat16
    assert hidden.dtype == cell.dtype == torch.float32
    assert torch.equal(hidden, outputs[:, -1].float())


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_coarser_products_come_near(precision: torch.dtype, tolerance: float) -> None:
    """Relative to the largest figure: outputs, and the gradients of all that is learnt."""
    case = Case(True, True, True)
    exact = case.pytorchs()
    expected = [exact, *case.gradients(exact)]
    case.lstm.float()
    case.dense, case.weights = case.dense.detach().float().requires_grad_(), case.weights.float()  # type: ignore[union-attr]
    case.state = tuple(part.detach().float().requires_grad_() for part in case.state or ())  # type: ignore[assignment]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        outputs = run_lstm(case.lstm, OneHot(), case.symbols, case.dense, case.state)
    assert outputs.dtype == precision
    for found, wanted in zip([outputs, *case.gradients(outputs.float())], expected, strict=True):
        assert (found.double() - wanted).abs().max() < tolerance * wanted.abs().max()


@READS
@pytest.mark.parametrize("has_state", [False, True])
def test_the_switch_takes_pytorchs_own(
    monkeypatch: pytest.MonkeyPatch, reads_symbols: bool, reads_dense: bool, has_state: bool
) -> None:
    """In float32, as training calls it: both give the same outputs and gradients to rounding."""
    case = Case(reads_symbols, reads_dense, has_state)
    case.lstm.float()
    case.weights = case.weights.float()
    if case.dense is not None:
        case.dense = case.dense.detach().float().requires_grad_()
    if case.state is not None:
        hidden, cell = (part.detach().float().requires_grad_() for part in case.state)
        case.state = hidden, cell
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(cpu_lstm, "ENABLED", enabled)
        outputs = run_lstm(case.lstm, OneHot(), case.symbols, case.dense, case.state)
        assert ("Recurrence" in type(outputs.grad_fn).__name__) == enabled
        found.append([outputs, *case.gradients(outputs)])
    for ours, pytorchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, pytorchs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("value", "enabled"), [("off", False), ("on", True), (None, True)])
def test_the_switch_is_read_from_the_environment(value: str | None, enabled: bool) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "RAYTRAIN_CPU_LSTM"}
    environment |= {"RAYTRAIN_CPU_LSTM": value} if value else {}
    code = "from raytrain.models import cpu_lstm; print(cpu_lstm.ENABLED)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{enabled}\n"


def test_memory_is_used_again_once_nobody_has_a_view_of_it() -> None:
    buffers.clear()
    first = buffers.empty(1000, dtype=torch.float32)
    location = first.data_ptr()
    assert location % 64 == 0
    view = first[10:20].view(2, 5)
    del first
    second = buffers.empty(1000, dtype=torch.float32)
    assert second.data_ptr() != location
    del view
    smaller = buffers.empty(40, 10, dtype=torch.bfloat16)
    assert (smaller.shape, smaller.data_ptr()) == ((40, 10), location)
    buffers.clear()


@pytest.mark.parametrize("columns", [32, 49, 80, 97, 130])
def test_what_lies_between_the_rows_of_a_weight_reaches_no_product(columns: int) -> None:
    """On CPUs with AMX oneDNN multiplies the padding of a row by zero, and 0 x NaN is NaN."""
    buffers.clear()
    stale = [buffers.empty(64, 192, dtype=torch.bfloat16).fill_(math.nan) for _ in range(4)]
    del stale
    matrix = cpu_lstm._matrix(64, columns, torch.bfloat16)
    assert matrix.stride(0) >= columns
    whole = matrix.as_strided((64, matrix.stride(0)), (matrix.stride(0), 1))
    assert not whole[:, columns:].any()
    left, right = matrix.copy_(torch.randn(64, columns)), torch.randn(columns, 48).bfloat16()
    product = cpu_lstm.multiply(left, right, torch.full((64, 48), math.nan, dtype=torch.bfloat16))
    torch.testing.assert_close(product.float(), left.float() @ right.float(), rtol=0.02, atol=0.2)
