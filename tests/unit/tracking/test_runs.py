"""Experiments and runs on a real sqlite store."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

import raytrain
from raytrain.data.prepare import prepare
from raytrain.data.reading import Selection
from raytrain.runs.workspace import Workspace
from raytrain.storage.local import FolderStorage
from raytrain.tracking.client import check_tracking, tracking_uri, ui_hint
from raytrain.tracking.metric_writer import MetricWriter
from raytrain.tracking.runs import Experiment, Run
from raytrain.tracking.system import code_tags
from raytrain.utils.errors import UserError
from tests.support.mlflow_server import new_store


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment.open(new_store(tmp_path), "search", str(tmp_path / "runs" / "mlflow-artifacts"))


def open_run(experiment: Experiment, identity: str = "abc", **changes: object) -> Run:
    arguments = {"parameters": {"lr": 0.1}, "tags": {"seed": "3", "corpus_digest": "d1"}, "config": {"steps": 5}}
    return experiment.open_run(identity, "a name", **{**arguments, **changes})  # type: ignore[arg-type]


def test_importing_the_package_does_not_import_mlflow() -> None:
    code = "import sys, raytrain.tracking; assert not {'mlflow', 'torch', 'ray', 'numpy', 'psutil'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "module", ["raytrain.tracking.client", "raytrain.search.registry", "raytrain.runs.pyfunc_model"]
)
def test_mlflow_reports_nothing_to_its_makers(module: str, tmp_path: Path) -> None:
    """It asks for the variable when it is imported; only a process of its own shows what a command does."""
    code = (
        f"import importlib; importlib.import_module({module!r})\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "assert get_telemetry_client() is None\n"
    )
    unset = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "mlflow" in str(path).lower()]


# ---------------------------------------------------------------------------------------- runs and identities


def test_a_run_that_is_opened_again_is_the_same_run(experiment: Experiment) -> None:
    run = open_run(experiment)
    run.finish("FAILED", "the worker died")
    client = MlflowClient(experiment.uri)
    ended = client.get_run(run.run_id)
    assert (ended.info.status, ended.data.tags["raytrain.reason"]) == ("FAILED", "the worker died")

    again = open_run(Experiment.open(experiment.uri, "search", "/elsewhere"), parameters={"lr": 0.1, "data_path": "b"})
    assert again == run
    reopened = client.get_run(run.run_id)
    assert reopened.info.status == "RUNNING"
    assert "raytrain.reason" not in reopened.data.tags
    assert reopened.data.params == {"lr": "0.1", "data_path": "b"}
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_a_parameter_keeps_its_first_value(experiment: Experiment) -> None:
    """Where the text lies is not part of a run's identity, and MLflow refuses to change a parameter."""
    run = open_run(experiment, parameters={"data_path": "here"})
    assert open_run(experiment, parameters={"data_path": "there"}) == run
    assert MlflowClient(experiment.uri).get_run(run.run_id).data.params == {"data_path": "here"}


def test_parent_and_children(experiment: Experiment) -> None:
    parents = [open_run(experiment, f"search-{number}", parameters={}) for number in range(2)]
    children = [open_run(experiment, "trial", parent=parent.run_id) for parent in parents]
    assert children[0] != children[1], "the same trial in two searches is two runs"
    for parent, child in zip(parents, children, strict=True):
        assert open_run(experiment, "trial", parent=parent.run_id) == child
        tags = MlflowClient(experiment.uri).get_run(child.run_id).data.tags
        assert tags["mlflow.parentRunId"] == parent.run_id


def test_runs_of_another_experiment_are_not_found(experiment: Experiment, tmp_path: Path) -> None:
    run = open_run(experiment)
    other = Experiment.open(experiment.uri, "other", str(tmp_path / "other"))
    assert other.find_run("abc") is None
    assert experiment.find_run("abc") == run
    assert open_run(other) != run


def test_an_identity_that_would_break_the_search_is_refused(experiment: Experiment) -> None:
    with pytest.raises(ValueError, match="identity"):
        open_run(experiment, "x' OR tags.a = 'b")


def test_a_run_survives_pickling(experiment: Experiment) -> None:
    run = open_run(experiment)
    assert pickle.loads(pickle.dumps(run)) == run


RACE = """
import sys, time
from raytrain.tracking.client import check_tracking
from raytrain.tracking.runs import Experiment

def wait_for_start():
    print("ready", flush=True)
    start = float(sys.stdin.readline())
    while time.time() < start:
        pass
    return start

import mlflow
wait_for_start()
check_tracking(sys.argv[1])
experiment = Experiment.open(sys.argv[1], "race", "/nowhere")
experiment.open_run("warm", "race", parameters={}, tags={})
start = wait_for_start()
for number in range(8):
    while time.time() < start + number * 0.2:
        pass
    print(experiment.open_run(str(number), "race", parameters={}, tags={}).run_id)
"""


@pytest.mark.slow
def test_two_processes_that_open_one_identity_get_one_run(tmp_path: Path) -> None:
    """Both also make the database, the tables of which MLflow creates without a lock."""
    command = [sys.executable, "-c", RACE, f"sqlite:///{tmp_path / 'mlflow.db'}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for _ in range(2):
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
        start = time.time() + 0.1
        for racer in racers:
            racer.stdin.write(f"{start}\n")
            racer.stdin.flush()
    answers = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 8


# ------------------------------------------------------------------------------ parameters, tags, files, data


def test_parameters_are_flat_cut_and_sent_in_batches(experiment: Experiment) -> None:
    many = {f"field{number}": number for number in range(250)}
    nested = {"model": {"name": "hybrid", "maps": (1, 2), "none": {}}, "long": "x" * 9000, "off": None}
    run = open_run(experiment, parameters={**many, **nested})
    params = MlflowClient(experiment.uri).get_run(run.run_id).data.params
    assert len(params) == 255
    assert params["field249"] == "249"
    assert (params["model.name"], params["model.maps"], params["model.none"], params["off"]) == (
        *("hybrid", "[1, 2]", "{}", "None"),
    )
    assert params["long"] == "x" * 5997 + "..."


def test_tags_say_what_made_the_run(experiment: Experiment) -> None:
    tags = MlflowClient(experiment.uri).get_run(open_run(experiment).run_id).data.tags
    assert tags["raytrain.seed"] == "3"
    assert tags["raytrain.corpus_digest"] == "d1"
    assert tags["raytrain.version"] == raytrain.__version__
    assert int(tags["raytrain.cores"]) == len(os.sched_getaffinity(0))
    assert float(tags["raytrain.memory_gb"]) > 0
    for key in ("python", "torch", "ray", "mlflow", "host", "cpu"):
        assert tags[f"raytrain.{key}"]
    assert tags["mlflow.user"]


def test_the_git_commit_is_that_of_a_checkout_that_tracks_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "raytrain"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(raytrain, "__file__", str(package / "__init__.py"))
    assert "mlflow.source.git.commit" not in code_tags()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "something else")
    assert "mlflow.source.git.commit" not in code_tags(), "the checkout of a project that has raytrain installed in it"
    git("add", ".")
    git("commit", "-m", "raytrain")
    assert code_tags()["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert code_tags()["raytrain.git_changed"] == "false"
    (package / "new.py").write_text("")
    assert code_tags()["raytrain.git_changed"] == "true"


def test_artifacts_lie_under_the_storage_root(experiment: Experiment, tmp_path: Path) -> None:
    run = open_run(experiment)
    file = tmp_path / "figure.svg"
    file.write_text("<svg/>")
    run.log_text("one\ntwo\n", "samples/final.txt")
    run.log_dict({"a": [1]}, "numbers.json")
    run.log_file(file, "figures")
    folder = tmp_path / "runs" / "mlflow-artifacts" / run.run_id / "artifacts"
    assert json.loads((folder / "config.json").read_text()) == {"steps": 5}
    assert json.loads((folder / "numbers.json").read_text()) == {"a": [1]}
    assert (folder / "samples" / "final.txt").read_text() == "one\ntwo\n"
    assert (folder / "figures" / "figure.svg").read_text() == "<svg/>"


def test_datasets_and_descriptions(experiment: Experiment) -> None:
    run = open_run(experiment)
    for _ in range(2):
        run.log_dataset("ptb", "f" * 64, "s3://bucket/ptb", {"train": {"bytes": 10}, "valid": {"bytes": 2}})
    run.describe("# Results\n" + "x" * 9000)
    state = MlflowClient(experiment.uri).get_run(run.run_id)
    assert state.inputs is not None
    (dataset,) = state.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest, dataset.dataset.source_type) == ("ptb", "f" * 12, "s3")
    assert json.loads(dataset.dataset.profile or "") == {"train": {"bytes": 10}, "valid": {"bytes": 2}}
    assert state.data.tags["mlflow.note.content"].startswith("# Results\nxxx")


def test_the_report_of_a_corpus_is_in_its_dataset_without_names_of_files(
    experiment: Experiment, tmp_path: Path
) -> None:
    rows = "".join(f"line {number},{'de' if number % 2 else 'en'}\n" for number in range(1000))
    (tmp_path / "mine.csv").write_text(f"text,lang\n{rows}")
    corpus = prepare(str(tmp_path / "mine.csv"), selection=Selection(language="en"), cache=tmp_path / "cache")
    run = open_run(experiment)
    Workspace(FolderStorage(tmp_path), corpus, experiment.uri).log_corpus(run)
    inputs = MlflowClient(experiment.uri).get_run(run.run_id).inputs
    assert inputs is not None
    profile = json.loads(inputs.dataset_inputs[0].dataset.profile or "")
    dropped = {"of another language than en": 500}
    assert profile["report"] == {"read": 500, "formats": {"CSV": 1}, "dropped": dropped}
    assert profile["train"]["documents"] + profile["valid"]["documents"] + profile["test"]["documents"] == 500


def test_no_secret_reaches_the_store(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "wJalrXUtnFEMIsecret"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, secret)
    run = open_run(experiment)
    writer = MetricWriter(run.uri, run.run_id)
    writer.log(1, {"loss": 1.0})
    assert writer.close(20) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


# ------------------------------------------------------------------------------------------- addresses and checks


def test_the_default_store_is_mlflows_own_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/my.db")
    assert tracking_uri() == f"sqlite:///{tmp_path}/sub/my.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////abs/my.db")
    assert tracking_uri() == "sqlite:////abs/my.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000/")
    assert tracking_uri() == "http://server:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UserError, match="sqlite:///"):
        tracking_uri()


def test_what_shows_a_run() -> None:
    assert (
        ui_hint("http://user:word@server:5000", "7", "r1")
        == "http://server:5000/#/experiments/7/runs/r1?workflowType=machine_learning"
    )
    assert ui_hint("https://server", "7") == "https://server/#/experiments/7/runs?workflowType=machine_learning"
    hint = ui_hint("sqlite:////data/mlflow.db", "7", "r1")
    assert hint.startswith("mlflow ui --backend-store-uri sqlite:////data/mlflow.db ")
    assert hint.endswith("http://127.0.0.1:5000/#/experiments/7/runs/r1?workflowType=machine_learning")
    assert "word" not in ui_hint("postgresql://user:word@server/db", "7")


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_sqlite_file_is_not_shared_between_nodes(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        check_tracking(new_store(tmp_path), num_nodes=2)
    assert "2 nodes" in one_line(error)


def test_unusable_stores_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        check_tracking(f"sqlite:///{tmp_path}/none/mlflow.db")
    assert "does not exist" in one_line(error)
    (tmp_path / "bad.db").write_bytes(b"this is text, no database" * 100)
    with pytest.raises(UserError) as error:
        check_tracking(f"sqlite:///{tmp_path}/bad.db")
    assert "not a database" in one_line(error)
    with pytest.raises(UserError) as error:
        check_tracking("http://127.0.0.1:9")
    assert "no answer" in one_line(error)
    assert "127.0.0.1:9" in one_line(error)


@pytest.mark.parametrize(("status", "said"), [(401, "not authorised"), (403, "--allowed-hosts"), (500, "has failed")])
def test_a_server_that_refuses_gets_one_line(status: int, said: str) -> None:
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError) as error:
            check_tracking(f"http://user:word@127.0.0.1:{server.server_port}")
        server.shutdown()
    assert said in one_line(error)
    assert "word" not in one_line(error)


def test_digits_in_an_address_are_not_taken_for_a_status() -> None:
    with pytest.raises(UserError) as error:
        check_tracking("http://127.0.0.1:4034/401")
    assert "no answer" in one_line(error)


def test_a_deleted_experiment_gets_one_line(experiment: Experiment) -> None:
    MlflowClient(experiment.uri).delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError) as error:
        Experiment.open(experiment.uri, "search", "/elsewhere")
    assert "was deleted" in one_line(error)
