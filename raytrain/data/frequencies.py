"""Frequencies of single symbols in a split: what a model knows before it has learnt anything of their order."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytrain.data.corpus import Split
from raytrain.data.vocabulary import STOP

BLOCK = 1 << 20
"""Bytes that are counted at once: counting makes eight of each."""
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


def symbol_frequencies(split: Split, sampling: str) -> Tensor:
    """Return the frequencies of ``symbol_counts`` after one more occurrence of each symbol, float64 [257]."""
    counts = symbol_counts(split, sampling) + 1
    return torch.from_numpy(counts / counts.sum())
