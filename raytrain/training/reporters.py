"""What one worker does: the training loop, top to bottom.

The same code runs under Ray Train, torchrun and one process; it needs torch, NumPy and safetensors
only. Without Ray:

    torchrun --nproc-per-node 2 -m raytrain.loop config.json --corpus CORPUS --storage FOLDER
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from raytrain.config.schema import RunConfig
from raytrain.utils.text import duration


class Reporter(Protocol):
    """Where the loop's metrics go."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of one step; called on rank 0 only."""

    def pending(self) -> list[Any]:
        """What was logged and has not arrived, as JSON; a checkpoint keeps it."""

    def replay(self, records: list[Any]) -> None:
        """After a resume, before the first ``log``: what the checkpoint kept; called on rank 0 only."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The validation metrics of a step; called on every rank."""

    def notice(self) -> bool:
        """Whether this worker's machine is about to be taken away; called on every rank about every two seconds."""


# ------------------------------------------------------------------------------------- without Ray


class PrintReporter:
    """Prints a progress line for every record."""

    def __init__(self, config: RunConfig[Any]) -> None:
        self.progress = Progress(config.steps)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        print(self.progress.line(step, metrics), flush=True)

    def pending(self) -> list[Any]:
        return []

    def replay(self, records: list[Any]) -> None:
        """Nothing is ever pending."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The progress line has said it."""

    def notice(self) -> bool:
        return False  # nobody gives any


class Progress:
    """Formats step, bits per byte, KL, bytes per second and the time left."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.first: tuple[int, float] | None = None

    def line(self, step: int, metrics: dict[str, float]) -> str:
        """The line for the record of ``step``; parts that it does not hold are left out."""
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
