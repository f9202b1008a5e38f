"""Hashes of a draw of noise on CPUs in one pass over memory, compiled by Numba: the same bits as with tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import prange, types
from torch import Tensor

from raytrain.models.compiled import Array, array, compiled, compiled_for_threads, implement, run

# SplitMix64, as in raytrain.models.noise; Numba would make a plain constant a signed integer
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(word: Any) -> Any:
    """Return the hash of a word."""


def fill(samples: Tensor, key: int, words: Tensor) -> None:
    """Write the hash of every sample and index to ``words`` [samples, indices], for ``samples`` [samples]; int64.

    ``key`` is the key of the draw, as an int64.
    """
    bits, hashed = (array(tensor.view(torch.uint64)) for tensor in (samples, words))
    run(_fill, _fill_in_blocks, len(words), words.numel(), bits, np.int64(key).view(np.uint64), hashed)


@implement(_mix)
def _mix_of(word: types.Type) -> Callable[..., Any]:
    def mixed(word: Any) -> Any:
        word = (word ^ (word >> np.uint64(30))) * _FIRST
        word = (word ^ (word >> np.uint64(27))) * _SECOND
        return word ^ (word >> np.uint64(31))

    return mixed


@compiled
def _fill(samples: Array, key: Any, words: Array, first: int, end: int) -> None:
    for sample in range(np.uint64(first), np.uint64(end)):
        stream = _mix(samples[sample] * _GOLDEN + key)
        for index in range(np.uint64(words.shape[1])):
            words[sample, index] = _mix(stream + index * _GOLDEN)


@compiled_for_threads
def _fill_in_blocks(samples: Array, key: Any, words: Array, blocks: int) -> None:
    size = -(-len(words) // blocks)
    for block in prange(blocks):
        _fill(samples, key, words, block * size, min(block * size + size, len(words)))
