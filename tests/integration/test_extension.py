"""A model, a KL schedule, a sampler and a metric from outside the package, in a search and all that follows it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from mlflow import MlflowClient

from raytrain.runs.trials import TRIALS
from raytrain.storage import open_storage
from tests.support.ray_instance import assert_nothing_left
from tests.support.tiny import TINY, mlflow_runs, run, write_text
from tests.unit.config.test_plugins import PLUGIN

pytestmark = pytest.mark.slow

MORE = """
import optuna

from raytrain.metrics import METRICS, Metric
from raytrain.search.algorithms import SAMPLERS


class InOrder(optuna.samplers.BaseSampler):
    # draws the choices of each parameter one after the other
    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, name, distribution):
        return distribution.choices[trial.number % len(distribution.choices)]


SAMPLERS["first"] = lambda plan, seed: InOrder()
METRICS["width"] = Metric(
    "width", label="width", unit="units", digits=0, better="neither",
    compute=lambda model, metrics: float(model.gru.hidden_size),
)
"""
SPACE = """
def space(trial):
    return {
        "model.hidden": trial.suggest_categorical("hidden", [8, 12]),
        "objective.annealing": "square",
        "objective.end": 0.25,
    }
"""
SHORT = (
    "--length 16 --batch-size 32 --steps 20 --log-every 5 --evaluate-every 5 --evaluate-samples 32 "
    "--checkpoint-every 10 --precision float32"
).split()


def test_what_is_only_registered_is_searched_evaluated_sampled_and_reported(
    ray_cpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy.py").write_text(PLUGIN + MORE)
    (tmp_path / "space.py").write_text(SPACE)
    write_text(tmp_path / "text.txt")
    monkeypatch.setenv("RAYTRAIN_PLUGINS", str(tmp_path / "toy.py"))

    output = run(
        ray_cpu, tmp_path, "raytrain.tune", "toy", *SHORT, "--data", "text.txt", "--space", "space.py", "--name", "s",
        "--num-samples", "2", "--algorithm", "first",
    )  # fmt: skip
    assert_nothing_left(ray_cpu)
    assert "2 trials (space, first)" in output
    assert "model: models:/raytrain-toy@champion" in output

    storage = open_storage(tmp_path / "runs" / "s")
    records = [json.loads(storage.read(key)) for key in storage.list(TRIALS) if key.endswith("trial.json")]
    assert sorted(record["best"]["width"] for record in records) == [8, 12]  # the sampler draws each point once
    assert {record["config"]["objective"]["annealing"] for record in records} == {"square"}
    runs = mlflow_runs(tmp_path)
    (parent,) = [item for item in runs if "mlflow.parentRunId" not in item.data.tags]
    for child in (item for item in runs if "mlflow.parentRunId" in item.data.tags):
        assert child.data.metrics["valid/width"] == int(child.data.params["model.hidden"])
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    table = client.download_artifacts(parent.info.run_id, "trials.parquet", str(tmp_path))
    assert sorted(pyarrow.parquet.read_table(table)["width"].to_pylist()) == [8, 12]

    written = run(ray_cpu, tmp_path, "raytrain.sample", "models:/raytrain-toy@champion", "--num", "3")
    assert written.count("\n") == 3
    measured = run(
        ray_cpu, tmp_path, "raytrain.evaluate", "runs/s", "--evaluate-samples", "16", "--num-texts", "4",
        "--output", "evaluation.json",
    )  # fmt: skip
    assert "bits/byte" in measured
    assert json.loads((tmp_path / "evaluation.json").read_text())["model"] == "toy"
    reported = run(ray_cpu, tmp_path, "raytrain.report", "search", "s")
    assert "written: report-s/" in reported
    assert "width" in next((tmp_path / "report-s").glob("*.html")).read_text()

    # without the plugin what it has left is a mistake of one line, and runs no code
    monkeypatch.delenv("RAYTRAIN_PLUGINS")
    with pytest.raises(AssertionError, match="RAYTRAIN_PLUGINS"):
        run(ray_cpu, tmp_path, "raytrain.sample", "runs/s")


BROKEN = """
import optuna

from raytrain.search.algorithms import SAMPLERS


class Broken(optuna.samplers.RandomSampler):
    def after_trial(self, study, trial, state, values):
        raise ValueError("it cannot count")


SAMPLERS["broken"] = lambda plan, seed: Broken(seed=seed)
"""


def test_a_sampler_that_raises_ends_the_search_with_its_error(
    ray_cpu: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("RAYTRAIN_PLUGINS", str(home / "broken.py"))
    with pytest.raises(AssertionError) as failed:
        run(
            ray_cpu, home, "raytrain.tune", "hybrid", *TINY, "--data", "text.txt", "--space", "space.py", "--name", "b",
            "--num-samples", "4", "--max-concurrent", "1", "--algorithm", "broken",
        )  # fmt: skip
    assert "error: the sampler broken failed: ValueError('it cannot count')" in str(failed.value)
    assert "resume with: python -m raytrain.tune --resume b" in str(failed.value)
    assert_nothing_left(ray_cpu)
    storage = open_storage(home / "runs" / "b")
    records = [json.loads(storage.read(key)) for key in storage.list(TRIALS) if key.endswith("trial.json")]
    assert len(records) < 4
