"""Frequencies of single symbols in a split: what a model can know before it has learnt anything about their order."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytrain.data.corpus import Split
from raytrain.data.pieces import Vocabulary
from raytrain.data.vocabulary import NUM_OUTPUTS, SIZE, STOP

BLOCK = 1 << 20
"""Bytes counted at a time: counting needs eight bytes for each."""
PIECES = 1 << 20
"""Bytes of text in which longer pieces are counted: cutting text into pieces is slow."""
PIECE_BLOCKS = 16
BLOCKS = 64
"""Most blocks that are counted, evenly spaced; a smaller split is counted whole."""


def symbol_counts(split: Split, sampling: str) -> NDArray[np.float64]:
    """Return how often each byte and STOP occur in ``split``, [257], scaled up from at most 64 MiB of it.

    Whole documents have one STOP each, as in their likelihood; for windows, the byte between documents counts like any
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
    """Return the frequencies from ``symbol_counts`` after adding one to each count, float64 [outputs]."""
    if vocabulary is None or vocabulary.is_bytes:
        counts = symbol_counts(split, sampling)
    else:
        counts = piece_counts(split, sampling, vocabulary)
    return torch.from_numpy((counts + 1) / (counts + 1).sum())


def piece_counts(split: Split, sampling: str, vocabulary: Vocabulary) -> NDArray[np.float64]:
    """Return how often each predictable symbol occurs in at most ``PIECES`` bytes of ``split``."""
    size, documents = len(split.stream), sampling == "documents"
    length = min(size, PIECES // PIECE_BLOCKS)
    counts = np.zeros(len(vocabulary.lengths))
    for start in np.linspace(0, size - length, min(PIECE_BLOCKS, -(-size // length))).astype(np.int64):
        text = split.stream[start : start + length].tobytes()
        for symbols in vocabulary.encode(text.split(b"\n") if documents else [text]):
            counts += np.bincount(symbols, minlength=len(counts))
            counts[STOP] += documents
    return np.delete(counts, range(NUM_OUTPUTS, SIZE))
