"""The MLflow server is away when a run or a search ends: each ends as it would, and what was not said is said later."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from raytrain.runs.records import UNSENT
from raytrain.runs.trials import TrialStore
from raytrain.storage import open_storage
from tests.support.machine import Machine, wait_for
from tests.support.mlflow_server import MlflowServer
from tests.support.tiny import SPACE, TINY, write_text

OPTIONS = [
    *TINY,
    "--data",
    "text.txt",
    "--cpus-per-worker",
    "1",
    "--evaluate-every",
    "200",
    "--checkpoint-every",
    "200",
]


@pytest.fixture
def here(tmp_path: Path, mlflow_server: MlflowServer, ray_cpu: str) -> Iterator[Machine]:
    """A machine whose storage is a folder; its MLflow server runs again when the test has ended."""
    variables = {"RAY_ADDRESS": ray_cpu, "MLFLOW_TRACKING_URI": mlflow_server.uri, "RAY_AUTH_MODE": "disabled"}
    machine = Machine(tmp_path / "here", variables)
    write_text(machine.folder / "text.txt")
    (machine.folder / "space.py").write_text(SPACE)
    yield machine
    mlflow_server.start()


def statuses(server: MlflowServer, name: str) -> dict[str, str]:
    """The status of each MLflow run of a run or search by its name."""
    client = MlflowClient(server.uri)
    found = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    return {run.info.run_name: run.info.status for run in found}


def test_a_run_that_ends_while_mlflow_is_away_ends_well(here: Machine, mlflow_server: MlflowServer) -> None:
    """It says what was not recorded, and the command that it prints records it."""
    arguments = [
        "-m",
        "raytrain.train",
        "hybrid",
        *OPTIONS,
        "--steps",
        "1000",
        "--name",
        "gone",
        "--experiment",
        "gone",
    ]
    process = here.start(*arguments)
    checkpoints = here.folder / "runs/gone/checkpoints"
    wait_for(lambda: any(checkpoints.glob("*/manifest.json")) or process.poll() is not None, 180, "a checkpoint")
    mlflow_server.kill()
    assert process.wait(240) == 0, here.output()[-3000:]
    said = here.output()
    assert "Traceback" not in said
    assert "best at step" in said
    command = next(line for line in said.splitlines() if "did not reach MLflow" in line).partition("python ")[2]
    assert json.loads((here.folder / "runs/gone/outcome.json").read_text())["samples"]

    mlflow_server.start()
    assert statuses(mlflow_server, "gone") == {"gone": "RUNNING"}
    here.run(*command.split())
    assert statuses(mlflow_server, "gone") == {"gone": "FINISHED"}
    client = MlflowClient(mlflow_server.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("gone").experiment_id])
    assert "samples.txt" in {item.path for item in client.list_artifacts(run.info.run_id)}
    assert max(metric.step for metric in client.get_metric_history(run.info.run_id, "valid/bits_per_byte")) == 1000


def test_a_search_that_is_interrupted_while_mlflow_is_away_ends_soon_and_can_be_resumed(
    here: Machine, mlflow_server: MlflowServer
) -> None:
    arguments = [*OPTIONS, "--space", "space.py", "--name", "s", "--experiment", "s", "--num-samples", "2"]
    process = here.start("-m", "raytrain.tune", "hybrid", *arguments, "--steps", "20000", "--algorithm", "random")
    trials = here.folder / "runs/s/trials"
    wait_for(lambda: any(trials.glob("*/checkpoints/*/manifest.json")) or process.poll() is not None, 240, "a trial")
    mlflow_server.kill()
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(120) == 130, here.output()[-3000:]
    assert time.monotonic() - started < 60
    assert "resume with: python -m raytrain.tune --resume s" in here.output()
    assert "Traceback" not in here.output()
    storage = open_storage(here.folder / "runs/s")
    assert {trial.status for trial in TrialStore(storage).read()} <= {"interrupted", "waiting"}
    assert storage.exists(UNSENT)
