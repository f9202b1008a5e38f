"""Step inputs: what a training step computes with on its device, beside the state of the trainer."""

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
    """What the schedules of a config say for a step: numbers, or tensors without dimensions of a recorded step."""

    learning_rate: float | Tensor
    kl_weight: float | Tensor
    alpha: float | Tensor
    average_share: float | Tensor
    """Part of the way that an average of the weights takes to the weights."""


@dataclass(frozen=True)
class StepInputs:
    """Inputs of one step."""

    tokens: Tensor
    """[samples, length]: see ``Batch``."""
    previous: Tensor | None
    """[samples], of a stream only: see ``Batch``."""
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
    """Return the schedule for ``step``; on GPUs its numbers are those of float32, which recorded steps have."""
    values = scheduled(config, step)
    return Schedule(*(torch.tensor(values).tolist() if device.type == "cuda" else values))
