"""A run whose number of workers follows the nodes: it grows, shrinks, and computes the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from raytrain.config.workers import WorkerSpec, parse_workers
from raytrain.runs import checkpoint
from raytrain.storage import open_storage
from raytrain.storage.base import Storage
from raytrain.tracking.client import connect
from tests.support.machine import wait_for
from tests.support.mlflow_server import MlflowServer
from tests.support.tiny import TINY, write_text

STEPS = 12_000
ROOT = Path(__file__).parents[2]


def test_a_range_of_workers_is_read() -> None:
    assert parse_workers("2") == (2, None)
    assert parse_workers("2:8") == (2, 8)
    assert str(WorkerSpec(2, 1.0, 0.0, 8)) == "2:8 x (1 CPU)"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs and one node with one."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "dashboard_host": "127.0.0.1"})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.mark.long
def test_an_elastic_run_grows_and_shrinks_and_computes_the_same(
    cluster: Cluster, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    write_text(tmp_path / "text.txt")
    often = ["--steps", str(STEPS), "--evaluate-every", "1000", "--checkpoint-every", "250", "--data", "text.txt"]

    def start(name: str, workers: str) -> subprocess.Popen[str]:
        command = ["-m", "raytrain.train", "hybrid", *TINY, *often, "--name", name, "--workers", workers]
        environment = {
            **os.environ,
            "RAY_ADDRESS": cluster.address,
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": mlflow_server.uri,
            "RAYTRAIN_STORAGE": str(tmp_path / "runs"),
        }
        output = (tmp_path / f"{name}.txt").open("w")
        return subprocess.Popen(
            [sys.executable, *command, "--cpus-per-worker", "1"],
            cwd=tmp_path, env=environment, stdout=output, stderr=output, text=True,
        )  # fmt: skip

    process = start("elastic", "1:2")
    location = open_storage(tmp_path / "runs/elastic/checkpoints")
    wait_for(lambda: checkpoint.newest_step(location) is not None or process.poll() is not None, 120, "one worker")
    node = cluster.add_node(num_cpus=1)
    wait_for(lambda: workers_now(cluster) == 2 or process.poll() is not None, 180, "two workers")
    grown = checkpoint.newest_step(location) or 0
    wait_for(passes(location, grown + 500, process), 120, "progress of two")
    cluster.remove_node(node, allow_graceful=False)
    shrunk = checkpoint.newest_step(location) or 0
    wait_for(passes(location, shrunk + 500, process), 180, "progress of one again")
    assert process.wait(600) == 0, (tmp_path / "elastic.txt").read_text()[-3000:]
    assert grown < shrunk < STEPS

    assert start("fixed", "1").wait(600) == 0, (tmp_path / "fixed.txt").read_text()[-3000:]
    ends = [checkpoint.latest(open_storage(tmp_path / f"runs/{name}/checkpoints")) for name in ("elastic", "fixed")]
    assert [end.step for end in ends if end is not None] == [STEPS, STEPS]
    bounds = [end.state["best"]["bits_per_byte"] for end in ends if end is not None]
    assert bounds[0] == pytest.approx(bounds[1], rel=0.01)  # sums of two workers are rounded otherwise
    history = connect(mlflow_server.uri).get_metric_history(run_id(mlflow_server, "elastic"), "train/bound")
    assert sorted(point.step for point in history) == list(range(10, STEPS + 1, 10))


def passes(location: Storage, step: int, process: subprocess.Popen[str]) -> Callable[[], bool]:
    return lambda: (checkpoint.newest_step(location) or 0) >= step or process.poll() is not None


def workers_now(cluster: Cluster) -> int:
    """Workers of the worker group that are alive, as the cluster knows."""
    from ray.util.state import list_actors

    actors = list_actors(cluster.address, filters=[("state", "=", "ALIVE"), ("class_name", "=", "RayTrainWorker")])
    return len(actors)


def run_id(server: MlflowServer, name: str) -> str:
    client = connect(server.uri)
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert len(found) == 1
    return str(found[0].info.run_id)
