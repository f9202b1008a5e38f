"""How the kernels for CPUs are compiled by Numba and run on threads, and the arithmetic that they share.

Floats are float32, float64, or bfloat16 as uint16, which holds the upper half of a float32: NumPy has no such type.

Numba keeps machine code beside the file of the kernel, and does not see changes of this one: after those, touch the
files of the kernels.
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
"""Added to a float32 of at most 2^22 it leaves the nearest whole number, in the lower bits of the sum."""


_LEAST = 1 << 14
"""Fewest elements for a thread: half of them take as long as to wake it."""
# every Numba has this one; it ends the process if two threads use it at once
numba.config.THREADING_LAYER = "workqueue"
_one_at_a_time = threading.Lock()


def compiled(function: Callable[..., None], parallel: bool = False, any_order: bool = False) -> Callable[..., None]:
    """Compile a kernel at its first call for each type, and keep the machine code on disk if there is a place for it.

    Products and sums may be fused, and sums that are in ``any_order`` use vectors. Nothing else may change: NaN and
    infinity pass through as in PyTorch.
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
    """Return a decorator for what maps the types of the arguments of ``function`` to its body."""
    decorator: Callable[[Callable[..., Any]], Any] = overload(function, strict=False)
    return decorator


def exp(x: Any) -> Any:
    """Return exp(x), to 2 units in the last place in float32."""


def wide(x: Any) -> Any:
    """Return ``x``, which may be the bits of a bfloat16, as a float."""


def narrow(x: Any, like: Any) -> Any:
    """Return ``x`` in the type of ``like``, which may be that of the bits of a bfloat16."""


@implement(exp)
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
        # to the nearest, ties to even; a NaN stays one
        bits = np.float32(x).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        return np.uint16(rounded if x == x else np.uint32(0x7FC0))

    return upper_half


def run(kernel: Callable[..., None], in_blocks: Callable[..., None], length: int, elements: int, *arrays: Any) -> None:
    """Run a kernel on as many threads as PyTorch uses, but where there is little to do on one.

    Args:
        kernel: takes ``arrays``, and the first and the end of the range that it is to compute.
        in_blocks: takes ``arrays`` and the number of parts that it is to compute at once.
        length: end of the whole range.
        elements: number of elements to be computed.
    """
    blocks = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, elements // _LEAST)
    if blocks < 2:
        kernel(*arrays, 0, length)
        return
    with _one_at_a_time:
        numba.set_num_threads(blocks)
        in_blocks(*arrays, blocks)


def array(tensor: Tensor) -> Array:
    """Return the memory of a tensor as an array; bfloat16 as its bits."""
    tensor = tensor.detach()
    values: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return values
