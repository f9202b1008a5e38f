"""Searches and runs of seconds: a text, a space, options, the commands on a shared Ray, and the runs in MLflow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TINY = (
    "--model.feature-maps 8 16 --model.decoder-maps 16 8 --model.latent 4 --model.hidden 16 --length 16 "
    "--batch-size 32 --steps 40 --log-every 10 --evaluate-every 5 --evaluate-samples 32 --checkpoint-every 20 "
    "--precision float32"
).split()
SPACE = """
def space(trial):
    return {"objective.alpha": trial.suggest_float("alpha", 0.0, 1.0), "objective.end": 0.1}
"""


def write_text(file: Path) -> None:
    """A text that is not the same everywhere."""
    lines = (f"line {number} of a text that says {number * 7919 % 1000} in words\n" for number in range(2000))
    file.write_text("".join(lines))


def run(cluster: str, home: Path, *arguments: str, timeout: int = 240) -> str:
    """Run a command as a user would, and kill it when it hangs."""
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=home, capture_output=True, text=True, timeout=timeout, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def mlflow_runs(home: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working directory with a text and a search space."""
    write_text(tmp_path / "text.txt")
    (tmp_path / "space.py").write_text(SPACE)
    return tmp_path
