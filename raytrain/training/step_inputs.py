"""Step inputs: everything that a training step reads on its device, apart from the state of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytrain.config.schedules import auxiliary_weight, average_decay, kl_weight, learning_rate
from raytrain.config.schema import RunConfig
from raytrain.models.noise import Noise


@dataclass(frozen=True)
class Schedule:
    """Values of a config's schedules at a step: numbers, or scalar tensors in a recorded step."""

    learning_rate: float | Tensor
    kl_weight: float | Tensor
    alpha: float | Tensor
    average_share: float | Tensor
    """Share of the distance to the weights by which their moving average moves."""


@dataclass(frozen=True)
class StepInputs:
    """Inputs of one step."""

    tokens: Tensor
    """[samples, length]: see ``Batch``."""
    previous: Tensor | None
    """[samples], only for a stream: see ``Batch``."""
    groups: range
    noise: Noise
    schedule: Schedule


def scheduled(config: RunConfig[Any], step: int) -> list[float]:
    """Return the fields of the ``Schedule`` for ``step``."""
    return [
        learning_rate(config.optimizer, step, config.steps),
        kl_weight(config.objective, step, config.steps),
        auxiliary_weight(config.objective, step, config.steps),
        1 - average_decay(config.optimizer, step),
    ]


def schedule_of(config: RunConfig[Any], step: int, device: torch.device) -> Schedule:
    """Return the schedule for ``step``; on GPUs its numbers are rounded to float32, as in recorded steps."""
    values = scheduled(config, step)
    return Schedule(*(torch.tensor(values).tolist() if device.type == "cuda" else values))
