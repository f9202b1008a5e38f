"""Divergence: a step whose numbers are not finite is skipped; a run with too many such steps in a row is ended."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_IN_ROW = 5
"""Skipped steps in a row that end a run: bad batches come singly, a diverged run does not recover."""
_ADVICE = "try a lower --optimizer.learning-rate or --optimizer.clip 1"


class DivergedError(FloatingPointError):
    """A run's numbers are no longer finite; raised at the same step on all workers."""

    def __init__(self, message: str, last_good: int | None = None) -> None:
        super().__init__(message)
        self.last_good = last_good
        """Step of the newest checkpoint (every checkpoint is finite); ``None`` if there is none."""


class SkippedSteps:
    """Counts the steps that a run has skipped.

    The counters live on the device and belong to the run's state. Only ``counts`` and ``check`` wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.counters = torch.zeros(3, device=device)
        """Skipped steps in total, skipped steps in a row up to now, and the longest such row."""

    def count(self, good: Tensor) -> Tensor:
        """Count a step; return 1.0 if it must be skipped, else 0.0, as a float32 scalar.

        ``good`` is a scalar bool: whether all numbers of the step are finite.
        """
        skipped = good.logical_not().float()
        total, row, longest = self.counters.unbind()
        total.add_(skipped)
        row.add_(1).mul_(skipped)
        torch.maximum(longest, row, out=longest)
        return skipped

    def counts(self) -> list[int]:
        """Return the counters as JSON."""
        return [int(value) for value in self.counters.tolist()]

    def load(self, counts: list[int]) -> None:
        """Continue from what ``counts`` returned."""
        self.counters.copy_(torch.tensor(counts))

    def check(self, step: int) -> int:
        """Return the number of skipped steps up to ``step``.

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
        DivergedError: a metric is not finite.
    """
    if not all(math.isfinite(value) for value in metrics.values()):
        raise DivergedError(f"the {what} not finite at step {step}: {_ADVICE}")
