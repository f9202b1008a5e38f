"""Real searches and runs on a real Ray cluster of two CPUs, with the commands that a user types."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytrain.runs import checkpoint
from raytrain.storage import open_storage
from tests.support.ray_instance import assert_nothing_left
from tests.support.tiny import TINY, mlflow_runs, run

pytestmark = pytest.mark.slow


def test_a_search_of_two_worker_trials_on_two_cpus_ends_and_leaves_nothing(ray_cpu: str, home: Path) -> None:
    output = run(
        ray_cpu, home, "raytrain.tune", "hybrid", *TINY, "--data", "text.txt", "--space", "space.py", "--name", "s",
        "--num-samples", "4", "--workers-per-trial", "2", "--max-concurrent", "2", "--log-every", "5",
    )  # fmt: skip
    assert "4 trials (space, tpe), each 2 x (1 CPU)" in output
    assert "concurrent trials: 1, 2 of 2 CPUs (2 CPUs online)" in output
    assert_nothing_left(ray_cpu)

    runs = mlflow_runs(home)
    parents = [item for item in runs if "mlflow.parentRunId" not in item.data.tags]
    children = [item for item in runs if "mlflow.parentRunId" in item.data.tags]
    assert len(parents) == 1
    assert len(children) == 4
    assert parents[0].info.status == "FINISHED"
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parents[0].info.run_id}
    # ASHA stops some after their annealing (4 steps) and its grace (5 steps), and at least one gets to the end
    finished = [child for child in children if child.info.status == "FINISHED"]
    assert finished
    assert {child.info.status for child in children} <= {"FINISHED", "KILLED"}
    for child in children:
        assert child.data.params["model.feature_maps"] == "[8, 16]"
        for name in ("train/reconstruction", "train/kl", "train/auxiliary", "train/kl_weight", "train/gradient_norm",
                     "train/learning_rate", "train/bytes_per_second", "valid/bits_per_byte", "valid/kl"):  # fmt: skip
            assert name in child.data.metrics
    assert_best_is_logged(home, output, parents[0])


def assert_best_is_logged(home: Path, output: str, parent: Any) -> None:
    """The parent's one model is the best trial's best checkpoint, and writes the samples that were printed."""
    import mlflow
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    models = client.search_logged_models([parent.info.experiment_id])
    assert len(models) == 1
    assert models[0].source_run_id == parent.info.run_id
    scores = [
        stored.score
        for folder in (home / "runs" / "s" / "trials").iterdir()
        if (stored := checkpoint.best(open_storage(folder / "checkpoints"))) is not None and stored.score is not None
    ]
    logged = {metric.key: metric.value for metric in models[0].metrics}
    assert logged["best/bound"] == pytest.approx(min(scores))
    mlflow.set_tracking_uri(f"sqlite:///{home}/mlflow.db")
    text = mlflow.pyfunc.load_model(f"models:/{models[0].model_id}").predict([""], params={"num_texts": 10})
    assert len(text) == 10
    assert all(repr(line) in output for line in text)
    assert "mlflow ui --backend-store-uri" in output
    uri = next(line for line in output.splitlines() if line.startswith("checkpoint: ")).split()[1]
    assert checkpoint.load(uri).score == pytest.approx(min(scores))


def test_a_run_started_again_goes_on_and_an_ended_one_is_not_repeated(ray_cpu: str, home: Path) -> None:
    arguments = ["raytrain.train", "hybrid", *TINY, "--data", "text.txt", "--name", "r", "--workers", "2"]
    first = run(ray_cpu, home, *arguments, "--cpus-per-worker", "1")
    assert "\nreference: byte 3-gram " in first
    assert "step 40/40" in first
    assert "\nwarning: the model has learnt less than counting: it needs " in first
    again = run(ray_cpu, home, *arguments, "--cpus-per-worker", "1")
    assert "has ended already" in again
    # the run as it was after step 20: goes on from there, in the same MLflow run, with the same result
    whole = checkpoint.load(home / "runs/r/checkpoints/step-00000040")
    for step in (35, 40):
        open_storage(home / "runs/r/checkpoints").delete_prefix(f"step-{step:08}")
    (home / "runs/r/outcome.json").unlink()
    run(ray_cpu, home, *arguments, "--cpus-per-worker", "1")
    resumed = checkpoint.load(home / "runs/r/checkpoints/step-00000040")
    assert all((resumed.tensors("model")[name] == tensor).all() for name, tensor in whole.tensors("model").items())
    assert_nothing_left(ray_cpu)
    runs = mlflow_runs(home)
    assert len(runs) == 1
    from mlflow import MlflowClient

    history = MlflowClient(f"sqlite:///{home}/mlflow.db").get_metric_history(runs[0].info.run_id, "valid/bound")
    assert sorted(metric.step for metric in history) == list(range(5, 41, 5))

    refused = subprocess.run(
        [sys.executable, "-m", *arguments, "--objective.alpha", "0.9"],
        cwd=home, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "RAY_ADDRESS": ray_cpu},
    )  # fmt: skip
    assert refused.returncode == 2
    assert "--name r belongs to a run with another config (objective.alpha was 1.0, is 0.9)" in refused.stderr


def test_trials_that_diverge_are_counted_and_the_others_go_on(ray_cpu: str, home: Path) -> None:
    (home / "space.py").write_text(
        "def space(trial):\n"
        "    rate = 1e39 if trial.number == 0 else 1e-3\n"
        "    return {'optimizer.learning_rate': rate, 'objective.annealing': 'constant'}\n"
    )
    output = run(
        ray_cpu, home, "raytrain.tune", "hybrid", *TINY, "--data", "text.txt", "--space", "space.py",
        "--num-samples", "2",
    )  # fmt: skip
    assert "early_stopped" in output
    assert_nothing_left(ray_cpu)
    children = [item for item in mlflow_runs(home) if "mlflow.parentRunId" in item.data.tags]
    assert sorted(child.info.status for child in children) == ["FINISHED", "KILLED"]
    failed = next(child for child in children if child.info.status == "KILLED")
    assert "not finite" in failed.data.tags["raytrain.reason"]


def test_a_search_that_cannot_fit_says_so_at_once(ray_cpu: str, home: Path) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "raytrain.tune", "hybrid", *TINY, "--data", "text.txt", "--space", "space.py",
         "--workers-per-trial", "2", "--cpus-per-worker", "2"],
        cwd=home, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "RAY_ADDRESS": ray_cpu},
    )  # fmt: skip
    assert done.returncode == 2
    assert "a run needs 2 x (2 CPU), but only 1 of these workers fit" in done.stderr
    assert time.monotonic() - started < 60
    assert_nothing_left(ray_cpu)
