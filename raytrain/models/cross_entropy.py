"""Cross-entropy on CPUs, forward and backward in one pass each over the logits, compiled by Numba.

PyTorch makes seven passes: it widens the logits to float32, and keeps all log-probabilities for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import prange, types
from torch import Tensor
from torch.autograd.function import once_differentiable

from raytrain.models import buffers
from raytrain.models.compiled import (
    Array,
    array,
    compiled,
    compiled_for_threads,
    compiled_in_any_order,
    exp,
    implement,
    narrow,
    run,
    wide,
)


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy of symbols under logits, in nats and at least float32, whatever the type of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
        """Return the nats [rows] of ``targets`` [rows] under ``logits`` [rows, symbols]; 0 where they are ``ignored``.

        Raises:
            IndexError: a target is not one of the symbols.
        """
        logits, targets = logits.contiguous(), targets.contiguous()
        rows, symbols = logits.shape
        wanted = array(targets)
        if unknown := wanted[((wanted < 0) | (wanted >= symbols)) & (wanted != ignored)].tolist():
            raise IndexError(f"target {unknown[0]} is none of {symbols} symbols")
        nats, normaliser = torch.empty(2, rows, dtype=torch.promote_types(logits.dtype, torch.float32))
        arrays = array(logits), wanted, ignored, array(nats), array(normaliser)
        run(_forward, _forward_in_blocks, rows, rows * symbols, *arrays)
        ctx.save_for_backward(logits, targets, normaliser)
        ctx.ignored = ignored
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the logits, in their type."""
        logits, targets, normaliser = ctx.saved_tensors
        rows, symbols = logits.shape
        of_logits = buffers.empty(rows, symbols, dtype=logits.dtype)
        given = (logits, targets, normaliser, gradient.contiguous(), of_logits)
        run(_backward, _backward_in_blocks, rows, rows * symbols, *(array(tensor) for tensor in given), ctx.ignored)
        return of_logits, None, None


def _ordered(x: Any) -> Any:
    """Return an integer that sorts as ``x`` does; NaN sorts last."""


def _number(ordered: Any) -> Any:
    """Return the float that ``_ordered`` maps to this integer."""


@implement(_ordered)
def _ordered_of(x: types.Type) -> Callable[..., Any]:
    if x == types.uint16:
        return lambda x: _flipped(np.int16(x))
    if x == types.float32:
        return lambda x: _flipped(np.float32(x).view(np.int32))
    return lambda x: _flipped(np.float64(x).view(np.int64))


@implement(_number)
def _number_of(ordered: types.Type) -> Callable[..., Any]:
    if ordered == types.int16:
        return lambda ordered: wide(np.uint16(_flipped(ordered)))
    if ordered == types.int32:
        return lambda ordered: np.int32(_flipped(ordered)).view(np.float32)
    return lambda ordered: np.int64(_flipped(ordered)).view(np.float64)


def _flipped(bits: Any) -> Any:
    """Return the bits of a float, with the bits of its magnitude inverted if it is negative."""


@implement(_flipped)
def _flipped_of(bits: types.Type) -> Callable[..., Any]:
    kind: Any = {types.int16: np.int16, types.int32: np.int32, types.int64: np.int64}[bits]
    sign, magnitude = kind(bits.bitwidth - 1), kind(np.iinfo(kind).max)
    return lambda bits: kind(bits ^ kind(kind(bits >> sign) & magnitude))


@compiled_in_any_order
def _forward(logits: Array, targets: Array, ignored: int, nats: Array, normaliser: Array, first: int, end: int) -> None:
    zero, symbols = nats.dtype.type(0), np.uint64(logits.shape[1])
    for row in range(np.uint64(first), np.uint64(end)):
        # a maximum of floats would not be vectorised, because of NaN
        highest = _ordered(logits[row, 0])
        for symbol in range(symbols):
            highest = max(highest, _ordered(logits[row, symbol]))
        largest = _number(highest)
        total = zero
        for symbol in range(symbols):
            total += exp(wide(logits[row, symbol]) - largest)
        normaliser[row] = largest + math.log(total)
        target = targets[row]
        nats[row] = zero if target == ignored else normaliser[row] - wide(logits[row, np.uint64(target)])


@compiled
def _backward(
    logits: Array,
    targets: Array,
    normaliser: Array,
    gradient: Array,
    of_logits: Array,
    ignored: int,
    first: int,
    end: int,
) -> None:
    symbols, like = logits.shape[1], logits.dtype.type(0)
    for row in range(np.uint64(first), np.uint64(end)):
        factor, log = gradient[row], normaliser[row]
        # a loss of weight 0 costs no exponential
        if targets[row] == ignored or factor == 0:
            for symbol in range(np.uint64(symbols)):
                of_logits[row, symbol] = 0
            continue
        for symbol in range(np.uint64(symbols)):
            of_logits[row, symbol] = narrow(factor * exp(wide(logits[row, symbol]) - log), like)
        target = np.uint64(targets[row])
        of_logits[row, target] = narrow(factor * exp(wide(logits[row, target]) - log) - factor, like)


@compiled_for_threads
def _forward_in_blocks(
    logits: Array, targets: Array, ignored: int, nats: Array, normaliser: Array, blocks: int
) -> None:
    size = -(-len(targets) // blocks)
    for block in prange(blocks):
        first, end = block * size, min(block * size + size, len(targets))
        _forward(logits, targets, ignored, nats, normaliser, first, end)


@compiled_for_threads
def _backward_in_blocks(
    logits: Array, targets: Array, normaliser: Array, gradient: Array, of_logits: Array, ignored: int, blocks: int
) -> None:
    size = -(-len(targets) // blocks)
    for block in prange(blocks):
        first, end = block * size, min(block * size + size, len(targets))
        _backward(logits, targets, normaliser, gradient, of_logits, ignored, first, end)
