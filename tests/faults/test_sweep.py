"""A search whose driver dies at any write or call of MLflow ends, once resumed, as one that was never disturbed."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.faults.sweep import differences, disturbed, new_home, state, sweep, undisturbed
from tests.support.mlflow_server import new_store

SAMPLED = 1
"""Points that the slow suite tries, beside the one that has shown something."""


def test_resumed_after_a_death_at_some_points(ray_cpu: str, tmp_path: Path) -> None:
    """Among them the record of a trial's end, after which nobody told MLflow of it."""
    store = Path(new_store(tmp_path).removeprefix("sqlite:///"))
    quiet = new_home(tmp_path / "undisturbed", store)
    points = undisturbed(quiet, ray_cpu)
    ends = [number for number, point in enumerate(points, 1) if "mlflow set_terminated" in point]
    for fatal in (ends[0], *random.Random(0).sample(range(1, len(points) + 1), SAMPLED)):
        home = new_home(tmp_path / f"point-{fatal}", store)
        statuses = disturbed(home, ray_cpu, fatal)
        # the number of points before the first end does not vary much; one of the last may not be reached
        allowed = [[-signal.SIGKILL, 0]] if fatal == ends[0] else [[0], [-signal.SIGKILL, 0]]
        assert statuses in allowed, (home / "output.txt").read_text()[-3000:]
        assert differences(state(quiet), state(home)) == [], points[fatal - 1]


@pytest.mark.long
def test_resumed_after_a_death_at_every_point(ray_cpu: str, tmp_path: Path) -> None:
    assert sweep(tmp_path, ray_cpu, every=1, first=1) == []


@pytest.mark.parametrize(("statuses", "wrong"), [([0], ["no driver was killed"]), ([-signal.SIGKILL, 0], [])])
def test_a_sweep_in_which_no_driver_dies_is_no_proof(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, statuses: list[int], wrong: list[str]
) -> None:
    monkeypatch.setattr("tests.faults.sweep.new_store", lambda folder: f"sqlite:///{folder}/mlflow.db")
    monkeypatch.setattr("tests.faults.sweep.new_home", lambda folder, store: (folder.mkdir(), folder)[1])
    monkeypatch.setattr("tests.faults.sweep.undisturbed", lambda home, cluster: ["one", "two"])
    monkeypatch.setattr("tests.faults.sweep.disturbed", lambda home, cluster, fatal: statuses if fatal == 2 else [0])
    monkeypatch.setattr("tests.faults.sweep.state", lambda home: {})
    lines: list[str] = []
    assert sweep(tmp_path, "", every=1, first=1, log=lines.append) == wrong
    assert lines[-1] == f"{len(statuses) - 1} drivers were killed"


def test_a_difference_is_told_with_the_path_to_it() -> None:
    expected = {"runs": {"0": {"status": "FINISHED", "steps": [10, 20]}}, "models": 1}
    found = {"runs": {"0": {"status": "RUNNING", "steps": [10, 20]}, "1": {}}, "models": 1}
    assert differences(expected, found) == ["/runs/0/status: RUNNING instead of FINISHED", "/runs/1 is there: {}"]
    assert differences(expected, expected) == []
    assert differences({"a": 1}, {}) == ["/a is missing"]
