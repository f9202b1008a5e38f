"""Workers that do not come: when that is said, and what."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo
from ray.exceptions import RpcError

from raytrain.cluster import absence
from raytrain.cluster.absence import WAIT_S, Absence, lower, why
from raytrain.config.workers import WorkerSpec

ROOT = Path(__file__).resolve().parents[3]
HEAD, WORKER = {"memory": 1e9}, {"CPU": 8.0, "GPU": 1.0}
EPOCH = 1.7e9
"""Seconds since 1970 at which the clock of the tests that counts from its own start is 0."""
FULL = "An error occurred (InsufficientInstanceCapacity) when calling the RunInstances operation: We do not have enough"


def failed(kind: str, details: str, at: int) -> LaunchRequest:
    return LaunchRequest("g5.2xlarge", kind, 1, LaunchRequest.Status.FAILED, at, at + 1, details)


def node(kind: str) -> NodeInfo:
    return NodeInfo("g5.2xlarge", kind, "id", "10.0.0.7")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster as Ray says it, and the clock."""
    made = SimpleNamespace(now=1000.0, nodes=[HEAD], status=ClusterStatus(), types=[1, 2])
    monkeypatch.setattr(absence, "time", SimpleNamespace(monotonic=lambda: made.now, time=lambda: made.now + EPOCH))
    context = SimpleNamespace(gcs_address="10.0.0.5:6379")
    nodes = lambda: [{"Alive": True, "Resources": each} for each in made.nodes]  # noqa: E731
    monkeypatch.setattr(absence, "ray", SimpleNamespace(nodes=nodes, get_runtime_context=lambda: context))
    monkeypatch.setattr(absence, "get_cluster_status", lambda address: made.status)
    monkeypatch.setattr(absence, "node_types", lambda address: made.types)
    return made


def test_it_is_said_once_for_each_time_without_workers(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    watch = Absence(WorkerSpec(1, 1, 1))

    def at(seconds: float) -> int:
        cluster.now = 1000.0 + seconds
        watch.look()
        return len(caplog.records)

    cluster.nodes = [HEAD, {"CPU": 8.0}]  # a node, but none for a worker with a GPU
    assert [at(seconds) for seconds in (1, 300, 599, 640, 700, 2000)] == [0, 0, 0, 1, 1, 1]
    assert caplog.messages == ["no worker has come for 11 minutes: `ray status -v` says what the autoscaler waits for"]
    cluster.nodes = [HEAD, WORKER]
    assert at(2040) == 1
    cluster.nodes = [HEAD]  # taken away
    assert [at(seconds) for seconds in (2080, 2600, 2680)] == [1, 1, 2]


def test_only_what_failed_meanwhile_says_why(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Ray keeps failed launches for long; those of before the last node came are no reason now."""
    watch = Absence(WorkerSpec(1, 1, 1))
    cluster.status = ClusterStatus(failed_launches=[failed("gpu_spot", FULL, int(EPOCH) + 900)])
    cluster.now = 1000.0 + WAIT_S
    watch.look()
    assert caplog.messages == ["no worker has come for 10 minutes: `ray status -v` says what the autoscaler waits for"]
    cluster.nodes = [HEAD, WORKER]
    cluster.now += 40
    watch.look()
    cluster.nodes = [HEAD]
    cluster.status = ClusterStatus(failed_launches=[failed("gpu_spot", FULL, int(EPOCH + cluster.now) + 5)])
    cluster.now += WAIT_S
    watch.look()
    assert "EC2 has no more instances for gpu_spot" in caplog.messages[1]


def test_a_run_of_several_workers_needs_as_many(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    watch = Absence(WorkerSpec(2, 1, 1))
    cluster.nodes = [HEAD, WORKER]
    cluster.now += WAIT_S
    watch.look()
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "error",
    [RpcError("away"), yaml.YAMLError("half of the file"), OSError("no such file"), TypeError("null"), KeyError("x")],
    ids=lambda error: type(error).__name__,
)
def test_a_cluster_that_does_not_answer_ends_nothing(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refuse(address: str) -> ClusterStatus:
        raise error

    watch = Absence(WorkerSpec(1, 1, 1))
    cluster.now += 700
    monkeypatch.setattr(absence, "get_cluster_status", refuse)
    watch.look()
    assert caplog.messages == []
    monkeypatch.setattr(absence, "get_cluster_status", lambda address: cluster.status)
    cluster.now += 40
    watch.look()
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("details", "types", "said"),
    [
        (FULL, 2, "EC2 has no more instances for gpu_spot now, and Ray asks for no other type while gpu_spot may grow"),
        (
            FULL,
            1,
            "EC2 has no more instances for gpu_spot now: name more zones or another InstanceType in cluster.yaml",
        ),
        ("(VcpuLimitExceeded) You have\nrequested more", 2, "the AWS account may not have more instances of gpu_spot"),
        ("(UnauthorizedOperation)\nYou may not", 2, "gpu_spot cannot be started: (UnauthorizedOperation) You may not"),
    ],
)
def test_the_newest_launch_that_failed_says_why(cluster: Any, details: str, types: int, said: str) -> None:
    cluster.types = list(range(types))
    cluster.status = ClusterStatus(
        active_nodes=[node("head"), node("gpu_spot"), node("gpu_spot")],
        idle_nodes=[node("gpu_spot"), node("gpu_on_demand")],
        failed_launches=[failed("gpu_spot", details, 50), failed("gpu_on_demand", "older", 20)],
    )
    assert why(0).startswith(said)
    assert ("max_workers: 3'" in why(0)) == (details == FULL and types == 2)


def test_the_command_lowers_one_type_of_the_file(tmp_path: Path) -> None:
    """As the documentation's file has it; what would bring it to the cluster is left out here."""
    shutil.copy(ROOT / "cluster.yaml", tmp_path)
    change = lower("gpu_spot", 3).partition(" && ")
    assert change[2] == "ray up --yes --no-restart cluster.yaml"
    subprocess.run(change[0], shell=True, check=True, cwd=tmp_path)
    before, after = (yaml.safe_load((folder / "cluster.yaml").read_text()) for folder in (ROOT, tmp_path))
    assert after["available_node_types"]["gpu_spot"].pop("max_workers") == 3
    assert before["available_node_types"]["gpu_spot"].pop("max_workers") == 8
    assert before == after


@pytest.mark.parametrize("kind", ["one", "two"])
def test_the_command_gives_a_limit_to_a_type_without_one(tmp_path: Path, kind: str) -> None:
    """And leaves those of the next type, and of the whole cluster, as they are."""
    types = {"one": {"resources": {}}, "two": {"resources": {}}, "three": {"max_workers": 7}}
    if kind == "two":
        types = {"three": {"max_workers": 7}, "one": {"resources": {}}, "two": {"resources": {}}}
    before = {"available_node_types": types, "max_workers": 9}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(before, sort_keys=False))
    subprocess.run(lower(kind, 3).partition(" && ")[0], shell=True, check=True, cwd=tmp_path)
    types[kind]["max_workers"] = 3
    assert yaml.safe_load((tmp_path / "cluster.yaml").read_text()) == before
