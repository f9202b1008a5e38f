"""What is minimised: reconstruction, an annealed KL term and the auxiliary loss; and the bound that is reported."""

from __future__ import annotations

import math
from typing import Any

from raytrain.config.schema import ObjectiveConfig, RunConfig


def kl_weight(config: ObjectiveConfig, step: int, steps: int) -> float:
    """Weight of the KL term at ``step`` of ``steps``, in [0, config.weight].

    ``linear`` rises evenly from start to end; ``sigmoid`` is Bowman et al.'s (2016) tanh over the same
    stretch; ``cyclical`` (Fu et al. 2019) rises over the first half of each cycle and rests at the top
    over the second; all stay at ``config.weight`` after the end.
    """
    start, end = config.start * steps, config.end * steps
    if config.annealing == "constant" or step >= end:
        return config.weight
    if step <= start:
        return 0.0
    progress = (step - start) / (end - start)
    if config.annealing == "sigmoid":
        # 3.5 widths to either side, as in Bowman's (tanh((step - 3500) / 1000) + 1) / 2
        progress = (math.tanh(7 * progress - 3.5) + 1) / 2
    elif config.annealing == "cyclical":
        progress = min(1.0, 2 * (progress * config.cycles % 1.0))
    return config.weight * progress


def annealing_end(config: ObjectiveConfig, steps: int) -> int:
    """The first step at which the KL weight has its final value for good; 0 for a constant weight."""
    return 0 if config.annealing == "constant" else math.ceil(config.end * steps)


def learning_rate(config: RunConfig[Any], step: int) -> float:
    """The paper's decay, with a hundredth of the steps for an epoch: x decay at each after decay_start."""
    optimizer = config.optimizer
    # the small number keeps a step that is a whole hundredth from being rounded down
    hundredths = math.floor(100 * (step / config.steps - optimizer.decay_start) + 1e-9)
    return optimizer.learning_rate * optimizer.decay ** max(0, hundredths)
