"""What a search is: written, read back equal, and told from every other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytrain.config.schema import override
from raytrain.config.workers import WorkerSpec
from raytrain.data.corpus import Corpus
from raytrain.runs.records import PLAN, read_values
from raytrain.runs.repeats import Confirm
from raytrain.runs.workspace import Workspace
from raytrain.search.algorithms import resolve_scheduler
from raytrain.search.plan import Plan, read_plan
from raytrain.search.setup import known_or_new, open_tracking, stored_plan
from raytrain.search.space import read_space
from raytrain.storage.base import Storage, StorageError
from raytrain.storage.local import FolderStorage
from raytrain.tracking.client import connect
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.support.mlflow_server import new_store

SOURCE = """
MODELS = ["hybrid", "lstm_vae"]
BUDGETS = {"small": {"steps": 10}, "full": {"steps": 100}}

def space(trial, budget):
    return {"model": trial.suggest_categorical("model", MODELS), "seed": trial.suggest_int("s", 1, 3)}
"""


@pytest.fixture
def plan() -> Plan:
    return Plan(
        identity="0123456789abcdef",
        space=read_space("mine", SOURCE),
        bases={model: tiny_config(model) for model in ("hybrid", "lstm_vae")},
        budget="small",
        algorithm="tpe",
        corpus="0123456789abcdef",
        num_samples=8,
        seed=3,
        workers={"workers_per_trial": 2, "cpus_per_worker": 1.5, "gpus_per_worker": None, "device": "cpu"},
        experiment="raytrain",
        corpus_path="/somewhere/corpus",
    )


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return FolderStorage(tmp_path / "search")


def test_what_is_written_is_read_back(plan: Plan, storage: Storage) -> None:
    assert read_plan(storage) is None
    storage.write(PLAN, plan.to_json())
    found = read_plan(storage)
    assert found is not None
    assert replace(found, space=plan.space) == plan  # functions are never equal
    assert replace(found.space, draw=plan.space.draw) == plan.space
    assert plan.differences(found) == found.differences(plan) == []
    assert found.to_json() == plan.to_json()

    import optuna

    point = optuna.trial.FixedTrial({"model": "lstm_vae", "s": 2})
    config = found.space.resolve(found.bases, point, found.budget)
    assert (config.model_name, config.seed) == ("lstm_vae", 2)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda plan: replace(plan, budget="full"), "budget was small, is full"),
        (lambda plan: replace(plan, algorithm="random"), "algorithm was tpe, is random"),
        (lambda plan: replace(plan, scheduler="none"), "scheduler was asha, is none"),
        (lambda plan: replace(plan, seed=4), "seed was 3, is 4"),
        (lambda plan: replace(plan, experiment="other"), "experiment was raytrain, is other"),
        (lambda plan: replace(plan, corpus="f" * 16), "the corpus is another"),
        (lambda plan: replace(plan, space=read_space("mine", SOURCE + "#\n")), "the search space is another"),
        (
            lambda plan: replace(plan, bases={"hybrid": plan.bases["hybrid"]}),
            "the model was hybrid, lstm_vae, is hybrid",
        ),
        (
            lambda plan: replace(
                plan, bases={**plan.bases, "lstm_vae": override(plan.bases["lstm_vae"], {"model.latent": 5})}
            ),
            "model.latent was 8, is 5",
        ),
        (
            lambda plan: replace(plan, bases={name: replace(base, steps=21) for name, base in plan.bases.items()}),
            "steps was 20, is 21",
        ),
    ],
)
def test_what_makes_it_another_search_is_named(plan: Plan, changed: Callable[[Plan], Plan], words: str) -> None:
    assert words in changed(plan).differences(plan)


def test_what_does_not_make_it_another(plan: Plan) -> None:
    moved = {name: replace(base, data="text.txt", data_path="/else/text") for name, base in plan.bases.items()}
    same = replace(plan, num_samples=20, workers={}, corpus_path="/else", bases=moved)
    assert same.differences(plan) == []


def test_a_search_keeps_its_identity_and_another_of_its_name_has_another(
    plan: Plan, corpus: Corpus, tmp_path: Path
) -> None:
    alice, bob = (Workspace(FolderStorage(tmp_path / name), corpus, "") for name in ("alice", "bob"))
    again, other = replace(plan, identity="a" * 16), replace(plan, identity="b" * 16)
    assert known_or_new("baseline", plan, alice) is plan
    alice.storage.write(f"baseline/{PLAN}", plan.to_json())
    assert known_or_new("baseline", again, alice).identity == plan.identity
    assert known_or_new("baseline", other, bob).identity == other.identity


def test_a_search_that_is_named_again_loses_neither_trials_nor_its_confirmation(
    plan: Plan, corpus: Corpus, tmp_path: Path
) -> None:
    workspace = Workspace(FolderStorage(tmp_path), corpus, "")
    rule = Confirm(configs=2, seeds=3, first_seed=1000)
    workspace.storage.write(f"s/{PLAN}", replace(plan, num_samples=20, confirm=rule).to_json())
    fewer = known_or_new("s", replace(plan, num_samples=8, confirm=None), workspace)
    assert (fewer.num_samples, fewer.confirm) == (20, rule)
    other = replace(rule, configs=4)
    more = known_or_new("s", replace(plan, num_samples=30, confirm=other), workspace)
    assert (more.num_samples, more.confirm) == (30, other)


def test_two_searches_of_one_name_in_one_mlflow_store_are_two_runs(plan: Plan, corpus: Corpus, tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    plans = [replace(plan, identity=digit * 16, seed=seed) for digit, seed in (("a", 1), ("b", 2), ("a", 1))]
    places = [Workspace(FolderStorage(tmp_path / name), corpus, uri) for name in ("alice", "bob", "alice")]
    found = [
        open_tracking("baseline", each, place, WorkerSpec(1, 1, 0))[1].run_id
        for each, place in zip(plans, places, strict=True)
    ]
    assert found[2] == found[0] != found[1]
    for run_id, place in zip(found, places, strict=True):
        state = connect(uri).get_run(run_id)
        assert state.info.run_name == "baseline"
        assert state.data.tags["raytrain.location"] == place.storage.uri("baseline")


def test_the_run_of_a_search_that_was_deleted_stays_deleted(
    plan: Plan, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = new_store(tmp_path)
    workspace = Workspace(FolderStorage(tmp_path / "runs"), corpus, uri)
    experiment, run = open_tracking("baseline", plan, workspace, WorkerSpec(1, 1, 0))
    client = connect(uri)
    client.delete_run(run.run_id)
    assert open_tracking("baseline", plan, workspace, WorkerSpec(1, 1, 0)) == (experiment, run)
    assert client.get_run(run.run_id).info.lifecycle_stage == "deleted"
    assert client.search_runs([experiment.experiment_id]) == []
    assert sum("has been deleted, and stays so" in message for message in caplog.messages) == 1


def test_only_a_grid_is_run_in_full() -> None:
    found = [resolve_scheduler(None, name, "bound") for name in ("tpe", "random", "grid")]
    assert found == ["asha", "asha", "none"]


def damaged(plan: Plan, **changes: Any) -> bytes:
    values = json.loads(plan.to_json()) | changes
    return json.dumps({name: value for name, value in values.items() if value != "gone"}).encode()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "is of another version of raytrain"),
        ({"format": "gone"}, "is of another version of raytrain"),
        ({"seed": "gone"}, "is not a search's plan"),
        ({"identity": "gone"}, "is not a search's plan: identity is None: must be str"),
        ({"identity": "mine"}, "is not a search's plan: it has no identity"),
        ({"unheard": 1}, "is not a search's plan"),
        ({"space": {"name": "mine"}}, "is not a search's plan"),
        ({"space": []}, "is not a search's plan"),
        ({"bases": []}, "is not a search's plan"),
        ({"space": {"name": "mine", "source": "1 / 0"}}, "search space mine cannot be loaded: ZeroDivisionError"),
        ({"bases": {"hybrid": {"model": {"name": "gpt"}}}}, "model.name must be one of"),
        ({"bases": {"byte_lstm": {"model": {"name": "hybrid"}}}}, "bases must be configs of the models that they are"),
    ],
)
def test_a_plan_that_cannot_be_read_is_one_line(
    plan: Plan, storage: Storage, changes: dict[str, Any], words: str
) -> None:
    storage.write(PLAN, damaged(plan, **changes))
    with pytest.raises(UserError, match=words) as caught:
        read_plan(storage)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ({"device": "tpu"}, r"workers\.device is 'tpu': must be one of auto, cpu, cuda"),
        ({"cpus_per_worker": "cpu"}, r"workers\.cpus_per_worker is 'cpu': must be a number"),
        ({"unheard": 1}, r"workers\.unheard"),
    ],
)
def test_a_plan_whose_workers_cannot_be_is_not_resumed(
    plan: Plan, storage: Storage, tmp_path: Path, workers: dict[str, Any], words: str
) -> None:
    storage.write(PLAN, damaged(plan, workers=workers))
    with pytest.raises(UserError, match=words):
        stored_plan("search", str(tmp_path))


@pytest.mark.parametrize("changes", [{"corpus": 1e999}, {"corpus": "../x"}, {"corpus_path": None}, {"corpus": "gone"}])
def test_where_the_corpus_was_is_checked_for_all_that_read_a_plan(
    plan: Plan, storage: Storage, changes: dict[str, Any]
) -> None:
    storage.write(PLAN, damaged(plan, **changes))
    with pytest.raises(UserError, match=r"search\.json is not a search's plan: corpus"):
        read_values(storage)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff", b'"text"'])
def test_a_file_that_is_no_plan_is_one_line(storage: Storage, text: bytes) -> None:
    storage.write(PLAN, text)
    with pytest.raises(UserError, match=r"search\.json is"):
        read_plan(storage)


def test_a_storage_that_fails_is_one_line_and_not_an_absent_search(tmp_path: Path) -> None:
    class Broken(FolderStorage):
        def read(self, key: str) -> bytes:
            raise StorageError(f"cannot read {self.uri(key)}: wrong secret")

    with pytest.raises(UserError, match=r"search\.json: wrong secret"):
        read_plan(Broken(tmp_path))


EVIL = """
from pathlib import Path
Path("run").touch()
def space(trial):
    return {"seed": trial.suggest_int("s", 1, 3)}
"""


def test_only_a_resumption_runs_a_file_of_the_storage_and_says_so(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Corpus
) -> None:
    """``--name`` compares the files; whoever may write to the storage must not run code by it."""
    monkeypatch.chdir(tmp_path)
    storage = FolderStorage(tmp_path / "runs")
    workspace = Workspace(storage, corpus, "sqlite:///nowhere")
    storage.write(f"mine/{PLAN}", damaged(plan, space={"name": "mine", "source": EVIL}))
    with pytest.raises(
        UserError, match=r"--name mine belongs to a search with other settings .the search space is anoth"
    ):
        known_or_new("mine", plan, workspace)
    assert not Path("run").exists()
    assert capsys.readouterr().out == ""

    own = replace(plan, space=read_space("mine", EVIL), budget=None)
    Path("run").unlink()
    storage.write(f"same/{PLAN}", own.to_json())
    known_or_new("same", own, workspace)
    assert not Path("run").exists()

    stored_plan("same", str(tmp_path / "runs"))
    assert Path("run").exists()
    assert capsys.readouterr().out == f"running the search space as {storage.uri()}/same/{PLAN} has it\n"
    Path("run").unlink()
    with pytest.raises(UserError, match="there is no such search"):
        stored_plan("absent", str(tmp_path / "runs"))
    assert capsys.readouterr().out == ""
