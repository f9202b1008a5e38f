"""A run or an experiment is deleted in MLflow, or its database is held, while a run or a search is at work."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from raytrain.runs.trials import TrialStore
from raytrain.storage import open_storage
from tests.support.machine import Machine, kill, wait_for
from tests.support.mlflow_server import new_store
from tests.support.tiny import SPACE, TINY, write_text

OPTIONS = [*TINY[: TINY.index("--steps")], "--precision", "float32", "--data", "text.txt", "--cpus-per-worker", "1"]
OPTIONS += "--log-every 50 --evaluate-every 200 --evaluate-samples 32 --checkpoint-every 200".split()
SEARCH = [*OPTIONS, *"--space space.py --name s --num-samples 3 --algorithm random --max-concurrent 2".split()]


@pytest.fixture
def here(tmp_path: Path, ray_cpu: str) -> Machine:
    """A machine whose storage is a folder, with a tracking database that is there already."""
    machine = Machine(tmp_path / "here", {"RAY_ADDRESS": ray_cpu, "RAY_AUTH_MODE": "disabled"})
    machine.environment["MLFLOW_TRACKING_URI"] = new_store(machine.folder)
    write_text(machine.folder / "text.txt")
    (machine.folder / "space.py").write_text(SPACE)
    return machine


@pytest.mark.long
def test_a_run_that_was_deleted_stays_so_when_it_is_resumed(here: Machine) -> None:
    process = here.start("-m", "raytrain.train", "hybrid", *OPTIONS, "--steps", "2000", "--name", "r")
    folder = here.folder / "runs/r"
    wait_for(lambda: any(folder.glob("checkpoints/*/manifest.json")) or process.poll() is not None, 180, "a checkpoint")
    kill(process)
    client = MlflowClient(here.environment["MLFLOW_TRACKING_URI"])
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    client.delete_run(run_id)

    said = here.run("-m", "raytrain.train", "--resume", "r")
    assert said.count(f"the MLflow run {run_id} has been deleted, and stays so") == 1
    assert "best at step" in said
    assert "Traceback" not in said
    experiment = client.get_experiment_by_name("raytrain")
    (run,) = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    assert (run.info.run_id, run.info.lifecycle_stage) == (run_id, "deleted")
    assert json.loads((folder / "outcome.json").read_text())["best_step"]


def test_the_end_of_a_run_that_a_killed_driver_has_not_said_is_said_when_it_is_resumed(here: Machine) -> None:
    here.run("-m", "raytrain.train", "hybrid", *OPTIONS, "--steps", "50", "--name", "r")
    client = MlflowClient(here.environment["MLFLOW_TRACKING_URI"])
    run_id = json.loads((here.folder / "runs/r/mlflow.json").read_text())["run_id"]
    client.update_run(
        run_id, status="RUNNING"
    )  # as MLflow has it when the driver dies between outcome.json and its end
    assert "this run has ended already" in here.run("-m", "raytrain.train", "--resume", "r")
    assert client.get_run(run_id).info.status == "FINISHED"


def begin_search(here: Machine, steps: int) -> subprocess.Popen[str]:
    """Start a search; return when a trial of it has a checkpoint."""
    process = here.start("-m", "raytrain.tune", "hybrid", *SEARCH, "--scheduler", "none", "--steps", str(steps))
    trials = here.folder / "runs/s/trials"
    wait_for(lambda: any(trials.glob("*/checkpoints/*/manifest.json")) or process.poll() is not None, 240, "a trial")
    return process


def statuses(here: Machine) -> dict[str, str]:
    """The status of each MLflow run by its name."""
    client = MlflowClient(here.environment["MLFLOW_TRACKING_URI"])
    found = client.search_runs([client.get_experiment_by_name("raytrain").experiment_id])
    return {run.info.run_name: run.info.status for run in found}


@pytest.mark.long
def test_a_search_whose_experiment_was_deleted_says_so_and_goes_on_when_it_is_restored(here: Machine) -> None:
    process = begin_search(here, 1500)
    client = MlflowClient(here.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("raytrain").experiment_id
    client.delete_experiment(experiment)
    assert process.wait(300) == 2, here.output()[-3000:]
    assert f"mlflow experiments restore --experiment-id {experiment}" in here.output().splitlines()[-1]
    assert "Traceback" not in here.output()

    client.restore_experiment(experiment)
    said = here.run("-m", "raytrain.tune", "--resume", "s")
    assert "model: models:/raytrain-hybrid@champion" in said
    assert statuses(here) == dict.fromkeys(("s", "000 s", "001 s", "002 s"), "FINISHED")
    trials = TrialStore(open_storage(here.folder / "runs/s")).read()
    assert [trial.status for trial in trials] == ["finished"] * 3


@pytest.mark.long
def test_a_search_goes_on_while_its_tracking_database_is_locked(here: Machine) -> None:
    """As by a backup of it."""
    process = begin_search(here, 600)
    with sqlite3.connect(here.environment["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///"), timeout=60) as connection:
        connection.isolation_level = None
        connection.execute("BEGIN EXCLUSIVE")
        trials = TrialStore(open_storage(here.folder / "runs/s"))
        wait_for(lambda: sum(trial.ended for trial in trials.read()) == 2, 240, "two trials' ends")
        connection.execute("COMMIT")
    connection.close()
    assert process.wait(240) == 0, here.output()[-3000:]
    assert "Traceback" not in here.output()
    assert "another program, such as a backup, keeps the database locked); new trials wait for it" in here.output()
    assert statuses(here) == dict.fromkeys(("s", "000 s", "001 s", "002 s"), "FINISHED")
