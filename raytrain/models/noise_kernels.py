"""Hashes of a draw of noise on CPUs in one pass over memory, compiled by Numba: the same bits as by tensors."""

from __future__ import annotations

import numpy as np
from numba import prange

from raytrain.models.compiled import Array, compiled, compiled_for_threads, run

# SplitMix64, as in raytrain.models.noise; of a constant Numba would make a signed integer
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def fill(streams: Array, words: Array) -> None:
    """Write the hash of every stream and index to ``words`` [samples, indices], for ``streams`` [samples]; uint64."""
    run(_fill, _fill_in_blocks, len(words), words.size, streams, words)


@compiled
def _fill(streams: Array, words: Array, first: int, end: int) -> None:
    for sample in range(np.uint64(first), np.uint64(end)):
        stream = streams[sample]
        for index in range(np.uint64(words.shape[1])):
            word = stream + index * _GOLDEN
            word = (word ^ (word >> np.uint64(30))) * _FIRST
            word = (word ^ (word >> np.uint64(27))) * _SECOND
            words[sample, index] = word ^ (word >> np.uint64(31))


@compiled_for_threads
def _fill_in_blocks(streams: Array, words: Array, blocks: int) -> None:
    size = -(-len(words) // blocks)
    for block in prange(blocks):
        _fill(streams, words, block * size, min(block * size + size, len(words)))
