"""Memory that is used again: on CPUs a page that is touched for the first time costs as much as 4,000 products."""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
_free: list[np.ndarray] = []


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU, in memory that was a dead tensor's if there is any.

    The memory comes back when the last view of the tensor is gone, whoever held it. As much is kept as was ever in
    use at the same time.
    """
    size = math.prod(shape) * dtype.itemsize
    block = _take(size + _ALIGNMENT)
    start = -block.ctypes.data % _ALIGNMENT
    lent = block[start : start + size]
    weakref.finalize(lent, _free.append, block).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def clear() -> None:
    """Give up the memory that nothing uses."""
    _free.clear()


def _take(size: int) -> np.ndarray:
    """The smallest free block that is large enough, or a new one, for which the largest free one is given up."""
    _free.sort(key=len)
    for number, block in enumerate(_free):
        if len(block) >= size:
            return _free.pop(number)
    if _free:
        _free.pop()
    return np.empty(size, dtype=np.uint8)
