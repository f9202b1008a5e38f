"""The training loop, timed from inside: its steps, and the calls of its reporter."""

from __future__ import annotations

import time
from typing import Any

from raytrain.config.schema import RunConfig, override
from raytrain.data.corpus import Corpus
from raytrain.storage.base import Storage
from raytrain.training.loop import train
from raytrain.training.reporters import Reporter
from raytrain.training.trainer import World

RECORDS = 10
"""Number of metric records in a timed run."""


class TimedReporter:
    """Passes every call on to another reporter and times it."""

    def __init__(self, report: Reporter) -> None:
        self.report = report
        self.moments: list[float] = []
        """Time of each record."""
        self.logging: list[float] = []
        """Seconds of each call of ``log``."""
        self.evaluating: list[float] = []
        """Seconds of each call of ``evaluated``."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.moments.append(time.perf_counter())
        self.report.log(step, metrics)
        self.logging.append(time.perf_counter() - self.moments[-1])

    def pending(self) -> list[Any]:
        return self.report.pending()

    def replay(self, records: list[Any]) -> None:
        self.report.replay(records)

    def resumed(self, evaluations: list[dict[str, float]]) -> None:
        self.report.resumed(evaluations)

    def preemption_notice(self) -> bool:
        return self.report.preemption_notice()

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        began = time.perf_counter()
        self.report.evaluated(step, metrics)
        self.evaluating.append(time.perf_counter() - began)


def timed_train(
    config: RunConfig[Any], corpus: Corpus, world: World, storage: Storage, report: Reporter
) -> dict[str, float]:
    """Run the loop; return the times of rank 0, and an empty dict on the other ranks.

    ``seconds`` is the mean time of a step from the first record to the last but one, since an evaluation comes before
    the last. ``config`` makes ``RECORDS`` records.
    """
    timed = TimedReporter(report)
    train(config, corpus, world, storage, timed)
    if world.rank != 0:
        return {}
    steps = (len(timed.moments) - 2) * config.log_every
    return {
        "seconds": (timed.moments[-2] - timed.moments[0]) / steps,
        "log": sum(timed.logging) / len(timed.logging),
        "evaluated": sum(timed.evaluating) / len(timed.evaluating),
    }


def timed_config(config: RunConfig[Any], steps: int) -> RunConfig[Any]:
    """Return ``config`` for a run of about ``steps`` steps with ``RECORDS`` records and one evaluation, at its end."""
    every = max(1, steps // RECORDS)
    total = RECORDS * every
    return override(
        config,
        {
            "steps": total,
            "log_every": every,
            "evaluate_every": total,
            "checkpoint_every": total,
            "evaluate_samples": min(config.evaluate_samples, config.group_size),
        },
    )
