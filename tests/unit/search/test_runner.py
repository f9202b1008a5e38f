"""Running a search: what ends one trial does not end the others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from raytrain.cluster.ray_internals import ActorManager
from raytrain.data.corpus import Corpus
from raytrain.runs.records import UNSENT
from raytrain.runs.trials import Status, TrialStore, trial_location
from raytrain.search import runner
from raytrain.search.runner import say_ends, survive_lack_of_memory
from raytrain.tracking.outbox import Outbox
from tests.unit.runs.test_trials import a_trial, reached
from tests.unit.search.test_search_objective import a_plan, searcher


def test_a_process_that_ray_ends_for_lack_of_memory_is_a_death_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune starts the trial again after the one, and ends the search after the other."""
    monkeypatch.setattr(ActorManager, "_actor_task_failed", ActorManager._actor_task_failed)
    heard: list[Exception] = []
    actor = SimpleNamespace(actor_id=1, _on_error=lambda actor, error: heard.append(error))
    task: Any = SimpleNamespace(_tracked_actor=actor, _on_error=None)
    manager = ActorManager.__new__(ActorManager)
    manager._failed_actor_ids = set()
    monkeypatch.setattr(ActorManager, "_cleanup_actor", lambda self, tracked_actor: None)
    with pytest.raises(RuntimeError, match="unexpected"):
        manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError("the node is full"))
    for _ in range(2):
        survive_lack_of_memory()
    manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError("the node is full"))
    assert isinstance(heard[0], RayActorError)
    assert "the node is full" in str(heard[0])
    with pytest.raises(RuntimeError, match="unexpected"):
        manager._actor_task_failed(tracked_actor_task=task, exception=RayError("something else"))


def test_ends_that_a_killed_driver_has_not_said_are_said_by_the_next(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its outbox died with it, after the trials' records were written."""
    said = list[dict[str, Any]]()
    monkeypatch.setattr(Outbox, "put", lambda self, record: said.append(record))
    search = searcher(a_plan(), corpus, tmp_path).search
    statuses: tuple[Status, ...] = ("finished", "stopped", "failed", "running", "finished")
    known = [a_trial(number, status=status, ended_at=5.5) for number, status in enumerate(statuses)]
    known[1].reason = "others were better"
    runs = {trial.identity: f"run-{trial.number}" for trial in known[:4]} | {"of nobody": "run-9"}
    monkeypatch.setattr(search.experiment, "running", lambda parent: runs if parent == "parent" else {})
    storage = trial_location(search.location, known[0].identity)
    outcome = {"best_step": 5, "best": reached(1.0), "precision": "float32", "device": "cpu", "samples": ["one", "two"]}
    storage.write("outcome.json", json.dumps(outcome).encode())
    say_ends(search, known, Outbox(search.parent.uri))
    assert said == [
        {"run_id": "run-0", "text": "one\ntwo\n", "name": "samples.txt"},
        {"run_id": "run-0", "status": "FINISHED", "reason": None, "ended_ms": 5500},
        {"run_id": "run-1", "status": "KILLED", "reason": "others were better", "ended_ms": 5500},
        {"run_id": "run-2", "status": "FAILED", "reason": None, "ended_ms": 5500},
    ]


def test_what_mlflow_has_not_taken_is_kept_if_it_cannot_be_asked_for_more(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of it is deleted when it is taken: from then on the outbox alone has it."""
    search = searcher(a_plan(), corpus, tmp_path).search
    trial = a_trial(0, status="finished")
    trial.run = {"run_id": "0" * 32}
    records = TrialStore(search.location)
    records.add(trial)
    records.close()
    unsent = {"run_id": "0" * 32, "status": "FINISHED", "reason": None, "ended_ms": 5500}
    search.location.write(UNSENT, json.dumps(unsent).encode() + b"\n")
    for name in ("set_up_search", "keep_keys_from_ray", "survive_lack_of_memory"):
        monkeypatch.setattr(runner, name, lambda: None)
    monkeypatch.setattr(Outbox, "_sent", lambda self, record: False)
    monkeypatch.setattr(runner, "INTERRUPTED_S", 0.0)

    def running(parent: str) -> dict[str, str]:
        raise MlflowException("nobody answers")

    monkeypatch.setattr(search.experiment, "running", running)
    with pytest.raises(MlflowException, match="nobody answers"):
        runner.run_search(search, lambda *_: None)
    assert [json.loads(line) for line in search.location.read(UNSENT).splitlines()] == [unsent]
