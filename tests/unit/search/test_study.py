"""The study beside a search: what Optuna reads of it is what the records say, whatever has happened to the file."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from raytrain.data.corpus import Corpus
from raytrain.metrics import RUNG, SearchObjective
from raytrain.runs.records import STUDY
from raytrain.runs.trials import Trial, TrialStore
from raytrain.search import study as study_file
from raytrain.search.plan import Plan
from raytrain.search.recorder import TrialRecorder
from raytrain.search.searcher import OptunaSearcher
from raytrain.search.space import read_space
from raytrain.search.study import StudyFile, cut_partial_line
from raytrain.storage.base import Storage
from raytrain.storage.lease import Fence, take
from raytrain.storage.local import FolderStorage
from raytrain.tracking.outbox import Outbox
from tests.support.stored_study import check_agreement, opened
from tests.unit.search.test_search_objective import OUT, a_plan, figures, searcher
from tests.unit.search.test_searcher import RAISES


class Unsent(Outbox):
    """Sends nothing to MLflow."""

    def put(self, record: dict[str, Any]) -> None:
        """Drop it."""


class Driven:
    """A search with its study: the driver's own parts, on evaluations that no model was trained for."""

    def __init__(self, plan: Plan, corpus: Corpus, folder: Path, location: Storage | None = None) -> None:
        self.found: OptunaSearcher = searcher(plan, corpus, folder)
        self.location = location or self.found.search.location
        fence = self.found.search.lease.fence
        self.study = StudyFile("s", plan, self.location, fence)
        self.found.records = TrialStore(self.found.search.location, self.study.keep)
        self.study.begin(self.found.trials)
        self.recorder = TrialRecorder(self.found, lambda trial: None, Unsent("sqlite:///nowhere"))

    def start(self, trial_id: str) -> Trial:
        values = self.found.suggest(trial_id)
        assert isinstance(values, dict)
        self.recorder.on_trial_start(0, [], SimpleNamespace(trial_id=trial_id))
        return self.found.trial(trial_id)

    def report(self, trial_id: str, step: int, metrics: dict[str, float]) -> None:
        result = {"step": step, RUNG: step, **metrics}
        self.recorder.on_trial_result(0, [], SimpleNamespace(trial_id=trial_id), result)

    def stop(self, trial_id: str) -> None:
        self.recorder.on_trial_complete(0, [], SimpleNamespace(trial_id=trial_id))

    def end(self) -> None:
        self.recorder.close()
        self.study.close()
        self.found.records.close()

    def agrees(self) -> optuna.Study:
        """The study, which is what the records say."""
        study = opened(Path(self.location.uri(STUDY)))
        check_agreement(study, TrialStore(self.found.search.location).read(), self.found.search.plan.search_objective)
        return study


@pytest.mark.parametrize(
    "changes", [{}, {"min_used": 1.8}, {"objective": "pareto", "min_used": 1.0}, {"warm_starts": (OUT,)}]
)
def test_the_study_says_what_the_records_say(changes: dict[str, Any], corpus: Corpus, tmp_path: Path) -> None:
    search = Driven(a_plan(**changes), corpus, tmp_path)
    for number, kl in enumerate((3.0, 0.01, 2.0)):
        search.start(str(number))
        for step in (10, 20):
            search.report(str(number), step, figures(3.0 - step / 20 + kl / 10, kl))
    search.stop("0")
    search.stop("1")
    search.start("3")
    search.report("3", 10, figures(2.5, 2.0))
    search.recorder.on_trial_error(0, [], SimpleNamespace(trial_id="3", error_file=None))
    search.start("4")
    search.study.close()
    search.found.records.close()
    study = search.agrees()
    states = [point.state for point in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL, TrialState.RUNNING]
    assert study.study_name == "s"
    assert study.metric_names == (["bits_per_byte", "used"] if "objective" in changes else ["bits_per_byte"])


def test_a_running_search_is_seen_while_it_runs(corpus: Corpus, tmp_path: Path) -> None:
    search = Driven(a_plan(), corpus, tmp_path)
    search.start("0")
    search.report("0", 10, figures(2.5))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        path = Path(search.location.uri(STUDY))
        if path.exists() and [point.intermediate_values for point in opened(path).trials] == [{10: 2.5}]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the study does not show the report")
    search.end()
    search.agrees()


def test_points_that_optuna_cannot_hold_have_no_parameters(corpus: Corpus, tmp_path: Path) -> None:
    space = read_space("mine", RAISES.format(body="trial.suggest_categorical('x', [(1, 2), (3, 4)])"))
    search = Driven(a_plan(space=space), corpus, tmp_path)
    for number in range(3):
        search.start(str(number))
    search.stop("1")
    search.end()
    points = opened(Path(search.location.uri(STUDY))).trials
    assert [point.state for point in points] == [TrialState.RUNNING, TrialState.FAIL, TrialState.RUNNING]
    assert (points[1].params, len(points[0].params)) == ({}, 1)
    assert points[1].user_attrs["reason"].startswith("search space mine: 'x' has the choice")


def half_done(corpus: Corpus, folder: Path) -> Driven:
    """A search that was interrupted with one trial that has ended and one that goes on."""
    search = Driven(a_plan(), corpus, folder)
    for number in range(2):
        search.start(str(number))
        search.report(str(number), 10, figures(2.0 + number))
    search.stop("0")
    search.end()
    return search


def test_a_resumed_search_continues_the_file_and_what_a_dashboard_has_added(corpus: Corpus, tmp_path: Path) -> None:
    path = Path(half_done(corpus, tmp_path).location.uri(STUDY))
    before, file = opened(path), path.stat().st_ino
    before.set_user_attr("note", "the user's own")
    before.enqueue_trial({"alpha": 0.5, "annealing": "constant"})  # as a dashboard does
    path.with_name(f"{STUDY}.lock").symlink_to(path)  # of a driver that was killed
    with path.open("ab") as journal:
        journal.write(b'{"op_code":7,"worker_id":"half a li')
    second = Driven(a_plan(), corpus, tmp_path)
    second.start("again")
    second.report("again", 20, figures(1.5))
    second.stop("again")
    second.start("new")
    second.end()
    study = second.agrees()
    assert path.stat().st_ino == file
    assert not path.with_name(f"{STUDY}.lock").is_symlink()
    assert study.user_attrs["note"] == "the user's own"
    assert [point.state for point in study.trials] == [
        TrialState.COMPLETE, TrialState.COMPLETE, TrialState.WAITING, TrialState.RUNNING,
    ]  # fmt: skip


def ends_otherwise(path: Path) -> None:
    (running,) = (point for point in opened(path).trials if point.state == TrialState.RUNNING)
    opened(path).tell(running.number, 0.1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"nothing of Optuna's\n"),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"op_code":4', b'"op_code":77', 1)),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        ends_otherwise,
        lambda path: opened(path)._storage.delete_study(0),
        lambda path: path.write_bytes(path.read_bytes().replace(b"2.0", b"2.9")),
    ],
)
def test_a_file_that_disagrees_is_made_anew(damage: Any, corpus: Corpus, tmp_path: Path) -> None:
    search = half_done(corpus, tmp_path)
    damage(Path(search.location.uri(STUDY)))
    second = Driven(a_plan(), corpus, tmp_path)
    second.start("again")
    second.end()
    assert len(second.agrees().trials) == 2


def test_a_file_that_is_deleted_while_the_search_runs_comes_back(corpus: Corpus, tmp_path: Path) -> None:
    search = half_done(corpus, tmp_path)
    second = Driven(a_plan(), corpus, tmp_path)
    second.start("again")
    second.study._thread.submit(lambda: None).result()
    os.unlink(search.location.uri(STUDY))
    second.report("again", 20, figures(1.5))
    second.end()
    second.agrees()


class Elsewhere(FolderStorage):
    """A store whose objects cannot be appended to, as S3."""

    folder = None  # type: ignore[assignment]


def test_where_nothing_can_be_appended_the_whole_file_is_written(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = Elsewhere(tmp_path / "s")
    search = Driven(a_plan(), corpus, tmp_path, location)
    search.start("0")
    search.study._thread.submit(lambda: None).result()
    written = location.read(STUDY)
    search.report("0", 10, figures(2.0))
    search.study._thread.submit(lambda: None).result()
    assert location.read(STUDY) == written, "it is not written more often than that"
    search.end()
    search.agrees()
    monkeypatch.setattr(study_file, "WHOLE_S", 0.0)
    second = Driven(a_plan(), corpus, tmp_path, location)
    second.start("0")
    second.report("0", 20, figures(1.5))
    second.stop("0")
    second.study._thread.submit(lambda: None).result()
    second.found.records.close()
    second.agrees()


def test_what_fails_is_said_once_and_the_search_goes_on(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_file, "AGAIN_S", 0.0)
    in_the_way = tmp_path / "s" / STUDY
    in_the_way.mkdir(parents=True)
    (in_the_way / "file").touch()
    search = Driven(a_plan(), corpus, tmp_path)
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            search.start(str(number))
            search.report(str(number), 10, figures(2.0))
        search.study._thread.submit(lambda: None).result()
    assert [message.partition(": ")[0] for message in caplog.messages] == [
        f"{in_the_way} is not kept now, the search goes on"
    ]
    (in_the_way / "file").unlink()
    in_the_way.rmdir()
    search.end()
    search.agrees()


def test_a_driver_that_was_followed_writes_no_more_of_the_study(corpus: Corpus, tmp_path: Path) -> None:
    search = half_done(corpus, tmp_path)
    second = Driven(a_plan(), corpus, tmp_path)
    second.study._thread.submit(lambda: None).result()
    content = search.location.read(STUDY)
    take(second.found.search.workspace.storage.child("s"), second.found.search.lease.fence.number, "s").release()
    second.study.keep(replace(second.found.trials[1], status="finished", best=figures(1.0)))
    second.study.close()
    assert search.location.read(STUDY) == content


KILLED = """
import sys
from dataclasses import replace
from raytrain.runs.trials import TrialStore
from raytrain.search.study import StudyFile
from raytrain.storage import open_storage
from raytrain.storage.lease import Fence
from tests.support.stored_study import check_agreement, opened
from tests.unit.search.test_search_objective import a_plan, a_trial, figures

location = open_storage(sys.argv[1])
study = StudyFile("s", a_plan(), location, Fence(location, 1))
records = TrialStore(location, study.keep)
known = records.read()
study.begin(known)
print("begun", flush=True)
for number in range(len(known), 10_000):
    trial = a_trial(number, status="running")
    records.add(trial)
    for step in range(10, 60, 10):
        trial.step, trial.best = step, figures(2.0 + 1 / (number + step))
        trial.history.append({"step": step, "bits_per_byte": trial.best["bits_per_byte"], "kl": 0.0})
        records.update(trial)
    trial.status = "finished"
    records.update(trial)
"""


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_a_study_that_the_next_brings_in_line(tmp_path: Path) -> None:
    """At whatever moment: in the middle of a line, of a lock, or with a record that was not yet written."""
    location = FolderStorage(tmp_path / "s")
    for pause in (0.0, 0.5, 1.5):
        driver = subprocess.Popen([sys.executable, "-c", KILLED, location.uri()], stdout=subprocess.PIPE)
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"begun\n"
        time.sleep(pause)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    trials = TrialStore(location).read()
    assert len(trials) > 4
    study = StudyFile("s", a_plan(), location, Fence(location, 1))
    study.begin(trials)
    study.close()
    check_agreement(opened(Path(location.uri(STUDY))), trials, SearchObjective())


def test_what_a_writer_that_died_has_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a line, a lock, and one that had its other name already; that of a living process stays."""
    journal = tmp_path / "study.journal"
    journal.write_bytes(b'{"a": 1}\n{"b"')
    left = tmp_path / "study.journal.lock1234.rename"
    left.symlink_to(journal)
    cut_partial_line(journal)
    assert journal.read_bytes() == b'{"a": 1}\n'
    assert left.is_symlink()
    monkeypatch.setattr(study_file, "RELEASED_S", -1.0)
    cut_partial_line(journal)
    assert [file.name for file in tmp_path.iterdir()] == ["study.journal"]
