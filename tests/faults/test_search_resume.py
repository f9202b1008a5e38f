"""A search whose driver is killed again and again ends as one that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytrain.metrics import SearchObjective
from raytrain.runs import checkpoint
from raytrain.runs.records import STUDY
from raytrain.runs.repeats import Confirm, winner
from raytrain.runs.trials import Trial, TrialStore, rank
from raytrain.storage.lease import take
from raytrain.storage.local import FolderStorage
from tests.support.ray_instance import assert_nothing_left
from tests.support.stored_study import check_agreement, opened

ROOT = Path(__file__).parents[2]
ARGUMENTS = (
    "hybrid --model.feature-maps 8 16 --model.decoder-maps 16 8 --model.latent 4 --model.hidden 16 --length 16 "
    "--batch-size 32 --steps 80 --log-every 5 --evaluate-every 10 --evaluate-samples 32 --checkpoint-every 20 "
    "--precision float32 --data text.txt --space space.py --name s"
).split()
SPACE = """
ALGORITHM = "grid"
def space(trial):
    return {
        "objective.alpha": trial.suggest_categorical("alpha", [0.0, 0.5]),
        "optimizer.learning_rate": trial.suggest_categorical("rate", [1e-4, 1e-3, 3e-3, 1e-2]),
    }
"""
MOMENTS = {
    "a trial's MLflow run is there, and nothing in it": "raytrain.tracking.runs:Run.log_parameters:4",
    "a trial is running": "raytrain.search.recorder:TrialRecorder.on_trial_result:13",
    "a trial has ended, and MLflow and its record do not know": "raytrain.tracking.runs:Run.finish:2",
    "the best model is logged and not registered": "raytrain.search.finish:register_and_compete:1",
}


def begin(ray_cpu: str, home: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command in ``home``, its output in ``output.txt``."""
    home.mkdir(exist_ok=True)
    lines = (f"line {number} of a text that says {number * 7919 % 1000} in words\n" for number in range(2000))
    (home / "text.txt").write_text("".join(lines))
    (home / "space.py").write_text(SPACE)
    environment = {**os.environ, "RAY_ADDRESS": ray_cpu, "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (home / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=home, stdout=output, stderr=output, text=True, env=environment
        )


def end(process: subprocess.Popen[str], home: Path, status: int) -> None:
    """Wait for it; no search takes ten minutes."""
    try:
        found = process.wait(600)
    finally:
        process.kill()
    assert found == status, (home / "output.txt").read_text()[-5000:]


@pytest.fixture(scope="module")
def undisturbed(ray_cpu: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a search ran to its end at once."""
    home = tmp_path_factory.mktemp("undisturbed")
    end(begin(ray_cpu, home, "raytrain.tune", *ARGUMENTS), home, 0)
    return home


@pytest.mark.parametrize(
    "moments", [["a trial is running"], pytest.param(list(MOMENTS), marks=pytest.mark.long)], ids=["one", "all"]
)
def test_killed_at_the_worst_moments(ray_cpu: str, undisturbed: Path, tmp_path: Path, moments: list[str]) -> None:
    command = ARGUMENTS
    for moment in map(MOMENTS.get, moments):
        assert moment is not None
        end(begin(ray_cpu, tmp_path, "tests.support.killed", moment, *command), tmp_path, -signal.SIGKILL)
        command = ["--resume", "s"]
    end(begin(ray_cpu, tmp_path, "raytrain.tune", *command), tmp_path, 0)
    assert_the_same(tmp_path, undisturbed)
    assert_nothing_left(ray_cpu)


def test_killed_when_it_is_told_of_a_trials_last_evaluation(ray_cpu: str, undisturbed: Path, tmp_path: Path) -> None:
    """The checkpoint of that step is in the storage, and neither the record nor MLflow knows of it."""
    command = (*ARGUMENTS, "--num-samples", "2", "--max-concurrent", "1")
    moment = "raytrain.search.recorder:TrialRecorder.on_trial_result:8"
    end(begin(ray_cpu, tmp_path, "tests.support.killed", moment, *command), tmp_path, -signal.SIGKILL)
    assert [trial.step for trial in trials(tmp_path)] == [70]
    end(begin(ray_cpu, tmp_path, "raytrain.tune", "--resume", "s"), tmp_path, 0)
    mine, theirs = trials(tmp_path), trials(undisturbed)[:2]
    assert [trial.status for trial in mine] == ["finished"] * 2
    assert [(trial.step, trial.best, trial.history) for trial in mine] == [
        (trial.step, trial.best, trial.history) for trial in theirs
    ]
    stored = [
        checkpoint.best(FolderStorage(tmp_path / f"runs/s/trials/{trial.identity}/checkpoints")) for trial in mine
    ]
    assert [found and found.score for found in stored] == [trial.best["bound"] for trial in mine]
    client, _ = mlflow(tmp_path)
    (version,) = client.search_model_versions()
    won = rank(mine, SearchObjective())[0].best
    assert json.loads(version.tags["raytrain.metrics"]) == won
    assert float(version.tags["raytrain.value"]) == won["bits_per_byte"]


def test_a_driver_that_was_followed_by_another_ends_and_changes_nothing_more(
    ray_cpu: str, undisturbed: Path, tmp_path: Path
) -> None:
    """As one that was cut off from its storage for so long that another host has resumed the search."""
    first = begin(ray_cpu, tmp_path, "raytrain.tune", *ARGUMENTS)
    wait_for_trials(tmp_path, first)
    location = FolderStorage(tmp_path / "runs" / "s")
    second = take(location, 1, "s")
    time.sleep(1)  # for a write that was under way
    before = {key: location.read(key) for key in location.list() if not key.endswith("00000002.json")}
    end(first, tmp_path, 2)
    assert {key: location.read(key) for key in before} == before
    assert set(location.list()) - before.keys() == {"leases/00000002.json"}
    output = (tmp_path / "output.txt").read_text()
    assert f"error: {location.uri()} was taken over by user" in output
    assert "resume with" not in output
    client, experiment = mlflow(tmp_path)
    assert {run.info.status for run in client.search_runs([experiment])} == {"RUNNING"}
    end(begin(ray_cpu, tmp_path, "raytrain.tune", "--resume", "s"), tmp_path, 2)
    second.release()
    end(begin(ray_cpu, tmp_path, "raytrain.tune", "--resume", "s"), tmp_path, 0)
    assert_the_same(tmp_path, undisturbed)
    assert_nothing_left(ray_cpu)


def test_killed_while_the_winner_is_confirmed(ray_cpu: str, tmp_path: Path) -> None:
    """Two repeats have ended, the third is at work, the fourth is not recorded: the same winner, same figures."""
    command = (*ARGUMENTS, "--num-samples", "2", "--max-concurrent", "1", "--confirm", "2:2", "--confirm-steps", "40")
    homes = [tmp_path / "undisturbed", tmp_path / "killed"]
    end(begin(ray_cpu, homes[0], "raytrain.tune", *command), homes[0], 0)
    # two trials of 8 evaluations, then repeats of 4
    moment = "raytrain.search.recorder:TrialRecorder.on_trial_result:26"
    end(begin(ray_cpu, homes[1], "tests.support.killed", moment, *command), homes[1], -signal.SIGKILL)
    assert [(trial.confirms, trial.status) for trial in trials(homes[1])[2:]] == [
        (1, "finished"), (0, "finished"), (1, "running"),
    ]  # fmt: skip
    end(begin(ray_cpu, homes[1], "raytrain.tune", "--resume", "s"), homes[1], 0)
    theirs, mine = map(trials, homes)
    assert [(trial.confirms, trial.config, trial.status, trial.best, trial.history) for trial in mine] == [
        (trial.confirms, trial.config, trial.status, trial.best, trial.history) for trial in theirs
    ]
    assert [(trial.config.seed, trial.config.steps) for trial in mine[2:]] == [
        (1000, 40), (1000, 40), (1001, 40), (1001, 40),
    ]  # fmt: skip
    found = [confirmation(home) for home in homes]
    assert found[0] == found[1]
    assert found[0]["difference"]["samples"] == 32
    assert found[0]["difference"]["seeds"] == 2
    client, experiment = mlflow(homes[1])
    (parent,) = (run for run in client.search_runs([experiment]) if "mlflow.parentRunId" not in run.data.tags)
    best = winner(mine, SearchObjective(), Confirm(configs=2, seeds=2, first_seed=1000, steps=40))
    assert best is not None
    assert best.confirms == int(found[0]["winner"])
    assert parent.data.tags["raytrain.best_trial"] == best.name
    (version,) = client.search_model_versions()
    assert f"best seed of the winner, seed {best.config.seed}" in version.description
    assert found[0]["sentence"] in version.description
    assert json.loads(version.tags["raytrain.metrics"]) == best.best
    assert_nothing_left(ray_cpu)


def confirmation(home: Path) -> Any:
    """What the search has logged of its confirmation."""
    client, experiment = mlflow(home)
    (parent,) = (run for run in client.search_runs([experiment]) if "mlflow.parentRunId" not in run.data.tags)
    return json.loads(Path(client.download_artifacts(parent.info.run_id, "confirmation.json")).read_text())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_killed_twice_at_any_moment(ray_cpu: str, undisturbed: Path, tmp_path: Path, seed: int) -> None:
    chance, command = random.Random(seed), ["raytrain.tune", *ARGUMENTS]
    for _ in range(2):
        process = begin(ray_cpu, tmp_path, *command)
        wait_for_trials(tmp_path, process)
        time.sleep(chance.uniform(0, 20))
        process.kill()
        process.wait()
        command = ["raytrain.tune", "--resume", "s"]
    end(begin(ray_cpu, tmp_path, *command), tmp_path, 0)
    assert_the_same(tmp_path, undisturbed)
    assert_nothing_left(ray_cpu)


def wait_for_trials(home: Path, process: subprocess.Popen[str]) -> None:
    """Until the search is recorded: before, there is nothing to resume."""
    deadline = time.monotonic() + 300
    while not list(home.glob("runs/s/trials/*/trial.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_the_same(home: Path, other: Path) -> None:
    """The same trials with the same figures and histories, each in one MLflow run, and the same best model."""
    mine, theirs = trials(home), trials(other)
    assert [trial.number for trial in mine] == list(range(8))
    assert [trial.status for trial in mine] == ["finished"] * 8
    assert [(trial.best, trial.history) for trial in mine] == [(trial.best, trial.history) for trial in theirs]
    assert rank(mine, SearchObjective())[0].number == rank(theirs, SearchObjective())[0].number
    assert not {trial.identity for trial in mine} & {trial.identity for trial in theirs}
    found, expected = histories(home), histories(other)
    assert found.keys() == expected.keys() == {str(trial.number) for trial in mine}
    assert found == expected
    assert models(home) == models(other) == (1, 1)
    check_agreement(opened(home / "runs" / "s" / STUDY), mine, SearchObjective())


def trials(home: Path) -> list[Trial]:
    return TrialStore(FolderStorage(home / "runs" / "s")).read()


def histories(home: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Of each trial what MLflow has, but for what the clock decides: (step, value) of every metric."""
    client, experiment = mlflow(home)
    runs = [run for run in client.search_runs([experiment]) if "mlflow.parentRunId" in run.data.tags]
    assert len(runs) == 8
    assert {run.info.status for run in runs} == {"FINISHED"}
    histories = {}
    for run in runs:
        names = [name for name in run.data.metrics if not name.startswith("system/") and "per_second" not in name]
        histories[run.data.tags["raytrain.trial"]] = {
            name: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
            for name in names
        }
        assert [step for step, _ in histories[run.data.tags["raytrain.trial"]]["valid/bound"]] == [*range(10, 81, 10)]
    return histories


def models(home: Path) -> tuple[int, int]:
    """How many models are logged, and how many versions are registered."""
    client, experiment = mlflow(home)
    return len(client.search_logged_models([experiment])), len(client.search_model_versions())


def mlflow(home: Path) -> tuple[Any, str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    return client, experiment.experiment_id
