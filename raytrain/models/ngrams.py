"""Interpolated n-grams of bytes or pieces: counted in the training split, measured on the samples of evaluations.

A model of order k predicts a symbol from the k symbols before it: it is the (k + 1)-gram. At most ``COUNTED`` bytes are
counted, which bounds time and memory: 50 MB take 23 s on one core and 0.9 GB, more than 64 MB at most 39 s and 1.1 GB
(``python benchmarks/ngrams.py FOLDER --megabytes 50 100``, docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Split
from raytrain.data.pieces import Vocabulary
from raytrain.data.vocabulary import STOP
from raytrain.models.noise import GOLDEN, MULTIPLIERS, SHIFTS, WORD

MAX_ORDER = 7
"""Longest context, in symbols."""
COUNTED = 64_000_000
"""Maximum number of bytes of the training text that are counted."""
STRETCHES = 64
"""Number of evenly spaced stretches of a longer text that are counted."""
SORTED = 1 << 23
"""Approximate number of n-grams that are sorted at once."""
BLOCK = 1 << 20
"""Contexts that are hashed at once, and bytes of documents that are cut into pieces at once."""
Symbols = NDArray[np.unsignedinteger[Any]]
Keys = NDArray[np.uint64]
"""Numbers that sort by context, then symbol: for bytes, 55 bits of the context's hash and 9 of the symbol."""


@dataclass(frozen=True)
class Sequences:
    """Symbols of concatenated texts, each symbol with its context of the current order."""

    symbols: Symbols
    """[symbols]: bytes or pieces, and a STOP at the end of each document."""
    offsets: NDArray[np.uint8]
    """[symbols]: how many symbols of the same text precede each, at most ``MAX_ORDER``."""
    contexts: NDArray[np.uint64]
    """[symbols]: hashes of the symbols that precede each."""
    low: np.uint64
    """Mask of the bits of a key that hold the symbol: as many ones as the largest symbol has binary digits."""

    @classmethod
    def of(cls, symbols: Symbols, starts: NDArray[np.int64], vocabulary: Vocabulary) -> Sequences:
        """Return the sequences of texts that begin at ``starts``, with empty contexts."""
        offsets = np.full(len(symbols), MAX_ORDER, dtype=np.uint8)
        for offset in reversed(range(MAX_ORDER)):  # after a text of fewer symbols the next one begins
            places = starts + offset
            offsets[places[places < len(symbols)]] = offset
        low = np.uint64((1 << (len(vocabulary.lengths) - 1).bit_length()) - 1)
        return cls(symbols, offsets, np.zeros(len(symbols), dtype=np.uint64), low)

    def lengthen(self, order: int) -> None:
        """Lengthen the contexts by one, to ``order`` symbols; before a text there is only START."""
        before = np.roll(self.symbols, order)
        before[self.offsets < order] = STOP
        for start in range(0, len(before), BLOCK):  # the intermediate words take several times the memory
            block = slice(start, start + BLOCK)
            words = self.contexts[block] * np.uint64(GOLDEN) + before[block] + np.uint64(1)
            for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
                words = (words ^ words >> np.uint64(shift)) * np.uint64(multiplier)
            self.contexts[block] = words

    def keys(self, places: NDArray[np.int64]) -> Keys:
        """Return the keys of the n-grams that end at ``places``."""
        keys = self.contexts[places]
        keys &= ~self.low
        keys |= self.symbols[places]
        return keys


def measure_ngrams(
    train: Split, samples: EvaluationBatches, max_order: int = MAX_ORDER
) -> tuple[tuple[float, ...], int]:
    """Count the n-grams of ``train`` and measure them on the evaluation's samples, which begin as for a model.

    They are n-grams of the symbols in which the samples are read: of bytes, or of a vocabulary's pieces.

    Whole documents begin with START and end with STOP; before START there is only START. A window has no known
    beginning: the context of its first symbol is empty. The same holds for a lane of a stream. Its chunks follow each
    other without a new beginning, as the model's state is carried over. Each order is interpolated with the shorter one
    by absolute discounting (Ney, Essen and Kneser 1994): the discount is n1 / (n1 + 2 n2), where n1 and n2 are the
    numbers of n-grams that occur once and twice.

    Returns:
        [max_order + 1] bits per byte of each order, STOP counted; and how many bytes of ``train`` were counted.
    """
    documents, vocabulary = samples.samples.documents, samples.samples.vocabulary
    text = _training_text(train, documents, vocabulary)
    rows = samples.sequences()
    asked = Sequences.of(
        np.concatenate(rows).astype(text.symbols.dtype), np.cumsum([0, *map(len, rows[:-1])]), vocabulary
    )
    num_bytes = vocabulary.lengths[asked.symbols].sum()
    probability = np.full(len(asked.symbols), 1 / (STOP + documents + len(vocabulary.pieces)))
    bits = []
    for order in range(max_order + 1):
        if order:
            text.lengthen(order)
            asked.lengthen(order)
        # the text before a window, a lane or a stretch of them is not known
        usable = text.offsets >= (0 if documents else order)
        known = np.flatnonzero(asked.offsets >= (0 if documents else order))
        tables = _tables(text, usable, order)
        probability[known] = _interpolate(tables, asked.keys(known), probability[known], text.low)
        bits.append(float(-np.log2(probability).sum() / num_bytes))
    blocks = range(0, len(text.symbols), BLOCK)
    return tuple(bits), sum(int(vocabulary.lengths[text.symbols[start : start + BLOCK]].sum()) for start in blocks)


def _training_text(train: Split, documents: bool, vocabulary: Vocabulary) -> Sequences:
    """Return the text to count: the whole split or, if it is large, stretches of it.

    With whole documents, a stretch has those that begin in it; the last may be cut off.
    """
    texts: list[Symbols] = []
    starts, total = [], 0
    size = len(train.stream)
    length, number = (size, 1) if size <= COUNTED else (COUNTED // STRETCHES, STRETCHES)
    for first in np.linspace(0, size - length, number).astype(np.int64):
        edges = np.array([first])
        if documents:
            low, high = np.searchsorted(train.offsets, first), np.searchsorted(train.offsets, first + length, "right")
            edges = np.asarray(train.offsets[low:high])
        if len(edges) == 0 or edges[0] == first + length:
            continue  # it lies within one document
        text: Symbols = np.asarray(train.stream[edges[0] : first + length]).astype(np.uint16)
        text[edges[1:] - edges[0] - 1] = STOP  # in place of the byte after each document
        begins = edges[edges < first + length] - edges[0]
        if not vocabulary.is_bytes and documents:
            text, begins = _documents_in_pieces(text, begins, vocabulary)
        elif not vocabulary.is_bytes:
            text = np.concatenate([*vocabulary.encode_stream(text.astype(np.uint8))]).astype(np.uint32)
        texts.append(text)
        starts.append(total + begins)
        total += len(text)
    return Sequences.of(np.concatenate(texts), np.concatenate(starts), vocabulary)


def _documents_in_pieces(
    text: Symbols, starts: NDArray[np.int64], vocabulary: Vocabulary
) -> tuple[Symbols, NDArray[np.int64]]:
    """Cut ``text``, whose documents begin at ``starts``, into pieces; return them and where its documents now begin."""
    edges = np.array([*starts, len(text)])
    batches = [*np.flatnonzero(np.diff(edges[:-1] // BLOCK, prepend=-1)), len(edges) - 1]
    cut: list[Symbols] = []
    lengths: list[int] = []
    for first, last in pairwise(batches):
        rows = [text[start:end] for start, end in pairwise(edges[first : last + 1])]
        encoded = vocabulary.encode([row[row < STOP].astype(np.uint8).tobytes() for row in rows])
        ended = [
            np.append(pieces, STOP) if row[-1] == STOP else pieces for row, pieces in zip(rows, encoded, strict=True)
        ]
        cut.append(np.concatenate(ended).astype(np.uint32))
        lengths += map(len, ended)
    return np.concatenate(cut), np.cumsum([0, *lengths[:-1]])


def _tables(text: Sequences, usable: NDArray[np.bool_], order: int) -> Iterator[tuple[Keys, NDArray[np.int64]]]:
    """Yield the different n-grams that end at the ``usable`` symbols and how often each occurs.

    Keys increase from table to table, and all n-grams of one context are in the same table.
    """
    if order == 0:  # one context, which cannot be divided
        symbols, counts = np.unique(text.symbols, return_counts=True)
        yield symbols.astype(np.uint64), counts
        return
    parts = 1 << (len(text.symbols) // SORTED).bit_length()
    for part in range(parts):
        low, high = part * (WORD // parts), (part + 1) * (WORD // parts) - 1
        inside = usable & (text.contexts >= np.uint64(low)) & (text.contexts <= np.uint64(high))
        yield np.unique(text.keys(np.flatnonzero(inside)), return_counts=True)


def _interpolate(
    tables: Iterator[tuple[Keys, NDArray[np.int64]]], asked: Keys, shorter: NDArray[np.float64], low: np.uint64
) -> NDArray[np.float64]:
    """Return the probability of each of ``asked`` by the ``tables`` of one order.

    ``shorter`` holds the probabilities given the shorter context. ``low`` masks the bits of a key that hold the symbol.
    """
    count, total, different = (np.zeros(len(asked), dtype=np.int64) for _ in range(3))
    once = twice = 0
    for keys, counts in tables:
        once, twice = once + int((counts == 1).sum()), twice + int((counts == 2).sum())
        sums = np.concatenate(([0], np.cumsum(counts)))
        place, after = np.searchsorted(keys, asked), np.searchsorted(keys, asked, side="right")
        first, last = np.searchsorted(keys, asked & ~low), np.searchsorted(keys, asked | low, side="right")
        # a table without the context adds nothing
        count += sums[after] - sums[place]
        total += sums[last] - sums[first]
        different += last - first
    discount = once / (once + 2 * twice) if once else 0.5
    kept = np.maximum(count - discount, 0) + discount * different * shorter
    return np.where(total > 0, kept / np.maximum(total, 1), shorter)
