"""Trials that a space refuses after its check: each fails with the reason, and the search goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

from raytrain.config.schema import to_dict
from raytrain.data import pieces
from raytrain.data.cache import open_anywhere
from raytrain.data.corpus import Corpus
from raytrain.runs.records import OUTCOME, read_outcome
from raytrain.runs.trials import TrialStore
from raytrain.search import runner, trainables
from raytrain.search import searcher as searchers
from raytrain.search.algorithms import SAMPLERS
from raytrain.search.recorder import TrialRecorder
from raytrain.search.searcher import OptunaSearcher
from raytrain.search.space import read_space
from raytrain.storage import open_storage
from raytrain.tracking.outbox import Outbox
from raytrain.tracking.runs import Run
from raytrain.utils.errors import UserError
from tests.unit.search.test_search_objective import a_plan, searcher

RAISES = """
CALLS = [0]
def space(trial):
    CALLS[0] += 1
    alpha = trial.suggest_float("alpha", 0.0, 1.0)
    if CALLS[0] == 2:
        {body}
    return {{"objective.alpha": alpha}}
"""


def suggest(found: OptunaSearcher, trial_id: str) -> dict[str, Any]:
    values = found.suggest(trial_id)
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('a branch')", "search space mine: KeyError: 'a branch'"),
        ("raise ValueError('two\\nlines')", "search space mine: ValueError: two lines"),
        ("exit()", "search space mine: SystemExit"),
        ("return {'model.latnet': 4}", "search space mine: unknown field 'model.latnet' for hybrid"),
        ("return {'model.latent': -1}", "search space mine: config: model.latent is -1"),
        ("return 3", "search space mine: space(trial) returned int"),
        ("trial.suggest_categorical('x', [(1, 2), (3, 4)])", "search space mine: 'x' has the choice (1, 2)"),
    ],
)
def test_a_point_that_the_space_refuses_is_a_failed_trial(
    body: str, reason: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = searcher(a_plan(space=read_space("mine", RAISES.format(body=body))), corpus, tmp_path)
    values = [suggest(found, str(number)) for number in range(3)]
    assert [value["refused"] for value in values] == [False, True, False]
    refused = found.trials[1]
    assert refused.status == "failed"
    assert refused.reason.startswith(reason)
    assert "\n" not in refused.reason
    assert (read_outcome(values[1]["job"]["storage"]) or {})["error"] == refused.reason
    assert not open_storage(values[0]["job"]["storage"]).exists(OUTCOME)
    assert len({trial.identity for trial in found.trials}) == 3

    # its process trains nothing, whatever runs beside it
    monkeypatch.setattr(trainables, "run_in_process", lambda *_: pytest.fail("it trains"))
    trainables.run_alone(values[1])
    trainables.run_worker_group(values[1])
    monkeypatch.setattr(Outbox, "put", lambda *_: None)
    recorder = TrialRecorder(found, lambda trial: None, Outbox(found.search.parent.uri))
    for event in (recorder.on_trial_start, recorder.on_trial_complete):
        event(0, [], SimpleNamespace(trial_id="1"))
        assert refused.status == "failed"
    recorder.close()
    assert [trial.state for trial in found.study.trials] == [
        optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.FAIL, optuna.trial.TrialState.RUNNING,
    ]  # fmt: skip

    # it counts among the trials of a search that is resumed, and is not run again
    found.records.close()
    known = TrialStore(found.search.location).read()
    assert [trial.status for trial in known] == ["waiting", "failed", "waiting"]
    again = searcher(a_plan(space=read_space("mine", RAISES.format(body="pass"))), corpus, tmp_path)
    jobs = [suggest(again, str(number))["job"] for number in range(2)]
    assert [job["config"] for job in jobs] == [values[0]["job"]["config"], values[2]["job"]["config"]]


def test_a_vocabulary_that_only_the_space_names_is_learnt_once_by_the_driver(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[str] = []
    learn = pieces.learn
    monkeypatch.setattr(pieces, "learn", lambda train, name: learnt.append(name) or learn(train, name))
    shutil.copytree(corpus.path, tmp_path / "mine", ignore=shutil.ignore_patterns("vocabulary*"))
    mine = Corpus.open(tmp_path / "mine")
    source = "def space(trial):\n    return {'vocabulary': trial.suggest_categorical('v', ['bpe:270', 'bpe:280'])}\n"
    found = searcher(a_plan(space=read_space("mine", source), num_samples=8, algorithm="random"), mine, tmp_path)
    jobs = [suggest(found, str(number))["job"] for number in range(8)]
    names = [job["config"]["vocabulary"] for job in jobs]
    assert sorted(learnt) == sorted(set(names)) == ["bpe:270", "bpe:280"]
    for job, name in zip(jobs, names, strict=True):  # as every worker does
        assert open_anywhere(job["corpus"]).vocabulary(name).name == name
    assert len(learnt) == 2


def test_a_vocabulary_that_cannot_be_learnt_ends_the_search(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> None:
        raise UserError("the vocabularies bpe:N need the package tokenizers")

    monkeypatch.setattr(pieces, "learn", missing)
    space = read_space("mine", "def space(trial):\n    return {'vocabulary': 'bpe:290'}\n")
    found = searcher(a_plan(space=space), corpus, tmp_path)
    assert found.suggest("0") == OptunaSearcher.FINISHED
    assert "need the package tokenizers" in str(found.failure)


def test_a_space_that_raises_at_a_known_point_does_not_keep_it_from_being_resumed(
    corpus: Corpus, tmp_path: Path
) -> None:
    plan = a_plan(space=read_space("mine", RAISES.format(body="pass")))
    first = searcher(plan, corpus, tmp_path)
    config = suggest(first, "0")["job"]["config"]
    broken = "def space(trial):\n    trial.suggest_float('alpha', 0.0, 1.0)\n    raise KeyError('x')\n"
    again = searcher(a_plan(space=read_space("mine", broken)), corpus, tmp_path)
    assert suggest(again, "0")["job"]["config"] == config
    assert again.study.trials[0].params == first.trials[0].params


def test_a_sampler_that_fails_ends_the_search(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(optuna.samplers.RandomSampler):
        def before_trial(self, study: Any, trial: Any) -> None:
            raise RuntimeError("no sample")

    monkeypatch.setitem(SAMPLERS, "fails", lambda plan, seed: Fails())
    found = searcher(a_plan(algorithm="fails"), corpus, tmp_path)
    assert found.suggest("0") == OptunaSearcher.FINISHED
    assert str(found.failure) == "no sample"
    assert found.trials == []


def test_new_trials_wait_while_mlflow_is_away_and_are_not_drawn_twice(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tune asks again where there is no next trial yet; the trials that run go on meanwhile."""
    monkeypatch.setattr(searchers, "ASK_AGAIN_S", 0.0)
    found = searcher(a_plan(), corpus, tmp_path)
    open_run = found.search.experiment.open_run

    def away(*_: Any, **__: Any) -> None:
        raise MlflowException("Max retries exceeded", error_code=TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(found.search.experiment, "open_run", away)
    assert [found.suggest("0") for _ in range(3)] == [None, None, None]
    assert [trial.number for trial in found.trials] == [0]
    assert sum("new trials wait for it" in message for message in caplog.messages) == 1
    monkeypatch.setattr(found.search.experiment, "open_run", open_run)
    assert suggest(found, "0")["job"]["config"] == to_dict(found.trials[0].config)
    assert len(found.study.trials) == len(found.trials) == 1

    monkeypatch.setattr(found.search.experiment, "open_run", away)
    monkeypatch.setattr(searchers, "AWAY_S", -1.0)
    assert [found.suggest("1"), found.suggest("1")] == [None, OptunaSearcher.FINISHED]
    assert isinstance(found.failure, UserError)
    assert "MLflow was away" in str(found.failure)


def test_a_deleted_experiment_ends_the_search_with_its_cause(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = searcher(a_plan(), corpus, tmp_path)

    def deleted(*_: Any, **__: Any) -> None:
        raise MlflowException("The experiment 1 must be in the 'active' state.", error_code=INVALID_PARAMETER_VALUE)

    monkeypatch.setattr(found.search.experiment, "open_run", deleted)
    assert found.suggest("0") == OptunaSearcher.FINISHED
    assert str(found.failure).startswith(
        "experiment 'raytrain' has been deleted in MLflow: restore it with `mlflow exp"
    )


def test_the_run_of_a_trial_that_was_deleted_stays_deleted(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = searcher(a_plan(), corpus, tmp_path)
    trial = found._drawn_trial()
    run = Run("sqlite:///nowhere", "0", "deleted-run", 5)
    trial.run, found._next = run.address(), trial
    monkeypatch.setattr(
        found.search.experiment,
        "deleted_run",
        lambda identity, parent: run if (identity, parent) == (trial.identity, "parent") else None,
    )
    assert suggest(found, "0")["job"]["tracking"]["run_id"] == "deleted-run"


def test_ends_that_mlflow_did_not_take_are_sent_by_the_resumed_search(corpus: Corpus, tmp_path: Path) -> None:
    """Not of a trial that goes on: its end would be wrong."""
    found = searcher(a_plan(), corpus, tmp_path)
    trials = [found.trial(str(number)) for number in range(2) if suggest(found, str(number))]
    trials[0].status = "finished"
    records = [
        {"run_id": f"{number}" * 32, "status": "KILLED", "reason": None, "ended_ms": number} for number in range(2)
    ]
    for trial, record in zip(trials, records, strict=True):
        trial.run["run_id"] = record["run_id"]
    runner.keep_unsent(found.search, records)
    assert runner.take_unsent(found.search, trials) == records[:1]
    assert runner.take_unsent(found.search, trials) == []
