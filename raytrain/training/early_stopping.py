"""Early stopping against a baseline: a trial ends if half of its steps have not brought it near a byte 3-gram."""

from __future__ import annotations

import math
from typing import Any

from raytrain.config.schedules import annealing_end
from raytrain.config.schema import RunConfig
from raytrain.models.ladder import BASELINE_ORDER

JUDGED = 1 / 2
"""A trial is not judged before this share of its steps ..."""
FEWEST_STEPS = 200
"""... nor before this many steps: a shorter run has had no time to learn."""
MARGIN = 1.1
"""A trial is stopped above this multiple of the baseline."""
PATIENCE = 1 / 8
"""Share of its steps that a trial gets after annealing for its code to become cheap."""


class EarlyStoppedError(Exception):
    """A trial ended by the baseline rule; the message says why."""


def why_early_stopped(config: RunConfig[Any], step: int, metrics: dict[str, float], baseline: float) -> str | None:
    """Return why a trial with these validation metrics at ``step`` is stopped early; ``None`` if it continues.

    A trial is stopped if it is more than 10% above ``baseline``, the bits per byte of a 3-gram (order 2) on the same
    samples, once half of its steps (at least 200) are done. At its last step there is nothing left to save.

    Why half and 10%: the slowest points of the shipped search spaces (lowest learning rate, smallest width, most
    dropout, late annealing) are up to 7% above the baseline at half of 512 steps of the laptop's models, and still
    learning. Without a margin, slow starters would be stopped; earlier in training they are further above. But from
    half on a trial gains little, 3 to 14%, since its learning rate has fallen to a third. A model that has learnt
    nothing is far above: a 2-gram by 22% or more, the byte frequencies by 56% or more (Penn Treebank, tweets and the
    synthetic text: docs/develop/log.md).

    During KL annealing, and for 1/8 of the steps after it (at least 200), only the reconstruction is compared. While
    the code costs nothing it may be arbitrarily large, and it takes a while to become cheap. After that the negative
    ELBO is compared.

    Where the code costs nothing at any step, as in the autoencoders of the paper's figure 3, the trial is no language
    model and nothing is compared. A trial whose metrics are not finite has diverged: the loop itself ends it, however
    early.
    """
    if not max(FEWEST_STEPS, JUDGED * config.steps) <= step < config.steps:
        return None
    objective = config.objective
    if config.has_latent and objective.weight == objective.target_kl == objective.rate == 0:
        return None
    bits, name = metrics["bits_per_byte"], "negative ELBO"
    patience = max(FEWEST_STEPS, math.ceil(PATIENCE * config.steps))
    if step < annealing_end(config.objective, config.steps) + patience:
        bits, name = bits * metrics["reconstruction"] / metrics["bound"], "reconstruction"
    if bits <= MARGIN * baseline:
        return None
    return (
        f"early-stopped at step {step} of {config.steps}: its {name} of {bits:.3f} bits per byte is more than "
        f"{MARGIN - 1:.0%} above the {baseline:.3f} of a byte {BASELINE_ORDER + 1}-gram"
    )
