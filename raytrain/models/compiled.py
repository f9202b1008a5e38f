"""Compilation of the CPU kernels by Numba, their threads, and the arithmetic that they share.

Floats are float32, float64, or bfloat16. NumPy has no bfloat16, so it is a uint16 that holds the upper half of a
float32.

Numba caches machine code beside the kernel's file and does not notice changes to this file. After changing it, touch
the kernels' files.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

# exp: Cephes' polynomial on |r| <= ln 2 / 2, after Cody and Waite's reduction of the argument
_LARGEST = np.float32(87)
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_TO_WHOLE = np.float32(1.5 * 2**23)
"""Adding this to a float32 of at most 2^22 leaves the nearest integer in the low bits of the sum."""


_LEAST = 1 << 14
"""Minimum number of elements per thread: computing half of them takes as long as waking the thread."""
# every Numba build has this layer; it aborts the process if two threads use it at once
numba.config.THREADING_LAYER = "workqueue"
_one_at_a_time = threading.Lock()


def compiled(function: Callable[..., None], parallel: bool = False, any_order: bool = False) -> Callable[..., None]:
    """Compile a kernel on its first call for each type, and cache the machine code on disk if there is a place for it.

    Multiplications and additions may be fused. With ``any_order``, sums may be reordered, so that they are vectorised.
    Nothing else may change: NaN and infinity pass through as in PyTorch.
    """
    fast = {"contract", "reassoc"} if any_order else {"contract"}
    options = {"fastmath": fast, "error_model": "numpy", "nogil": True, "parallel": parallel}
    try:
        kernel: Callable[..., None] = njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        kernel = njit(**options)(function)
    return kernel


def compiled_for_threads(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a kernel that divides its work by ``prange``."""
    return compiled(function, parallel=True)


def compiled_in_any_order(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a kernel whose sums may be reordered."""
    return compiled(function, any_order=True)


def implement(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator for a function that maps the argument types of ``function`` to its implementation."""
    decorator: Callable[[Callable[..., Any]], Any] = overload(function, strict=False)
    return decorator


def exp(x: Any) -> Any:
    """Return exp(x); in float32 it is accurate to 2 units in the last place."""


def wide(x: Any) -> Any:
    """Return ``x``, which may be the bits of a bfloat16, as a float."""


def narrow(x: Any, like: Any) -> Any:
    """Return ``x`` in the type of ``like``; as the bits of a bfloat16 if that is uint16."""


@implement(exp)
def _exp_of(x: types.Type) -> Callable[..., Any]:
    if x == types.float64:
        return lambda x: math.exp(x)

    def single(x: Any) -> Any:
        # a NaN passes through: comparisons with it are false
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


@implement(wide)
def _wide_of(x: types.Type) -> Callable[..., Any]:
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@implement(narrow)
def _narrow_of(x: types.Type, like: types.Type) -> Callable[..., Any]:
    if like != types.uint16:
        return lambda x, like: x

    def upper_half(x: Any, like: Any) -> Any:
        # round to nearest, ties to even; a NaN stays a NaN
        bits = np.float32(x).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        return np.uint16(rounded if x == x else np.uint32(0x7FC0))

    return upper_half


def run(kernel: Callable[..., None], in_blocks: Callable[..., None], length: int, elements: int, *arrays: Any) -> None:
    """Run a kernel on as many threads as PyTorch uses, or on fewer if there is little to do.

    Args:
        kernel: takes ``arrays``, and the start and end of the range to compute.
        in_blocks: takes ``arrays`` and the number of blocks to compute in parallel.
        length: end of the whole range.
        elements: number of elements to compute.
    """
    blocks = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, elements // _LEAST)
    if blocks < 2:
        kernel(*arrays, 0, length)
        return
    with _one_at_a_time:
        numba.set_num_threads(blocks)
        in_blocks(*arrays, blocks)


def array(tensor: Tensor) -> Array:
    """Return an array that shares the memory of a tensor; bfloat16 as its bits."""
    tensor = tensor.detach()
    values: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return values
