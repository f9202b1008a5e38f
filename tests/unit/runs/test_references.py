"""Every way to call a trained model by, and what is said where there is none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient

from raytrain.config.schema import to_dict
from raytrain.data.corpus import Corpus
from raytrain.metrics import METRIC, REQUIRED_METRICS
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.runs.records import ADDRESS, PLAN, write_run_address
from raytrain.runs.references import resolve
from raytrain.runs.trials import Trial, TrialStore
from raytrain.search import registry
from raytrain.search.plan import Plan
from raytrain.search.registry import Score
from raytrain.search.space import read_space
from raytrain.storage import open_storage
from raytrain.storage.base import Storage
from raytrain.tracking import client as tracking_server
from raytrain.tracking.runs import Experiment
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.support.mlflow_server import new_store
from tests.unit.search.test_registry import Logged, candidate

if TYPE_CHECKING:
    from tests.support.s3_server import S3Server


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("store")
    return Experiment.open(new_store(folder), "search", str(folder / "mlflow-artifacts"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own, and the tracking store that the variable names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", experiment.uri)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def logged(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    return candidate(experiment, tmp_path_factory.mktemp("logged"), 0)


@pytest.fixture(scope="module")
def registered(logged: Logged, corpus: Corpus, experiment: Experiment) -> Logged:
    """The model as version 1 of raytrain-hybrid, its champion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", experiment.uri)
        entered = registry.register_and_compete(logged.candidate(corpus, Score("d", "m", 2.5)))
    assert entered == ("raytrain-hybrid", 1, "champion")
    return logged


def train_to(location: Storage, scores: dict[int, float | None]) -> None:
    """Checkpoints as a run leaves them, by step."""
    config = tiny_config("hybrid")
    with CheckpointWriter(location.child("checkpoints"), keep_last=9) as writer:
        for step, score in scores.items():
            writer.save(Snapshot(step, {"model": {}}, {}, to_dict(config)), score)
            writer.wait()


def search_at(location: Storage, experiment: Experiment) -> list[Trial]:
    """A search of three trials, the second the best of those that left a checkpoint."""
    config = tiny_config("hybrid")
    plan = Plan(
        identity="0" * 16,
        space=read_space("mine", "def space(trial):\n    return {}\n"), bases={"hybrid": config}, budget=None,
        algorithm="tpe", corpus="d", num_samples=3, seed=0, workers={}, experiment="search", corpus_path="/nowhere",
    )  # fmt: skip
    location.write(PLAN, plan.to_json())
    records, trials = TrialStore(location), []
    for number, value in enumerate([2.5, 2.4, 2.3]):
        run = experiment.open_run(f"{location.uri()}-{number}", f"trial {number}", parameters={}, tags={})
        best = {**dict.fromkeys(REQUIRED_METRICS, 1.0), METRIC: value}
        trial = Trial(
            number=number,
            identity=f"t{number}",
            config=config,
            params={},
            distributions={},
            fields={},
            run=run.address(),
            best=best,
        )
        records.add(trial)
        write_run_address(records.location(trial.identity), run)
        if number < 2:
            train_to(records.location(trial.identity), {10: value + 0.1, 20: value})
        trials.append(trial)
    return trials


@pytest.fixture(params=["folder", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "runs" / "r")
    server: S3Server = request.getfixturevalue("s3_server")
    server.use(monkeypatch)
    return open_storage(f"s3://raytrain/{tmp_path.name}")


# ---------------------------------------------------------------------------------------------- forms


def test_a_run_and_its_checkpoints(location: Storage, experiment: Experiment) -> None:
    train_to(location, {10: 2.6, 20: 2.4, 30: 2.5, 40: None})
    found = resolve(location.uri())
    assert (found.stored.step, found.stored.score, found.run) == (20, 2.4, None)
    run = experiment.open_run(location.uri(), "r", parameters={}, tags={})
    write_run_address(location, run)
    assert resolve(location.uri()).run == run
    last = resolve(location.uri("checkpoints/step-00000040"))
    assert (last.stored.step, last.run) == (40, run)
    assert last.stored.uri == location.uri("checkpoints/step-00000040")
    assert resolve(location.uri("checkpoints/step-00000010") + "/").stored.step == 10


def test_a_search_means_its_best_trial_s_best_checkpoint(location: Storage, experiment: Experiment) -> None:
    trials = search_at(location, experiment)
    found = resolve(location.uri())
    assert (found.stored.step, found.stored.score) == (20, 2.4)
    assert found.stored.uri == location.uri("trials/t1/checkpoints/step-00000020")
    assert found.run is not None
    assert found.run.address() == trials[1].run
    own = resolve(location.uri("trials/t0"))
    assert (own.stored.score, own.run and own.run.address()) == (2.5, trials[0].run)


def test_a_checkpoint_that_was_copied_somewhere(location: Storage, tmp_path: Path, s3_server: S3Server) -> None:
    train_to(location, {10: 2.5})
    step = location.child("checkpoints/step-00000010")
    for target in (
        location.child("here"),
        open_storage(tmp_path / "c"),
        open_storage(f"s3://raytrain/{tmp_path.name}-c"),
    ):
        if not (target.uri().startswith("s3:") and location.folder is not None):  # the variables are those of a folder
            for key in step.list():
                target.write(key, step.read(key))
            found = resolve(target.uri())
            assert (found.stored.step, found.run) == (10, None)


def test_a_relative_path(experiment: Experiment, home: Path) -> None:
    train_to(open_storage("runs/r"), {10: 2.5})
    assert resolve("runs/r").stored.step == 10
    os.chdir(home / "runs")
    assert resolve("r/checkpoints/step-00000010").stored.step == 10


def test_an_mlflow_run_with_a_model(logged: Logged) -> None:
    found = resolve(logged.run.run_id)
    assert found.run == logged.run
    assert found.stored.uri == f"models:/{logged.model_id}"
    assert_same_weights(found.stored, logged.stored)


def assert_same_weights(first: Any, second: Any) -> None:
    mine, other = first.tensors("model"), second.tensors("model")
    assert mine.keys() == other.keys()
    assert all((mine[name] == other[name]).all() for name in mine)


def test_an_mlflow_run_that_says_where_its_checkpoints_are(experiment: Experiment, location: Storage) -> None:
    train_to(location, {10: 2.6, 20: 2.4})
    tags = {"location": location.uri()}
    run = experiment.open_run(f"placed-{location.uri()}", "r", parameters={}, tags=tags)
    found = resolve(run.run_id)
    assert (found.stored.step, found.run) == (20, run)


@pytest.mark.parametrize("form", ["models:/raytrain-hybrid@champion", "models:/raytrain-hybrid/1", "models:/{id}"])
def test_a_model(registered: Logged, form: str) -> None:
    found = resolve(form.format(id=registered.model_id))
    assert found.run == registered.run
    assert found.stored.uri == f"models:/{registered.model_id}"
    assert_same_weights(found.stored, registered.stored)


def test_a_run_of_another_store_is_not_known(
    location: Storage, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    search_at(location, experiment)
    other = new_store(tmp_path / "other")
    (home / "no.db").write_text("this is no database, and long enough to be seen as none" * 100)
    for uri in (other, f"sqlite:///{home}/absent.db", f"sqlite:///{home}/no.db", "http://127.0.0.1:9"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for reference in (location.uri(), location.uri("trials/t0")):
            assert resolve(reference).run is None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve(location.uri()).run is None
    assert [path.name for path in home.iterdir()] == ["no.db"]


# ------------------------------------------------------------------------------------------- mistakes


def refusal(reference: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(reference)
    line = str(caught.value)
    assert "\n" not in line
    return line


NO_RUN = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nothing", "nothing does not exist or is empty: give a checkpoint, a run's folder, an MLflow run id"),
        ("", "give a folder or s3://bucket/prefix"),
        ("gs://bucket/x", "the address must be a folder or s3://"),
        (NO_RUN, f"there is no run {NO_RUN} in sqlite:///"),
        ("models:/raytrain-nothing@champion", "there is no models:/raytrain-nothing@champion in sqlite:///"),
        ("models:/raytrain-hybrid@nothing", "there is no models:/raytrain-hybrid@nothing in"),
        ("models:/raytrain-hybrid/77", "there is no models:/raytrain-hybrid/77 in"),
        ("models:/m-0123", "there is no models:/m-0123 in"),
        ("models:/", "write models:/NAME@ALIAS, models:/NAME/VERSION or models:/ID"),
        ("models:/a/b/c", "write models:/NAME@ALIAS"),
        ("models:/a@b@c", "write models:/NAME@ALIAS"),
        ("models:/a/latest", "write models:/NAME@ALIAS"),
    ],
)
def test_what_there_is_not_is_one_line(registered: Logged, reference: str, words: str, home: Path) -> None:
    assert words in refusal(reference)
    assert list(home.iterdir()) == []


def test_what_is_no_checkpoint_is_one_line(home: Path, experiment: Experiment) -> None:
    (home / "file").write_text("text")
    assert "is a file, not a folder" in refusal("file")
    (home / "other").mkdir()
    (home / "other" / "text.txt").write_text("text")
    assert "other has no checkpoint that was evaluated" in refusal("other")
    location = open_storage("unscored")
    train_to(location, {10: None})
    assert "unscored has no checkpoint that was evaluated" in refusal("unscored")
    run = experiment.open_run("empty", "r", parameters={}, tags={"location": location.uri()})
    assert f"run {run.run_id} has left no checkpoint that was evaluated" in refusal(run.run_id)
    run = experiment.open_run("placeless", "r", parameters={}, tags={})
    assert f"run {run.run_id} has left no checkpoint" in refusal(run.run_id)


def test_damage_is_one_line(home: Path, experiment: Experiment) -> None:
    location = open_storage("r")
    train_to(location, {10: 2.5})
    write_run_address(location, experiment.open_run("damaged", "r", parameters={}, tags={}))
    for text in (b"{", b"[]", b'{"run_id": "x"}', b"null"):
        location.write(ADDRESS, text)
        assert "r/mlflow.json is not the address of an MLflow run" in refusal("r")
    location.delete(ADDRESS)
    weights = home / "r" / "checkpoints" / "step-00000010" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    assert "model.safetensors has" in refusal("r/checkpoints/step-00000010")
    assert "has no checkpoint that was evaluated" in refusal("r")
    search = open_storage("s")
    search_at(search, experiment)
    for trial in ("t0", "t1"):
        shutil.rmtree(home / "s" / "trials" / trial / "checkpoints")
    assert "no trial of the search" in refusal("s")
    search.write("trials/t1/trial.json", b"{")
    assert "s/trials/t1/trial.json is not the record of a trial" in refusal("s")


def test_a_search_with_a_record_without_a_run(home: Path, experiment: Experiment) -> None:
    location = open_storage("s")
    search_at(location, experiment)
    record = json.loads(location.read("trials/t1/trial.json"))
    location.write("trials/t1/trial.json", json.dumps({**record, "run": {}}).encode())
    found = resolve("s")
    assert (found.stored.score, found.run) == (2.4, None)


def test_a_store_that_cannot_be_used_is_one_line(
    home: Path, registered: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = (registered.run.run_id, "models:/raytrain-hybrid@champion", f"models:/{registered.model_id}")
    for uri, words in {
        f"sqlite:///{home}/mlflow.db": "there is no tracking store sqlite:///",
        "http://127.0.0.1:9": "no answer; is the server running",
        "mlruns": "no longer keeps runs in a plain folder",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for reference in references:
            assert words in refusal(reference)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for reference in references:
        assert "there is no tracking store sqlite:///" in refusal(reference)
    assert list(home.iterdir()) == []


def test_a_model_that_is_gone_or_not_ours_is_one_line(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_server, "PATIENCE_S", 0.0)
    gone = candidate(experiment, tmp_path, 20)
    client = MlflowClient(experiment.uri)
    client.create_registered_model("other")
    client.create_model_version("other", f"models:/{gone.model_id}", gone.run.run_id)
    assert "other version 1 was not registered by raytrain" in refusal("models:/other/1")
    Path(client.get_logged_model(gone.model_id).artifact_location).rename(tmp_path / "elsewhere")
    for reference in (gone.run.run_id, f"models:/{gone.model_id}"):
        assert f"model {gone.model_id} cannot be fetched" in refusal(reference)


def test_an_s3_mistake_is_one_line(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.use(monkeypatch, AWS_SECRET_ACCESS_KEY="not-the-secret")
    assert "s3://raytrain/x: cannot read" in refusal("s3://raytrain/x")
    s3_server.use(monkeypatch)
    assert "s3://raytrain/nothing does not exist or is empty" in refusal("s3://raytrain/nothing")
    assert "there is no bucket 'elsewhere'" in refusal("s3://elsewhere/x")
