"""The optimiser of a run, and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from raytrain.config import RunConfig


def learning_rate(config: RunConfig[Any], step: int) -> float:
    """The paper's decay, with a hundredth of the steps for an epoch: x decay at each after decay_start."""
    optimizer = config.optimizer
    # the small number keeps a step that is a whole hundredth from being rounded down
    hundredths = math.floor(100 * (step / config.steps - optimizer.decay_start) + 1e-9)
    return optimizer.learning_rate * optimizer.decay ** max(0, hundredths)


def build_optimizer(model: nn.Module, config: RunConfig[Any]) -> torch.optim.Adam:
    """Adam whose moments exist from the start, so that a checkpoint can be loaded into them."""
    settings = config.optimizer
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
