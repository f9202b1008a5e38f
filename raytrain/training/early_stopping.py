"""Early stopping against a baseline: a trial that has learnt no more than the byte frequencies ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from raytrain.config.schedules import annealing_end
from raytrain.config.schema import RunConfig
from raytrain.data.corpus import Corpus
from raytrain.data.frequencies import symbol_counts

PATIENCE = 8
"""A trial is not judged before 1/PATIENCE of its steps ..."""
FEWEST_STEPS = 200
"""... nor before this many steps: a shorter run has had no time to learn."""
MARGIN = 0.95
"""Share of the unigram entropy that a trial must have reached: it began with the byte frequencies."""


class EarlyStoppedError(Exception):
    """A trial ended by the baseline rule; the message says why."""


def unigram_bits(corpus: Corpus, sampling: str) -> float:
    """Return the entropy of single symbols on the training split, in bits per byte of text.

    It is the negative log-likelihood of a model that knows the byte frequencies and nothing else. Whole documents have
    one STOP each, as their likelihood does; in windows, the byte between documents counts like any other.
    """
    split = corpus.split("train")
    counts = symbol_counts(split, sampling)
    text_bytes = split.num_bytes if sampling == "documents" else len(split.stream)
    symbols = counts[counts > 0]
    return float(-(symbols * np.log2(symbols / symbols.sum())).sum() / text_bytes)


def why_early_stopped(config: RunConfig[Any], step: int, metrics: dict[str, float], limit: float) -> str | None:
    """Return why a trial with these validation metrics at ``step`` is stopped early; ``None`` if it continues.

    A trial is stopped if it is not 5% better than ``limit``, the ``unigram_bits`` of its corpus, after 1/8 of its steps
    (at least 200). During KL annealing, and for the same number of steps after it, only the reconstruction is
    compared: a code that costs nothing yet may be as large as it likes, and takes a while to become cheap. After that
    the negative ELBO is compared. A trial whose metrics are not finite has diverged: the loop itself ends it, however
    early.
    """
    patience = max(FEWEST_STEPS, math.ceil(config.steps / PATIENCE))
    if step < patience:
        return None
    bits, name = metrics["bits_per_byte"], "negative ELBO"
    if step < annealing_end(config.objective, config.steps) + patience:
        bits, name = bits * metrics["reconstruction"] / metrics["bound"], "reconstruction"
    if bits <= MARGIN * limit:
        return None
    return (
        f"early-stopped at step {step}: its {name} of {bits:.3f} bits per byte is not 5% better than the {limit:.3f} "
        "of a model that knows only the byte frequencies"
    )
