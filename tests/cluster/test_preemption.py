"""Machines of a real Ray cluster that are taken away with notice, under a run and under a search."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrain.config.schema import from_dict
from raytrain.data.corpus import Corpus
from raytrain.runs import checkpoint
from raytrain.storage import open_storage
from raytrain.tracking.client import connect
from raytrain.training.loop import train
from raytrain.training.trainer import World
from tests.support.machine import Machine, wait_for
from tests.support.metadata_server import ACTION, MetadataServer
from tests.support.mlflow_server import MlflowServer
from tests.support.nodes import Nodes
from tests.support.tiny import SPACE, write_text
from tests.unit.cluster.test_spot import assert_same
from tests.unit.training.test_loop import Recorder, on_workers

pytestmark = pytest.mark.long

TOKEN = "0123456789abcdef0123456789abcdef"
STEPS = 1500
SMALL = (
    f"--model.feature-maps 8 16 --model.decoder-maps 16 8 --model.latent 4 --model.hidden 16 --length 16 "
    f"--batch-size 32 --steps {STEPS} --log-every 5 --evaluate-every {STEPS} --evaluate-samples 32 "
    f"--checkpoint-every {STEPS} --precision float32 --data text.txt --storage runs"
).split()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path_factory.mktemp("cluster"), TOKEN)
    yield nodes
    nodes.close()


@pytest.fixture
def machine(nodes: Nodes, mlflow_server: MlflowServer, tmp_path: Path) -> Machine:
    """Where the command is typed."""
    ray = {name: value for name, value in nodes.environment.items() if name.startswith("RAY_")}
    machine = Machine(
        tmp_path / "here", {**ray, "RAY_ADDRESS": nodes.address, "MLFLOW_TRACKING_URI": mlflow_server.uri}
    )
    write_text(machine.folder / "text.txt")
    return machine


@pytest.fixture
def watch(nodes: Nodes, metadata_server: MetadataServer, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Starts the watcher of a node; returns the file of what it says."""
    watchers = []

    def start(node_id: str) -> Path:
        said = tmp_path / f"watcher-{node_id[:8]}.txt"
        environment = {**nodes.environment, "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata_server.uri}
        options = ["--address", nodes.address, "--node-id", node_id, "--interval", "0.5"]
        with said.open("w") as file:
            watchers.append(
                subprocess.Popen([sys.executable, "-m", "raytrain.spot", *options], env=environment, stderr=file)
            )
        wait_for(lambda: "for a preemption notice" in said.read_text(), 120, "the watcher")
        return said

    yield start
    for watcher in watchers:
        watcher.kill()
        watcher.wait()


def the_run(server: MlflowServer, name: str) -> Any:
    client = connect(server.uri)
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return found


def steps_in_mlflow(server: MlflowServer, run: Any, metric: str = "train/bound") -> list[int]:
    return sorted(point.step for point in connect(server.uri).get_metric_history(run.info.run_id, metric))


def undisturbed(world: World, corpus: Path, config: dict[str, Any], folder: Path) -> None:
    train(from_dict(config), Corpus.open(corpus), world, open_storage(folder), Recorder())


def test_a_run_on_two_nodes_goes_on_where_one_was_taken_away(
    nodes: Nodes, machine: Machine, watch: Callable[[str], Path], metadata_server: MetadataServer,
    mlflow_server: MlflowServer, tmp_path: Path,
) -> None:  # fmt: skip
    nodes.add("one")
    doomed = nodes.add("two")
    said = watch(doomed)
    process = machine.start("-m", "raytrain.train", "hybrid", *SMALL, "--workers", "2", "--name", "spot")
    location = open_storage(machine.folder / "runs/spot/checkpoints")
    try:
        wait_for(lambda: "step" in machine.output() or process.poll() is not None, 300, "a first step")
        assert not location.list()
        metadata_server.pages[ACTION] = {"action": "terminate", "time": "2100-01-01T00:00:00Z"}
        wait_for(lambda: "saved at step" in machine.output() or process.poll() is not None, 120, "the notice")
        saved = int(re.findall(r"saved at step (\d+)", machine.output())[0])
        assert 0 < saved < STEPS
        stored = checkpoint.latest(location)
        assert stored is not None
        assert stored.step == saved
        run = the_run(mlflow_server, "spot")
        assert steps_in_mlflow(mlflow_server, run) == list(range(5, saved + 1, 5))
        # nothing works on it any more: it has left the cluster before its machine is taken
        wait_for(lambda: doomed not in nodes.alive(), 30, "the end of the node")
        assert "will terminate this instance" in said.read_text()
        assert said.read_text().count(f"node {doomed} is drained") == 1
        nodes.remove("two")
        assert process.poll() is None
        nodes.add("three")
        assert process.wait(400) == 0, machine.output()[-3000:]
    finally:
        process.kill()
    run = the_run(mlflow_server, "spot")
    assert run.info.status == "FINISHED"
    assert steps_in_mlflow(mlflow_server, run) == list(range(5, STEPS + 1, 5))
    (corpus,) = (machine.folder / "runs").glob(".cache/corpora/*/corpus.json")
    on_workers(2, undisturbed, corpus.parent, stored.config, tmp_path / "undisturbed")
    assert_same(tmp_path / "undisturbed", machine.folder / "runs/spot/checkpoints")
    nodes.remove("one")
    nodes.remove("three")


WITHOUT_RETRIES = """
import raytrain.search.runner
from raytrain.utils.errors import run_command
from raytrain.tune import main

raytrain.search.runner.RETRIES = 0
run_command(main)
"""


def test_a_trial_of_one_worker_goes_on_where_its_node_was_taken_away(
    nodes: Nodes, machine: Machine, watch: Callable[[str], Path], metadata_server: MetadataServer,
    mlflow_server: MlflowServer,
) -> None:  # fmt: skip
    (machine.folder / "space.py").write_text(SPACE)
    watch(nodes.add("four"))
    search = ["--space", "space.py", "--num-samples", "1", "--name", "spots", "--cpus-per-worker", "1"]
    process = machine.start("-c", WITHOUT_RETRIES, "hybrid", *SMALL, *search)

    def logged() -> list[int]:
        return steps_in_mlflow(mlflow_server, the_run(mlflow_server, "000 spots")) if began() else []

    def began() -> bool:
        return "trial 000" in machine.output()

    try:
        wait_for(lambda: bool(logged()) or process.poll() is not None, 300, "a first step")
        metadata_server.pages[ACTION] = {"action": "terminate", "time": "2100-01-01T00:00:00Z"}
        found = machine.folder / "runs/spots"
        wait_for(lambda: any(found.rglob("manifest.json")) or process.poll() is not None, 120, "a checkpoint")
        nodes.add("five")
        assert process.wait(400) == 0, machine.output()[-3000:]
    finally:
        process.kill()
    assert "trial 000 finished" in machine.output()
