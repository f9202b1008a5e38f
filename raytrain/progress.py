"""The progress line of a run."""

from __future__ import annotations

import time


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


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
