"""Frequencies of single symbols in a split: what a model knows before it has learnt anything of their order."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytrain.data.corpus import Split
from raytrain.data.pieces import Vocabulary
from raytrain.data.vocabulary import NUM_OUTPUTS, SIZE, STOP

BLOCK = 1 << 20
"""Bytes that are counted at once: counting makes eight of each."""
PIECES = 1 << 20
"""Bytes of which longer pieces are counted: cutting text into them is slow."""
PIECE_BLOCKS = 16
BLOCKS = 64
"""Blocks that are counted at most, at even distances; a smaller split is counted whole."""


def symbol_counts(split: Split, sampling: str) -> NDArray[np.float64]:
    """Return how often each byte and STOP occur in ``split``, [257], scaled up from at most 64 MiB of it.

    Whole documents have one STOP each, as their likelihood does; in windows, the byte between documents counts like any
    other.
    """
    size = len(split.stream)
    starts = range(0, size, BLOCK)
    chosen = np.linspace(0, len(starts) - 1, min(len(starts), BLOCKS)).astype(np.int64)
    counts = np.zeros(STOP + 1)
    for block in chosen:
        counts[:STOP] += np.bincount(split.stream[block * BLOCK : (block + 1) * BLOCK], minlength=STOP)
    counts *= size / counts.sum()
    if sampling == "documents":
        separator = int(split.stream[split.offsets[1] - 1])
        counts[separator] = max(0.0, counts[separator] - split.num_documents)
        counts[STOP] = split.num_documents
    return counts


def symbol_frequencies(split: Split, sampling: str, vocabulary: Vocabulary | None = None) -> Tensor:
    """Return the frequencies of ``symbol_counts`` after one more occurrence of each symbol, float64 [outputs]."""
    if vocabulary is None or vocabulary.is_bytes:
        counts = symbol_counts(split, sampling)
    else:
        counts = piece_counts(split, sampling, vocabulary)
    return torch.from_numpy((counts + 1) / (counts + 1).sum())


def piece_counts(split: Split, sampling: str, vocabulary: Vocabulary) -> NDArray[np.float64]:
    """Return how often each symbol that can be predicted occurs in at most ``PIECES`` bytes of ``split``."""
    size, documents = len(split.stream), sampling == "documents"
    length = min(size, PIECES // PIECE_BLOCKS)
    counts = np.zeros(len(vocabulary.lengths))
    for start in np.linspace(0, size - length, min(PIECE_BLOCKS, -(-size // length))).astype(np.int64):
        text = split.stream[start : start + length].tobytes()
        for symbols in vocabulary.encode(text.split(b"\n") if documents else [text]):
            counts += np.bincount(symbols, minlength=len(counts))
            counts[STOP] += documents
    return np.delete(counts, range(NUM_OUTPUTS, SIZE))
