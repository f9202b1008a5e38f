"""Against a real ``mlflow server`` process that is killed and started again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient

from raytrain import models
from raytrain.config.models import ByteLstmConfig
from raytrain.config.schema import RunConfig, to_dict
from raytrain.models import sampling
from raytrain.runs import trained_model
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.storage import open_storage
from raytrain.tracking.client import check_tracking
from raytrain.tracking.logged_model import log_model
from raytrain.tracking.metric_writer import MetricWriter
from raytrain.tracking.runs import Experiment, Run
from raytrain.utils.errors import UserError
from tests.support.mlflow_server import MlflowServer


@pytest.fixture
def run(mlflow_server: MlflowServer, request: pytest.FixtureRequest) -> Run:
    experiment = Experiment.open(mlflow_server.uri, request.node.name, "/nowhere")
    return experiment.open_run("abc", "a name", parameters={"a": 1}, tags={}, config={"steps": 5})


def test_the_server_owns_the_artifacts(mlflow_server: MlflowServer, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "figure.svg"
    file.write_text("<svg/>")
    run.log_text("text", "samples/final.txt")
    run.log_file(file, "figures")
    (folder,) = mlflow_server.artifacts.glob(f"*/{run.run_id}/artifacts")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "samples/final.txt", "figures/figure.svg"}


def test_the_link_leads_to_the_ui(run: Run) -> None:
    link = run.ui_hint()
    assert link == f"{run.uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}?workflowType=machine_learning"
    with urllib.request.urlopen(link, timeout=20) as answer:
        assert b"MLflow" in answer.read()


def test_a_server_killed_while_metrics_are_logged(mlflow_server: MlflowServer, run: Run) -> None:
    check_tracking(run.uri, num_nodes=8)
    writer = MetricWriter(run.uri, run.run_id, interval_s=0.05)
    away_s: list[float] = []

    def trouble() -> None:
        time.sleep(0.5)
        start = time.monotonic()
        mlflow_server.kill()
        with pytest.raises(UserError, match=f"{run.uri} cannot be used: no answer"):
            check_tracking(run.uri)
        starter = threading.Thread(target=mlflow_server.start)
        starter.start()
        run.describe("waited for the server")
        starter.join()
        away_s.append(time.monotonic() - start)

    with ThreadPoolExecutor() as pool:
        done = pool.submit(trouble)
        step, slowest_s = 0, 0.0
        while not done.done():
            step += 1
            start = time.perf_counter()
            writer.log(step, {"loss": 1 / step, "kl": step})
            slowest_s = max(slowest_s, time.perf_counter() - start)
            time.sleep(0.02)
        done.result()
    assert writer.close(30) == 0
    print(f"away {away_s[0]:.1f} s, {step} steps, slowest log() {slowest_s * 1e3:.2f} ms")
    assert slowest_s < 0.5
    client = MlflowClient(run.uri)
    for key, power in (("loss", -1), ("kl", 1)):
        metrics = sorted(client.get_metric_history(run.run_id, key), key=lambda metric: metric.timestamp)
        assert [(item.step, item.value) for item in metrics] == [(n, float(n) ** power) for n in range(1, step + 1)]
    assert client.get_run(run.run_id).data.tags["mlflow.note.content"] == "waited for the server"


def test_a_model_travels_through_the_server(run: Run, tmp_path: Path) -> None:
    config = RunConfig(model=ByteLstmConfig(layers=1, hidden=8), length=12)
    with CheckpointWriter(open_storage(tmp_path)) as writer:
        writer.save(Snapshot(3, {"model": models.build(config).state_dict()}, {}, to_dict(config)))
    checkpoint = tmp_path / "step-00000003"
    model_id = log_model(run, checkpoint, card="# Tiny", metrics={"valid/bits_per_byte": 8.0}, step=3)
    code = "import mlflow, sys; print(mlflow.pyfunc.load_model(sys.argv[1]).predict([''], params={'num_texts': 2}))"
    command = [sys.executable, "-c", code, f"models:/{model_id}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "MLFLOW_TRACKING_URI": run.uri}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sampling.sample_text(trained_model.load(checkpoint), 2))
