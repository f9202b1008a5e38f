"""Reporters: where the training loop sends its metrics, and the progress line of the terminal."""

from __future__ import annotations

import time
from typing import Any, Protocol

from raytrain.config.schema import RunConfig
from raytrain.utils.text import duration


class Reporter(Protocol):
    """Receiver of the training loop's metrics."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of one step; called on rank 0 only."""

    def pending(self) -> list[Any]:
        """Return the records that were logged but have not arrived yet, as JSON; a checkpoint keeps them."""

    def replay(self, records: list[Any]) -> None:
        """Take the records from a checkpoint; called on rank 0 only, after a resume and before the first ``log``."""

    def resumed(self, evaluations: list[dict[str, float]]) -> None:
        """Take the evaluations that a checkpoint has, oldest first, each with its ``step``; called on every rank.

        The last of them may have been lost: its receiver died, or this run did before reporting it.
        """

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Take the validation metrics of a step; called on every rank."""

    def preemption_notice(self) -> bool:
        """Return whether this worker's machine is about to be taken away; called on every rank every 2 s."""


class PrintReporter:
    """Prints a progress line for every record."""

    def __init__(self, config: RunConfig[Any]) -> None:
        self.progress = Progress(config.steps)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        print(self.progress.line(step, metrics), flush=True)

    def pending(self) -> list[Any]:
        return []

    def replay(self, records: list[Any]) -> None:
        """Do nothing: nothing is ever pending."""

    def resumed(self, evaluations: list[dict[str, float]]) -> None:
        """Do nothing: the progress lines have shown them."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Do nothing: the progress line has the metrics."""

    def preemption_notice(self) -> bool:
        return False  # outside a Ray cluster no one gives notice


class Progress:
    """Formatter of progress lines: step, bits per byte, KL, bytes per second and the time left."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.first: tuple[int, float] | None = None

    def line(self, step: int, metrics: dict[str, float]) -> str:
        """Return the line for the metrics of ``step``; parts without a metric are left out."""
        now = time.monotonic()
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}"]
        for name, label, form in (
            ("train/bits_per_byte", "bits/byte", "{:.3f}"),
            ("train/kl", "KL", "{:.2f}"),
            ("valid/bits_per_byte", "valid bits/byte", "{:.3f}"),
            ("valid/kl", "valid KL", "{:.2f}"),
            ("train/bytes_per_second", "bytes/s", "{:,.0f}"),
        ):
            if name in metrics:
                parts.append(f"{label} {form.format(metrics[name])}")
        if self.first is not None and step > self.first[0]:
            seconds = (self.steps - step) * (now - self.first[1]) / (step - self.first[0])
            parts.append(f"left {duration(seconds)}")
        else:
            self.first = (step, now)
        return " | ".join(parts)
