"""Hashes of a draw of noise on GPUs in one launch, compiled by Triton: the same bits as with tensors."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def fill(samples: Tensor, key: int | Tensor, words: Tensor) -> None:
    """Write the hash of every sample and index to ``words`` [samples, indices], for ``samples`` [samples]; int64.

    ``key`` is the key of the draw: an int64, or a scalar tensor that holds it when the kernel runs.
    """
    num = words.shape[1]
    _fill[(len(samples), triton.cdiv(num, BLOCK))](samples, key, words, num, isinstance(key, Tensor), BLOCK)


@triton.jit
def _mix(word):
    # SplitMix64, as in raytrain.models.noise
    word = (word ^ (word >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    word = (word ^ (word >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return word ^ (word >> 31)


@triton.jit
def _fill(samples, key, words, num, STORED: tl.constexpr, BLOCK: tl.constexpr):
    if STORED:
        key = tl.load(key)
    sample, block = tl.program_id(0), tl.program_id(1)
    golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    stream = _mix(tl.load(samples + sample).to(tl.uint64) * golden + key.to(tl.uint64))
    index = block * BLOCK + tl.arange(0, BLOCK)
    word = _mix(stream + index.to(tl.uint64) * golden)
    tl.store(words + sample.to(tl.int64) * num + index, word.to(tl.int64), mask=index < num)
