"""Pool of CPU memory for tensors. The first touch of a page costs as much as 4,000 multiplications, so it is reused."""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
_free: list[np.ndarray] = []


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor on the CPU, in the memory of a dead tensor if there is one.

    The memory returns to the pool when the last view of the tensor is gone, whoever held it. The pool keeps as much
    memory as was ever in use at the same time.
    """
    size = math.prod(shape) * dtype.itemsize
    block = _take(size + _ALIGNMENT)
    start = -block.ctypes.data % _ALIGNMENT
    lent = block[start : start + size]
    weakref.finalize(lent, _free.append, block).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def clear() -> None:
    """Release the memory that no tensor uses."""
    _free.clear()


def _take(size: int) -> np.ndarray:
    """Return the smallest free block that is large enough, or a new one in exchange for the largest free one."""
    _free.sort(key=len)
    for number, block in enumerate(_free):
        if len(block) >= size:
            return _free.pop(number)
    if _free:
        _free.pop()
    return np.empty(size, dtype=np.uint8)
