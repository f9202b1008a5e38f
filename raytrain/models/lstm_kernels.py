"""Gates of an LSTM's step on CPUs, each way in one pass over memory, compiled by Numba.

PyTorch would make ten passes of them, each over matrices that do not fit the fastest cache. Arrays are flat over
[hidden, batch]. Those of products and outputs are float32, float64, or bfloat16 as uint16, which holds the upper half
of a float32: NumPy has no such type. All others are float32, or float64 beside float64.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload
from numpy.typing import NDArray

Array = NDArray[Any]

# exp: Cephes' polynomial on |r| <= ln 2 / 2, after Cody and Waite's reduction of the argument
_LARGEST = np.float32(87)
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_TO_WHOLE = np.float32(1.5 * 2**23)
"""Added to a float32 of at most 2^22 it leaves the nearest whole number, in the lower bits of the sum."""


_LEAST = 1 << 14
"""Fewest elements for a thread: half of them take as long as to wake it."""
# every Numba has this one; it ends the process if two threads use it at once
numba.config.THREADING_LAYER = "workqueue"
_one_at_a_time = threading.Lock()


def _compiled(function: Callable[..., None], parallel: bool = False) -> Callable[..., None]:
    """Compile a kernel at its first call for each type, and keep the machine code on disk if there is a place for it.

    Products and sums may be fused, and nothing else may change: NaN and infinity pass through as in PyTorch.
    """
    options = {"fastmath": {"contract"}, "error_model": "numpy", "nogil": True, "parallel": parallel}
    try:
        kernel: Callable[..., None] = njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        kernel = njit(**options)(function)
    return kernel


def _compiled_for_threads(function: Callable[..., None]) -> Callable[..., None]:
    return _compiled(function, parallel=True)


def _implement(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator for what maps the types of the arguments of ``function`` to its body."""
    decorator: Callable[[Callable[..., Any]], Any] = overload(function, strict=False)
    return decorator


def _exp(x: Any) -> Any:
    """Return exp(x), to 2 units in the last place in float32."""


def _wide(x: Any) -> Any:
    """Return ``x``, which may be the bits of a bfloat16, as a float."""


def _narrow(x: Any, like: Any) -> Any:
    """Return ``x`` in the type of ``like``, which may be that of the bits of a bfloat16."""


@_implement(_exp)
def _exp_of(x: types.Type) -> Callable[..., Any]:
    if x == types.float64:
        return lambda x: math.exp(x)

    def single(x: Any) -> Any:
        # a NaN is neither above nor below
        x = _LARGEST if x > _LARGEST else x
        x = -_LARGEST if x < -_LARGEST else x
        shifted = np.float32(x * _LOG2_E + _TO_WHOLE)
        whole = shifted - _TO_WHOLE
        r = x - whole * _LN2_HIGH
        r = r - whole * _LN2_LOW
        p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
        p = p * r * r + r + np.float32(1)
        power = np.int32((shifted.view(np.int32) + np.int32(127)) << np.int32(23))
        return p * power.view(np.float32)

    return single


@_implement(_wide)
def _wide_of(x: types.Type) -> Callable[..., Any]:
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@_implement(_narrow)
def _narrow_of(x: types.Type, like: types.Type) -> Callable[..., Any]:
    if like != types.uint16:
        return lambda x, like: x

    def upper_half(x: Any, like: Any) -> Any:
        # to the nearest, ties to even; a NaN stays one
        bits = np.float32(x).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        return np.uint16(rounded if x == x else np.uint32(0x7FC0))

    return upper_half


@_compiled
def _forward(product: Array, gates: Array, cell: Array, next_cell: Array, output: Array, first: int, end: int) -> None:
    one, like = cell.dtype.type(1), output.dtype.type(0)
    two = one + one
    # unsigned: Numba would look at each index for a negative one, and the loop could not use vectors
    for i in range(np.uint64(first), np.uint64(end)):
        update = one / (one + _exp(-_wide(product[0, i])))
        keep = one / (one + _exp(-_wide(product[1, i])))
        candidate = two / (one + _exp(-two * _wide(product[2, i]))) - one
        release = one / (one + _exp(-_wide(product[3, i])))
        gates[0, i], gates[1, i], gates[2, i], gates[3, i] = update, keep, candidate, release
        after = keep * cell[i] + update * candidate
        next_cell[i] = after
        squashed = two / (one + _exp(-two * after)) - one
        output[i] = _narrow(release * squashed, like)


@_compiled
def _backward(
    of_output: Array,
    of_hidden: Array,
    gates: Array,
    cell: Array,
    next_cell: Array,
    of_cell: Array,
    of_gates: Array,
    first: int,
    end: int,
) -> None:
    one, like = cell.dtype.type(1), of_gates.dtype.type(0)
    two = one + one
    for i in range(np.uint64(first), np.uint64(end)):
        update, keep, candidate, release = gates[0, i], gates[1, i], gates[2, i], gates[3, i]
        squashed = two / (one + _exp(-two * next_cell[i])) - one
        of_state = _wide(of_output[i]) + _wide(of_hidden[i])
        of_after = of_cell[i] + of_state * release * (one - squashed * squashed)
        of_gates[0, i] = _narrow(of_after * candidate * update * (one - update), like)
        of_gates[1, i] = _narrow(of_after * cell[i] * keep * (one - keep), like)
        of_gates[2, i] = _narrow(of_after * update * (one - candidate * candidate), like)
        of_gates[3, i] = _narrow(of_state * squashed * release * (one - release), like)
        of_cell[i] = of_after * keep


@_compiled_for_threads
def _forward_in_blocks(product: Array, gates: Array, cell: Array, next_cell: Array, output: Array, blocks: int) -> None:
    size = -(-len(cell) // blocks)
    for block in prange(blocks):
        _forward(product, gates, cell, next_cell, output, block * size, min(block * size + size, len(cell)))


@_compiled_for_threads
def _backward_in_blocks(
    of_output: Array,
    of_hidden: Array,
    gates: Array,
    cell: Array,
    next_cell: Array,
    of_cell: Array,
    of_gates: Array,
    blocks: int,
) -> None:
    size = -(-len(cell) // blocks)
    for block in prange(blocks):
        first, end = block * size, min(block * size + size, len(cell))
        _backward(of_output, of_hidden, gates, cell, next_cell, of_cell, of_gates, first, end)


def forward(product: Array, gates: Array, cell: Array, next_cell: Array, output: Array) -> None:
    """Compute a step from the pre-activations of its gates, input, forget, cell and output.

    Args:
        product: [4, hidden x batch], the pre-activations.
        gates: [4, hidden x batch], where the gates are written.
        cell: [hidden x batch], the cells before the step.
        next_cell, output: [hidden x batch], where those after it, and the hidden state, are written.
    """
    _run(_forward, _forward_in_blocks, product, gates, cell, next_cell, output)


def backward(
    of_output: Array, of_hidden: Array, gates: Array, cell: Array, next_cell: Array, of_cell: Array, of_gates: Array
) -> None:
    """Compute the gradients of a step.

    Args:
        of_output, of_hidden: [hidden x batch], gradients of the output as such and as what the next step reads.
        gates, cell, next_cell: as ``forward`` left them.
        of_cell: [hidden x batch], gradient of the cells after the step; overwritten by that of those before it.
        of_gates: [4, hidden x batch], where the gradients of the pre-activations are written.
    """
    _run(_backward, _backward_in_blocks, of_output, of_hidden, gates, cell, next_cell, of_cell, of_gates)


def _run(kernel: Callable[..., None], in_blocks: Callable[..., None], *arrays: Array) -> None:
    """Run a kernel on as many threads as PyTorch uses, but for a small step on one."""
    count = arrays[-1].shape[-1]
    blocks = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, count // _LEAST)
    if blocks < 2:
        kernel(*arrays, 0, count)
        return
    with _one_at_a_time:
        numba.set_num_threads(blocks)
        in_blocks(*arrays, blocks)
