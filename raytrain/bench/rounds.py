"""Rounds of a benchmark: contenders take turns, A B A B, so that the machine's noise affects all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; the last is used for more."""


@dataclass(frozen=True)
class Series:
    """A measured quantity, with a value for each round."""

    values: list[float]

    @property
    def median(self) -> float:
        """Median of the values."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Range of the values, as a share of the median."""
        return (max(self.values) - min(self.values)) / self.median

    def json(self) -> dict[str, Any]:
        """Return median, range and all values."""
        return {"median": self.median, "min": min(self.values), "max": max(self.values), "values": self.values}


@dataclass(frozen=True)
class Contender:
    """Something whose speed is measured."""

    name: str
    block: Callable[[int], dict[str, float]]
    """Measures in round 0, 1, ...; returns its quantities by name."""


Measured = dict[str, dict[str, Series]]
"""Contender -> quantity -> its values, one per round."""


def take_turns(contenders: Sequence[Contender], rounds: int, show: Callable[[str], None]) -> Measured:
    """Let every contender run one block in each round; ``show`` is called with the progress as text."""
    blocks: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        began = time.perf_counter()
        for contender in contenders:
            blocks[contender.name].append(contender.block(number))
        show(f"round {number + 1} of {rounds}: {time.perf_counter() - began:.1f} s")
    return {
        name: {key: Series([values[key] for values in taken]) for key in taken[0]} for name, taken in blocks.items()
    }


def ratio(over: Series, under: Series) -> Series:
    """Return the ratio of two quantities in each round."""
    return Series([a / b for a, b in zip(over.values, under.values, strict=True)])


def confidence(ratios: Series) -> tuple[float, float] | None:
    """Return the 95% confidence interval of the mean ratio (of its log, by Student's t); ``None`` for one round."""
    logs = [math.log(value) for value in ratios.values]
    if len(logs) < 2:
        return None
    half = STUDENT[min(len(logs) - 1, len(STUDENT)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    middle = statistics.fmean(logs)
    return math.exp(middle - half), math.exp(middle + half)


def synchronise(device: torch.device) -> None:
    """Wait until ``device`` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeat(body: Callable[[int], object], seconds: float, device: torch.device) -> tuple[int, float]:
    """Call ``body(0)``, ``body(1)``, ... for about ``seconds``; return the number of timed calls, and their time.

    The host waits for the device after a growing number of calls, not after each: the wait would be part of their time.
    """
    first, calls = 0, 1
    while True:
        synchronise(device)
        began = time.perf_counter()
        for number in range(first, first + calls):
            body(number)
        synchronise(device)
        passed = time.perf_counter() - began
        if passed >= seconds / 2:
            return calls, passed
        first += calls
        calls = min(8 * calls, math.ceil(calls * seconds / passed))
