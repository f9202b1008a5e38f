"""What the step logs of a campaign's processes say: how far a run is, what it did twice, when it stood still."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_RECORD = struct.Struct("<dq")


@dataclass(frozen=True)
class Step:
    """One step that rank 0 of a worker group has done."""

    at: float
    """Unix time."""
    run: str
    """Whose: of a search each trial is one."""
    number: int
    trainer: str
    """Which of the processes, and there which attempt, has done it."""


def read_steps(folder: Path) -> list[Step]:
    """All steps that were written down under ``folder``, by time."""
    steps = []
    for file in folder.glob("*.steps"):
        run, _, trainer = file.stem.partition("-")
        data = file.read_bytes()
        whole = len(data) - len(data) % _RECORD.size
        steps += [Step(at, run, number, trainer) for at, number in _RECORD.iter_unpack(data[:whole])]
    return sorted(steps, key=lambda step: (step.at, step.number))


def progress(steps: Iterable[Step]) -> int:
    """How many different steps were done."""
    return len({(step.run, step.number) for step in steps})


@dataclass(frozen=True)
class Toll:
    """What a stretch of time has cost."""

    repeated: int
    """Steps that had been done before."""
    stood_s: float
    """The longest time in which no new step was done."""


def toll(steps: list[Step], begin: float, end: float) -> Toll:
    """What the time from ``begin`` to ``end`` has cost."""
    reached: dict[str, int] = defaultdict(int)
    repeated, stood, last = 0, 0.0, begin
    for step in steps:
        if step.at > end:
            break
        new = step.number > reached[step.run]
        reached[step.run] = max(reached[step.run], step.number)
        if step.at < begin:
            continue
        if new:
            stood, last = max(stood, step.at - last), step.at
        else:
            repeated += 1
    return Toll(repeated, max(stood, 0.0 if last > begin else end - begin))
