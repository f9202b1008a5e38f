"""Numbers that are not finite: a step that has them is skipped, and a run that has little else is ended."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_IN_ROW = 5
"""A run ends where so many steps in a row were skipped: one bad batch comes alone, a diverged run does not recover."""
_ADVICE = "try a lower --optimizer.learning-rate or --optimizer.clip 1"


class DivergedError(FloatingPointError):
    """The numbers of a run are no longer finite; raised at the same step on all workers."""

    def __init__(self, message: str, last_good: int | None = None) -> None:
        super().__init__(message)
        self.last_good = last_good
        """Step of the newest checkpoint, all of which are finite; ``None`` where there is none."""


class SkippedSteps:
    """Counts the steps that a run has skipped.

    The counters are on the device and belong to the run's state. Nothing but ``counts`` and ``check`` waits for the
    device.
    """

    def __init__(self, device: torch.device) -> None:
        self.counters = torch.zeros(3, device=device)
        """How many in all, how many in a row up to now, and the most in a row."""

    def count(self, good: Tensor) -> Tensor:
        """Count a step; ``good`` is a bool without dimensions. Returns 1 for a step to be skipped, else 0, float32."""
        skipped = good.logical_not().float()
        total, row, longest = self.counters.unbind()
        total.add_(skipped)
        row.add_(1).mul_(skipped)
        torch.maximum(longest, row, out=longest)
        return skipped

    def counts(self) -> list[int]:
        """The counters, as JSON."""
        return [int(value) for value in self.counters.tolist()]

    def load(self, counts: list[int]) -> None:
        """Go on from what ``counts`` gave."""
        self.counters.copy_(torch.tensor(counts))

    def check(self, step: int) -> int:
        """The number of skipped steps up to ``step``.

        Raises:
            DivergedError: there were ``MOST_IN_ROW`` in a row.
        """
        total, _, longest = self.counts()
        if longest >= MOST_IN_ROW:
            raise DivergedError(
                f"{longest} steps in a row had a loss or gradients not finite at step {step}: {_ADVICE}"
            )
        return total


def check_finite(what: str, metrics: dict[str, float], step: int) -> None:
    """End a run that has diverged.

    Raises:
        DivergedError: a figure is not finite.
    """
    if not all(math.isfinite(value) for value in metrics.values()):
        raise DivergedError(f"the {what} not finite at step {step}: {_ADVICE}")
