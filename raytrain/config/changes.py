"""Changes of a config during its run: schedules that a search has found step by step, not shapes written by hand."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain.config.models import require

CHANGEABLE = (
    "optimizer.learning_rate",
    "objective.weight",
    "objective.rate",
    "objective.free_bits",
    "objective.alpha",
    "objective.input_dropout",
)
"""Fields that may change during a run: none of them decides what its tensors are, or what is read and evaluated."""


@dataclass(frozen=True)
class Change:
    """A new value of one field from a given step on."""

    step: int
    """Optimiser steps that are taken before."""
    field: str
    """Dotted name: one of ``CHANGEABLE``."""
    value: float

    def __post_init__(self) -> None:
        known = ", ".join(CHANGEABLE)
        require(self.field in CHANGEABLE, "changes.field", self.field, f"what may change during a run is {known}")
        require(self.step > 0, "changes.step", self.step, "must be positive")
