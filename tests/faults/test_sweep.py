"""A driver that dies at any write or call of MLflow leaves, once resumed, what one leaves that never died."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.faults.sweep import SCENARIOS, differences, new_sweep, run_sweep

SAMPLED = 1
"""Points that the slow suite tries, beside the one that has shown something."""


def test_resumed_after_a_death_at_some_points(ray_cpu: str, tmp_path: Path) -> None:
    """Among them the record of a trial's end, after which nobody told MLflow of it."""
    with new_sweep(tmp_path / "sweep", ray_cpu, "search") as sweep:
        ends = [number for number, point in enumerate(sweep.points, 1) if "mlflow set_terminated" in point]
        for fatal in (ends[0], *random.Random(0).sample(range(1, len(sweep.points) + 1), SAMPLED)):
            statuses, wrong = sweep.at(fatal)
            # the number of points before the first end does not vary much; one of the last may not be reached
            assert statuses == [-signal.SIGKILL, 0] or (statuses == [0] and fatal != ends[0])
            assert wrong == [], sweep.points[fatal - 1]


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_resumed_after_a_death_at_every_point(ray_cpu: str, tmp_path: Path, scenario: str) -> None:
    with new_sweep(tmp_path / "sweep", ray_cpu, scenario) as sweep:
        assert run_sweep(sweep, every=1, first=1) == []


@pytest.mark.parametrize(("dies", "wrong"), [(False, ["no driver was killed"]), (True, [])])
def test_a_sweep_in_which_no_driver_dies_is_no_proof(dies: bool, wrong: list[str]) -> None:
    deaths = {2: [-signal.SIGKILL, 0]} if dies else {}
    sweep = SimpleNamespace(points=["one", "two"], at=lambda fatal: (deaths.get(fatal, [0]), []))
    lines: list[str] = []
    assert run_sweep(sweep, every=1, first=1, log=lines.append) == wrong  # type: ignore[arg-type]
    assert lines[-1] == f"{int(dies)} drivers were killed"


def test_a_difference_is_told_with_the_path_to_it() -> None:
    expected = {"runs": {"0": {"status": "FINISHED", "steps": [10, 20]}}, "models": 1}
    found = {"runs": {"0": {"status": "RUNNING", "steps": [10, 20]}, "1": {}}, "models": 1}
    assert differences(expected, found) == ["/runs/0/status: RUNNING instead of FINISHED", "/runs/1 is there: {}"]
    assert differences(expected, expected) == []
    assert differences({"a": 1}, {}) == ["/a is missing"]
