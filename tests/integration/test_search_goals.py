"""Real searches that look for a front or for a KL, start from known configs and end hopeless trials."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from raytrain.config.schema import ObjectiveConfig, OptimizerConfig, to_dict
from raytrain.runs.trials import TrialStore
from raytrain.storage import open_storage
from tests.conftest import tiny_config
from tests.support.ray_instance import assert_nothing_left
from tests.support.tiny import TINY, mlflow_runs, run

pytestmark = pytest.mark.slow

LONGER = [*TINY, "--steps", "240", "--evaluate-every", "40", "--optimizer.learning-rate", "0.01"]
"""Long enough for a trial to be judged."""


def refused(ray_cpu: str, home: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=home, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "RAY_ADDRESS": ray_cpu},
    )  # fmt: skip
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stderr


def write_config(file: Path, learning_rate: float) -> None:
    config = tiny_config("hybrid", optimizer=OptimizerConfig(learning_rate=learning_rate))
    file.write_text(json.dumps(to_dict(replace(config, objective=ObjectiveConfig(annealing="constant")))))


def table(home: Path, search: Any) -> dict[str, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    return dict(pyarrow.parquet.read_table(client.download_artifacts(search.info.run_id, "trials.parquet")).to_pydict())


def test_a_front_with_hopeless_trials_and_starts_and_what_is_built_upon_it(ray_cpu: str, home: Path) -> None:
    write_config(home / "asleep.json", 1e-9)
    write_config(home / "wild.json", 1e38)
    output = run(
        ray_cpu, home, "raytrain.tune", "hybrid", *LONGER, "--data", "text.txt", "--space", "space.py", "--name", "f",
        "--search-objective", "pareto", "--objective.end", "0.2", "--num-samples", "4",
        "--warm-start", "asleep.json", "wild.json",
    )  # fmt: skip
    assert "objective: low negative ELBO and much of the code used" in output
    assert "Pareto front: no trial beats these in both negative ELBO and use of the code" in output
    assert "(from asleep.json)" in output
    assert_nothing_left(ray_cpu)
    trials = TrialStore(open_storage(home / "runs" / "f")).read()
    assert [trial.origin for trial in trials] == ["asleep.json", "wild.json", "", ""]
    # no other trial was stopped for being behind, the two were not evaluated again after they were hopeless
    assert [trial.status for trial in trials] == ["early_stopped", "early_stopped", "finished", "finished"]
    assert "early-stopped at step 200 of 240: its negative ELBO of" in trials[0].reason
    assert "not finite at step 10" in trials[1].reason
    assert [len(trial.history) for trial in trials] == [5, 0, 6, 6]
    assert trials[0].config.steps == 240

    runs = mlflow_runs(home)
    children = {item.data.tags["raytrain.trial"]: item for item in runs if "mlflow.parentRunId" in item.data.tags}
    assert [children[number].info.status for number in "0123"] == ["KILLED", "KILLED", "FINISHED", "FINISHED"]
    assert "early-stopped at step 200" in children["0"].data.tags["raytrain.reason"]
    assert children["1"].data.tags["raytrain.started_from"] == "wild.json"
    parent = next(item for item in runs if "mlflow.parentRunId" not in item.data.tags)
    columns = table(home, parent)
    assert columns["origin"] == ["asleep.json", "wild.json", "", ""]
    assert columns["status"][:2] == ["early_stopped", "early_stopped"]
    assert any(columns["front"])
    assert parent.data.params["search.objective"] == "pareto"

    best = parent.data.tags["raytrain.best_trial"]
    longer = run(
        ray_cpu, home, "raytrain.train", "--best-of", "f", "--steps", "20", "--seed", "5", "--cpus-per-worker", "1",
        "--name", "longer",
    )  # fmt: skip
    assert f"config of trial {best} of the search f" in longer
    built = next(item for item in mlflow_runs(home) if item.info.run_name == "longer")
    assert built.data.tags["raytrain.best_of"] == f"{parent.info.run_id} trial {best}"
    assert (built.data.params["steps"], built.data.params["seed"]) == ("20", "5")
    assert float(built.data.params["objective.alpha"]) == trials[int(best)].config.objective.alpha
    assert "--resume f takes no --search-objective" in refused(
        ray_cpu, home, "raytrain.tune", "--resume", "f", "--search-objective", "nll"
    )
    assert_nothing_left(ray_cpu)


def test_a_search_without_a_winner_says_so_and_registers_nothing(ray_cpu: str, home: Path) -> None:
    arguments = (
        "raytrain.tune", "hybrid", *TINY, "--data", "text.txt", "--space", "space.py", "--name", "n", "--num-samples",
        "2", "--search-objective", "nll",
    )  # fmt: skip
    output = run(ray_cpu, home, *arguments, "--min-used", "1000")
    assert "NLL" in output
    assert "cannot win, since they use less than 1000 nats of the code: " in output
    assert "no trial uses at least 1000 nats of its code" in output
    runs = mlflow_runs(home)
    parent = next(item for item in runs if "mlflow.parentRunId" not in item.data.tags)
    assert parent.info.status == "FINISHED"
    assert "no model is registered" in parent.data.tags["mlflow.note.content"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    assert not client.search_registered_models()
    finished = next(item for item in runs if item.info.run_name.startswith("000"))
    for name in ("valid/nll", "valid/nll_bits_per_byte", "best/nll"):
        assert name in finished.data.metrics
    assert finished.data.metrics["best/nll"] <= finished.data.metrics["best/bound"]
    assert all(value is not None for value in table(home, parent)["nll_bits_per_byte"])
    assert_nothing_left(ray_cpu)
    changed = refused(ray_cpu, home, *arguments, "--min-used", "1")
    assert "min_used was 1000.0, is 1.0" in changed


@pytest.mark.long
def test_the_winner_of_a_search_is_ablated(ray_cpu: str, home: Path) -> None:
    run(
        ray_cpu, home, "raytrain.tune", "hybrid", *TINY, "--data", "text.txt", "--space", "space.py", "--name", "s",
        "--num-samples", "1",
    )  # fmt: skip
    output = run(ray_cpu, home, "raytrain.tune", "--ablate", "s", "--confirm", "3:1")
    text = output[output.index("the winner of s with the default in place of a field:") :].splitlines()[1:3]
    assert {line.split()[0] for line in text} == {"objective.alpha", "objective.end"}
    assert all("95% interval" in line for line in text)
    parent = next(item for item in mlflow_runs(home) if item.info.run_name == "s-ablation")
    from mlflow import MlflowClient

    file = MlflowClient(f"sqlite:///{home}/mlflow.db").download_artifacts(parent.info.run_id, "ablation.json")
    effects = json.loads(Path(file).read_text())["effects"]
    assert {effect["without"] for effect in effects} == {"objective.alpha", "objective.end"}
    again = run(ray_cpu, home, "raytrain.tune", "--resume", "s-ablation")
    assert text[0] in again
    # neither run has registered a model, and the same command goes on with the same ablation
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    assert len(client.search_model_versions("name = 'raytrain-hybrid'")) == 1
    assert text[0] in run(ray_cpu, home, "raytrain.tune", "--ablate", "s")
    assert_nothing_left(ray_cpu)
