"""Workers that reserve GPUs and compute on the CPU, on a real Ray instance whose GPUs are only numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.ray_instance import assert_nothing_left
from tests.support.tiny import SPACE, TINY, mlflow_runs, write_text

# one evaluation, at the end: the search has no step at which to stop a trial
TINY = [*TINY, "--steps", "10", "--evaluate-every", "10", "--device", "cpu", "--data", "text.txt"]


def run(ray_gpu: str, home: Path, *arguments: str) -> str:
    write_text(home / "text.txt")
    (home / "space.py").write_text(SPACE)
    environment = {**os.environ, "RAY_ADDRESS": ray_gpu}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=home, capture_output=True, text=True, timeout=1800, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_two_workers_hold_two_gpus_and_meet_over_gloo(ray_gpu: str, tmp_path: Path) -> None:
    output = run(ray_gpu, tmp_path, "raytrain.train", "hybrid", *TINY, "--workers", "2", "--name", "r")
    assert "2 x (1 CPU and 1 GPU)" in output
    assert "computed in float32 on cpu" in output
    assert json.loads((tmp_path / "runs/r/run.json").read_text())["worker_options"]["device"] == "cpu"
    assert_nothing_left(ray_gpu)


def test_trials_of_one_worker_hold_their_gpu(ray_gpu: str, tmp_path: Path) -> None:
    search = [*TINY, "--space", "space.py", "--num-samples", "2", "--name", "s"]
    output = run(ray_gpu, tmp_path, "raytrain.tune", "hybrid", *search, "--dry-run")
    assert "each 1 x (1 CPU and 1 GPU) on CPUs" in output
    assert "concurrent trials: 2, 2 of 2 CPUs and 2 of 2 GPUs (2 CPUs and 2 GPUs online)" in output
    assert not (tmp_path / "runs" / "s").exists()
    output = run(ray_gpu, tmp_path, "raytrain.tune", "hybrid", *search)
    assert "computed in float32 on cpu" in output
    assert_nothing_left(ray_gpu)
    assert sorted(item.info.status for item in mlflow_runs(tmp_path)) == ["FINISHED"] * 3
