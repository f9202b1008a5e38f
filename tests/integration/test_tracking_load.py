"""Many trials at once, and the servers that docs/guides/mlflow.md says how to start."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from raytrain.config.presets import preset
from raytrain.data.corpus import Corpus
from raytrain.storage import open_storage
from raytrain.tracking.client import check_tracking
from raytrain.tracking.metric_writer import MetricWriter
from raytrain.tracking.runs import Experiment
from raytrain.training.loop import train
from raytrain.training.trainer import World
from tests.integration.tracking_load import Load, measure
from tests.support.mlflow_server import MlflowServer
from tests.support.postgres_server import PostgresServer

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "guides" / "mlflow.md"


def test_64_trials_on_sqlite_lose_nothing(mlflow_server: MlflowServer) -> None:
    result = measure(mlflow_server, Load(trials=64, seconds=10))
    print(result)
    assert (result.lost, result.duplicated) == (0, 0)
    assert result.logging_share < 0.005


def test_64_trials_on_postgresql_lose_nothing(postgres_server: PostgresServer, tmp_path: Path) -> None:
    server = MlflowServer(tmp_path, postgres_server.create_database("load"))
    try:
        server.start()
        result = measure(server, Load(trials=64, seconds=10), postgres_server)
    finally:
        server.kill()
    print(result)
    assert (result.lost, result.duplicated) == (0, 0)
    assert result.logging_share < 0.005
    assert postgres_server.password not in (tmp_path / "server.log").read_text()


class WriterReport:
    """The loop's metrics to MLflow, as ``workers.RayReport`` sends them."""

    def __init__(self, writer: MetricWriter) -> None:
        self.log = writer.log
        self.pending = writer.pending
        self.replay = writer.replay

    def resumed(self, evaluations: list[dict[str, float]]) -> None:
        """Nobody has missed any."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Nobody stops this run."""

    def preemption_notice(self) -> bool:
        return False


def test_logging_takes_less_than_half_a_percent_of_a_step(
    mlflow_server: MlflowServer, corpus: Corpus, tmp_path: Path
) -> None:
    experiment = Experiment.open(mlflow_server.uri, "share", "/nowhere")
    run = experiment.open_run("share", "share", parameters={}, tags={})
    config = replace(
        preset("laptop", "hybrid"), steps=75, log_every=25, evaluate_every=75, evaluate_samples=64, checkpoint_every=75
    )
    writer = MetricWriter(run.uri, run.run_id)
    start = time.perf_counter()
    train(config, corpus, World(), open_storage(tmp_path), WriterReport(writer))
    elapsed = time.perf_counter() - start
    print(f"{writer.seconds_logging * 1e6:.0f} us of {elapsed:.2f} s = {writer.seconds_logging / elapsed:.7%}")
    assert 0 < writer.seconds_logging < 0.005 * elapsed
    assert writer.close(30) == 0
    history = MlflowClient(run.uri).get_metric_history(run.run_id, "train/bound")
    assert sorted(metric.step for metric in history) == [25, 50, 75]


# ------------------------------------------------------------------------------------------- what the page says


def commands(marker: str) -> str:
    """The shell commands that follow ``<!-- marker -->`` in the page."""
    found = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None, f"{DOCUMENT} has no {marker!r}"
    return found[1]


@contextlib.contextmanager
def started(script: str, folder: Path) -> Iterator[str]:
    """Run the page's commands on a free port and in ``folder``; gives the server's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for printed, used in {"--port 5000": f"--port {port}", "/srv/mlflow": str(folder)}.items():
        assert printed in script
        script = script.replace(printed, used)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with (folder.parent / "server.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-ec", script], env=environment, cwd=folder.parent, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while status(f"http://127.0.0.1:{port}/health") != 200:
            assert process.poll() is None, (folder.parent / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def status(url: str, data: bytes | None = None, **headers: str) -> int | None:
    """The status of an answer, ``None`` without one."""
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, OSError):
        return None


def test_the_documented_server_starts_and_stands_bursts(tmp_path: Path) -> None:
    with started(commands("server command"), tmp_path / "mlflow") as uri:
        check_tracking(uri, num_nodes=8)
        client = MlflowClient(uri)
        experiment = Experiment.open(uri, "burst", "/nowhere").experiment_id
        runs = [client.create_run(experiment).info.run_id for _ in range(64)]
        client.log_text(runs[0], "text", "a/file.txt")
        assert list((tmp_path / "mlflow" / "artifacts").rglob("file.txt"))
        together = threading.Barrier(len(runs))

        def bursts(run_id: str) -> float:
            slowest = 0.0
            for step in range(5):
                together.wait(40)
                start = time.monotonic()
                client.log_batch(run_id, [Metric(f"metric{number}", 1.0, 1, step) for number in range(10)])
                slowest = max(slowest, time.monotonic() - start)
            return slowest

        with ThreadPoolExecutor(len(runs)) as pool:
            slowest = max(pool.map(bursts, runs))
        print(f"{len(runs)} requests at once: the slowest took {slowest:.2f} s")
        assert slowest < 25, "as long as MLflow waits for a database connection: the pool is too small"
        assert (tmp_path / "mlflow" / "mlflow.db").exists()


def test_a_host_name_needs_both_options(tmp_path: Path) -> None:
    script = commands("server command").rstrip()
    (options,) = re.findall(r"--allowed-hosts .*\n  --cors-allowed-origins .*", DOCUMENT.read_text())
    page: dict[str, Any] = {"Host": "mlflow.internal:5000"}
    search = b'{"experiment_ids": ["0"]}'
    with started(f"{script} {options}\n", tmp_path / "mlflow") as uri:
        api = f"{uri}/ajax-api/2.0/mlflow/runs/search"
        assert status(f"{uri}/", Host="mlflow.internal:5000") == 200
        assert status(api, search, Origin="http://mlflow.internal:5000", **page) == 200
        assert status(api, search, Origin="http://elsewhere.example", **page) == 403
        assert status(f"{uri}/", Host="elsewhere.example") == 403
        check_tracking(uri)
