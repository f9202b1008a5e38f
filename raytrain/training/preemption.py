"""Preemption: when a machine under a run is about to be taken away, all workers leave at the same step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from raytrain.training.trainer import World

INTERVAL_S = 2.0
"""Seconds of training between two rounds; EC2 gives notice 120 s before it takes a machine."""


class PreemptedError(Exception):
    """A machine under the run is about to be taken away. A checkpoint has every step, to resume from elsewhere."""


class Rounds:
    """The steps at which all workers ask each other whether one of them has a preemption notice.

    Steps between two rounds cost nothing. A round is one reduction of two integers: whether any rank has notice, and
    the number of steps to the next round, by rank 0's clock.
    """

    def __init__(self, world: World, step: int) -> None:
        """Begin after ``step``, the last step that was done; the first round comes after the next step."""
        self._world = world
        self._span = 1
        self._next = step + 1
        self._began = time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether the workers ask after ``step``; the same on every rank."""
        return step >= self._next

    def ask(self, step: int, notice: bool) -> bool:
        """Return whether any rank has ``notice``; called on every rank after a step that is ``due``."""
        seconds = max(time.monotonic() - self._began, 1e-6)
        # at most twice as many steps as before: the time of a step is not yet known, or has changed
        span = max(1, min(2 * self._span, int(self._span * INTERVAL_S / seconds)))
        answers = torch.tensor([int(notice), span if self._world.rank == 0 else 0], device=self._world.device)
        if self._world.size > 1:
            dist.all_reduce(answers, dist.ReduceOp.MAX)
        leave, self._span = (int(answer) for answer in answers.tolist())
        self._next = step + self._span
        self._began = time.monotonic()
        return leave > 0
