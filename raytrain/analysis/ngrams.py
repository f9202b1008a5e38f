"""What counting reaches: interpolated byte n-grams, measured on the samples that models are evaluated on.

A model that is worse than an n-gram has learnt less from its text than a table of counts holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Split
from raytrain.data.vocabulary import STOP
from raytrain.models.noise import GOLDEN, MULTIPLIERS, SHIFTS

MAX_ORDER = 7
"""Longest context, in symbols."""
COUNTED = 1 << 25
"""Bytes of the training text that are counted at most, in stretches at even distances: 32 MiB take about 1.5 GiB."""
STRETCHES = 64
LOW = np.uint64(511)
"""Bits of a key that hold the symbol: one of 256 bytes or STOP."""
Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Ladder:
    """Bits per byte of the n-grams of each order on a set of samples: the negative log-likelihood, STOP counted."""

    bits: tuple[float, ...]
    """[orders]: of contexts of 0, 1, ... symbols, each interpolated with all shorter ones."""
    counted: int
    """Bytes of the training text that were counted."""
    available: int
    """Bytes of the training text."""

    @property
    def best(self) -> int:
        """Order with the fewest bits."""
        return self.bits.index(min(self.bits))

    def __str__(self) -> str:
        part = "" if self.counted == self.available else f" ({self.counted} of {self.available} bytes counted)"
        return f"byte {self.best + 1}-gram {self.bits[self.best]:.3f} bits/byte{part}"

    def verdict(self, bits: float) -> str:
        """Return the sentence that compares a model, with its ``bits`` per byte on the samples, with counting."""
        share = bits / self.bits[self.best] - 1
        if share > 0:
            return f"counting is better: {self}; the model needs {share:.1%} more"
        return f"better than counting: {self}; the model needs {-share:.1%} less"


def measure_ngrams(train: Split, samples: EvaluationBatches) -> Ladder:
    """Count the n-grams of ``train`` and measure them on the evaluation's samples, which begin as a model's do.

    Whole documents begin with START and end with STOP; before START there is only START. A window has no known
    beginning: the context of its first symbol is empty. So it is for a lane of a stream; its chunks follow each other
    without another beginning, as the model's state is carried over them. Each order is interpolated with the shorter
    one by absolute discounting (Ney, Essen and Kneser 1994): the discount is n1 / (n1 + 2 n2), of the numbers of
    n-grams that occur once and twice.
    """
    documents = samples.samples.documents
    text, text_offsets = _training_symbols(train, documents)
    rows = samples.sequences()
    asked, offsets = np.concatenate(rows).astype(np.uint64), np.concatenate([np.arange(len(row)) for row in rows])
    contexts, queries = np.zeros_like(text), np.zeros_like(asked)
    probability = np.full(len(asked), 1 / (STOP + documents))
    bits = []
    for order in range(MAX_ORDER + 1):
        if order:
            contexts = _lengthen(contexts, text, text_offsets, order)
            queries = _lengthen(queries, asked, offsets, order)
        counted, known = _keys(contexts, text), np.full(len(asked), True)
        if not documents:  # what lies before a window, or before a lane, is not known
            counted, known = counted[text_offsets >= order], offsets >= order
        probability[known] = _interpolate(counted, _keys(queries, asked)[known], probability[known])
        bits.append(float(-np.log2(probability).sum() / (asked < STOP).sum()))
    return Ladder(tuple(bits), int((text < STOP).sum()), train.num_bytes if documents else len(train.stream))


def _training_symbols(train: Split, documents: bool) -> tuple[Keys, NDArray[np.int64]]:
    """Return symbols to count, and how many symbols of its document, or of its stretch, precede each of them."""
    size = len(train.stream)
    length = size if size <= COUNTED else COUNTED // STRETCHES
    starts = np.linspace(0, size - length, 1 if size <= COUNTED else STRETCHES).astype(np.int64)
    symbols, offsets = [], []
    for start in starts:
        if not documents:
            symbols.append(np.asarray(train.stream[start : start + length]).astype(np.uint64))
            offsets.append(np.arange(length))
            continue
        # whole documents, the byte after each being its STOP
        first, last = np.searchsorted(train.offsets, (start, start + length))
        edges = np.asarray(train.offsets[first : last + 1] if start + length >= size else train.offsets[first:last])
        part = np.asarray(train.stream[edges[0] : edges[-1]]).astype(np.uint64)
        part[edges[1:] - edges[0] - 1] = STOP
        symbols.append(part)
        offsets.append(np.arange(len(part)) - np.repeat(edges[:-1] - edges[0], np.diff(edges)))
    return np.concatenate(symbols), np.concatenate(offsets)


def _lengthen(contexts: Keys, symbols: Keys, offsets: NDArray[np.int64], order: int) -> Keys:
    """Return hashes of the contexts of ``order`` symbols, from those of one symbol less."""
    before = np.roll(symbols, order)
    before[offsets < order] = STOP
    words = contexts * np.uint64(GOLDEN) + before + np.uint64(1)
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        words = (words ^ words >> np.uint64(shift)) * np.uint64(multiplier)
    return words


def _keys(contexts: Keys, symbols: Keys) -> Keys:
    """Return numbers that sort by context, then symbol: 55 bits of the context's hash and 9 of the symbol."""
    return (contexts & ~LOW) | symbols


def _interpolate(counted: Keys, asked: Keys, shorter: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability of each of ``asked`` after ``counted`` of one order, given that of the shorter context."""
    keys, counts = np.unique(counted, return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.5
    sums = np.concatenate(([0], np.cumsum(counts)))
    first, last = np.searchsorted(keys, asked & ~LOW), np.searchsorted(keys, asked | LOW, side="right")
    place = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    count = np.where(keys[place] == asked, counts[place], 0)
    total = sums[last] - sums[first]
    kept = np.maximum(count - discount, 0) + discount * (last - first) * shorter
    return np.where(total > 0, kept / np.maximum(total, 1), shorter)
