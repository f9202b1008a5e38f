"""Coordinator between a worker group and its driver: jobs go one way, evaluations and their answers the other."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Coordinator:
    """A Ray actor beside the driver, which lives as long as its worker group. It imports nothing, so it starts fast."""

    def __init__(self) -> None:
        self._jobs: list[dict[str, Any] | None] = []
        self._events: deque[dict[str, Any] | None] = deque()
        self._answers: dict[tuple[int, int], bool] = {}
        self._num_ended = 0
        self._changed = asyncio.Condition()

    # --------------------------------------------------------------------------------- the driver's side

    async def give(self, job: dict[str, Any] | None) -> int:
        """Publish the next job, ``None`` if there are no more; return its number."""
        async with self._changed:
            self._jobs.append(job)
            self._num_ended = 0
            self._answers.clear()
            self._changed.notify_all()
        return len(self._jobs) - 1

    async def event(self) -> dict[str, Any] | None:
        """Return the job's next evaluation, which waits for an answer; ``None`` once every worker has ended the job."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._events)
            return self._events.popleft()

    async def answer(self, number: int, step: int, proceed: bool) -> None:
        """Answer an evaluation: whether the job continues after ``step``."""
        async with self._changed:
            self._answers[number, step] = proceed
            self._changed.notify_all()

    # -------------------------------------------------------------------------------- the workers' side

    async def begin(self) -> int:
        """Register a worker; return the number of its first job: the last one published.

        If Ray Train restarts an elastic worker group with another size, that job has already begun.
        """
        async with self._changed:
            self._num_ended = 0
            await self._changed.wait_for(lambda: self._jobs)
        return len(self._jobs) - 1

    async def job(self, number: int) -> dict[str, Any] | None:
        """Wait for a job and return it; ``None`` if there are no more."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._jobs) > number)
        return self._jobs[number]

    async def evaluated(self, number: int, rank: int, metrics: dict[str, Any]) -> bool:
        """Hand in an evaluation, on every rank; return whether the job continues, the same on all ranks."""
        key = number, int(metrics["step"])
        async with self._changed:
            if rank == 0:
                self._events.append(metrics)
                self._changed.notify_all()
            await self._changed.wait_for(lambda: key in self._answers)
        return self._answers[key]

    async def ended(self, workers: int) -> None:
        """Note that one of ``workers`` workers has ended the job."""
        async with self._changed:
            self._num_ended += 1
            if self._num_ended == workers:
                self._events.append(None)
                self._changed.notify_all()
