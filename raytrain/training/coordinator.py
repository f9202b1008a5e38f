"""Where a gang of workers and its driver meet: jobs go one way, evaluations and the word to stop the other."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Coordinator:
    """A Ray actor beside the driver. It lives as long as its gang, and imports nothing: it starts in no time."""

    def __init__(self) -> None:
        self._jobs: list[dict[str, Any] | None] = []
        self._events: deque[dict[str, Any] | None] = deque()
        self._answers: dict[tuple[int, int], bool] = {}
        self._num_ended = 0
        self._changed = asyncio.Condition()

    # --------------------------------------------------------------------------------- the driver's side

    async def give(self, job: dict[str, Any] | None) -> int:
        """Lay out the next job, ``None`` if there is no more; returns its number."""
        async with self._changed:
            self._jobs.append(job)
            self._num_ended = 0
            self._answers.clear()
            self._changed.notify_all()
        return len(self._jobs) - 1

    async def event(self) -> dict[str, Any] | None:
        """The next evaluation of the job, which waits for its answer; ``None`` once every worker has ended it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._events)
            return self._events.popleft()

    async def answer(self, number: int, step: int, go_on: bool) -> None:
        """Say whether the job goes on after the evaluation at ``step``."""
        async with self._changed:
            self._answers[number, step] = go_on
            self._changed.notify_all()

    # -------------------------------------------------------------------------------- the workers' side

    async def begin(self) -> int:
        """A worker is there, and does the job of the number that this returns: the last one that was laid out.

        Where Ray Train starts an elastic gang anew in another size, the job has begun before.
        """
        async with self._changed:
            self._num_ended = 0
            await self._changed.wait_for(lambda: self._jobs)
        return len(self._jobs) - 1

    async def job(self, number: int) -> dict[str, Any] | None:
        """Wait for a job; ``None`` if there is none any more."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._jobs) > number)
        return self._jobs[number]

    async def evaluated(self, number: int, rank: int, metrics: dict[str, Any]) -> bool:
        """Hand in an evaluation, on every rank; returns whether the job goes on, the same to all."""
        key = number, int(metrics["step"])
        async with self._changed:
            if rank == 0:
                self._events.append(metrics)
                self._changed.notify_all()
            await self._changed.wait_for(lambda: key in self._answers)
        return self._answers[key]

    async def ended(self, workers: int) -> None:
        """One of so many workers has ended the job."""
        async with self._changed:
            self._num_ended += 1
            if self._num_ended == workers:
                self._events.append(None)
                self._changed.notify_all()
