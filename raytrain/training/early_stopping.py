"""Which trials of a search are ended at once, and why: the one rule that does not wait for others to be better."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from raytrain.config.schedules import annealing_end
from raytrain.config.schema import RunConfig
from raytrain.data.corpus import Corpus

PATIENCE = 8
"""A trial is not judged before this share (one over it) of its steps ..."""
FEWEST_STEPS = 200
"""... nor before so many steps: a run this short has had no time to learn how frequent each byte is."""
MARGIN = 1.05
"""A trial must be worse by this factor: many a net first learns how frequent each byte is and rests there for a while,
and the validation samples are not the training text."""


class EarlyStoppedError(Exception):
    """A trial that no more steps would help; the message says why."""


def unigram_bits(corpus: Corpus, sampling: str) -> float:
    """Entropy of single symbols on the training split, in bits per byte of text.

    That is the bound of a model that knows how frequent each byte is and nothing else. Whole documents have a STOP
    each, as their bound does; in windows what stands between documents is a byte like any other.
    """
    split = corpus.split("train")
    counts = np.zeros(257, dtype=np.float64)
    for start in range(0, len(split.stream), 1 << 24):  # counting turns every byte into eight
        counts[:256] += np.bincount(split.stream[start : start + (1 << 24)], minlength=256)
    text_bytes = len(split.stream)
    if sampling == "documents":
        separator = int(split.stream[split.offsets[1] - 1])
        counts[separator] -= split.num_documents
        counts[256] = split.num_documents
        text_bytes = split.num_bytes
    symbols = counts[counts > 0]
    return float(-(symbols * np.log2(symbols / symbols.sum())).sum() / text_bytes)


def why_early_stopped(config: RunConfig[Any], step: int, metrics: dict[str, float], limit: float) -> str | None:
    """Why a trial with these validation metrics at ``step`` is hopeless, ``None`` if it is not.

    It is when it is still 5% worse than ``limit``, the ``unigram_bits`` of its corpus, after an eighth of its steps
    (and 200 steps at least). While the KL weight is on its way, and for as long again after it has its final value,
    the reconstruction alone is judged: a code that costs nothing yet may be as large as it likes, and takes a while to
    become cheap. From then on it is the bound. A trial whose metrics are not finite has diverged: the loop itself ends
    it, however early.
    """
    patience = max(FEWEST_STEPS, math.ceil(config.steps / PATIENCE))
    if step < patience:
        return None
    bits, name = metrics["bits_per_byte"], "bound"
    if step < annealing_end(config.objective, config.steps) + patience:
        bits, name = bits * metrics["reconstruction"] / metrics["bound"], "reconstruction"
    if bits <= MARGIN * limit:
        return None
    return (
        f"hopeless at step {step}: its {name} of {bits:.3f} bits per byte is far worse than the {limit:.3f} of a "
        "model that knows only how frequent each byte is"
    )
