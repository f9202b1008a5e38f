"""Recorder of trials: why they died, and that a driver that another has followed says nothing more of the search."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytrain.data.corpus import Corpus
from raytrain.runs.trials import TrialStore
from raytrain.search import runner
from raytrain.search.recorder import SearchStopper, TrialRecorder
from raytrain.search.searcher import OptunaSearcher
from raytrain.storage.lease import LeaseLostError, take
from raytrain.tracking.outbox import Outbox
from tests.unit.search.test_search_objective import a_plan, figures, searcher


@pytest.fixture
def overtaken(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OptunaSearcher:
    """A search with a trial at work that another driver has just taken over, and an MLflow that must not be touched."""
    monkeypatch.setattr(Outbox, "put", lambda *_: pytest.fail("it tells MLflow of a run"))
    found = searcher(a_plan(), corpus, tmp_path)
    assert isinstance(found.suggest("0"), dict)
    TrialRecorder(found, lambda trial: None, Outbox(found.search.parent.uri)).on_trial_start(
        0, [], SimpleNamespace(trial_id="0")
    )
    found.records.close()
    take(found.search.workspace.storage.child("s"), found.search.lease.fence.number, "s").release()
    return found


def test_its_trials_are_left_to_the_driver_that_has_them_now(overtaken: OptunaSearcher) -> None:
    overtaken.records = TrialStore(overtaken.search.location)
    recorder = TrialRecorder(overtaken, lambda trial: None, Outbox(overtaken.search.parent.uri))
    trial = SimpleNamespace(trial_id="0", error_file=None)
    recorder.on_trial_result(0, [], trial, {"step": 10, **figures(2.0)})
    with pytest.raises(LeaseLostError, match="was taken over by user"):
        recorder.on_trial_complete(0, [], trial)
    with pytest.raises(LeaseLostError):
        recorder.on_trial_error(0, [], trial)
    with pytest.raises(LeaseLostError):
        recorder.close()
    with pytest.raises(LeaseLostError):
        SearchStopper(recorder, None).stop_all()
    with pytest.raises(LeaseLostError):
        overtaken.suggest("1")
    with pytest.raises(LeaseLostError):
        overtaken.records.close()
    (record,) = TrialStore(overtaken.search.location).read()
    assert (record.status, record.step) == ("running", 0)


@pytest.mark.parametrize("error", [RuntimeError("a worker was refused"), KeyboardInterrupt(), None])
def test_its_own_run_is_left_too(
    overtaken: OptunaSearcher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException | None,
) -> None:
    def run_search(*_: Any) -> list[Any]:
        if error is not None:
            raise error
        return []

    monkeypatch.setattr(runner, "run_search", run_search)
    monkeypatch.setattr(runner, "finish", lambda *_: pytest.fail("it registers a model"))
    with pytest.raises(LeaseLostError):
        runner.run_and_finish(overtaken.search)
    assert "resume with" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "Failure # 1 (occurred at noon)\nray::run_alone()\n  File x\nValueError: steps is 0\n",
            "ValueError: steps is 0",
        ),
        (
            "Failure # 1 (occurred at noon)\nThe actor died.\nFailure # 2 (occurred at one)\n"
            "1 worker(s) were killed due to the node running low on memory\nOOM kill reason: Memory usage exceeded\n"
            "- bytes: 0\nRefer to the documentation: https://docs.ray.io\n",
            "1 worker(s) were killed due to the node running low on memory",
        ),
        ("killed", "killed"),
        ("", "the trial ended with an error, of which Ray kept no message"),
    ],
)
def test_a_trial_that_died_says_of_what(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cause: str
) -> None:
    """Not by the last line in any case: Ray ends what it says of a process that has died with advice."""
    monkeypatch.setattr(Outbox, "put", lambda *_: None)
    found = searcher(a_plan(), corpus, tmp_path)
    assert isinstance(found.suggest("0"), dict)
    file = tmp_path / "error.txt"
    file.write_text(text)
    recorder = TrialRecorder(found, lambda trial: None, Outbox(found.search.parent.uri))
    recorder.on_trial_error(0, [], SimpleNamespace(trial_id="0", error_file=str(file)))
    assert (found.trials[0].status, found.trials[0].reason) == ("failed", cause)
