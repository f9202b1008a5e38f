"""Admission: what fits, what is refused, and that the device follows the cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytrain.cluster.resources import (
    HEAD_MEMORY_PER_TRIAL,
    WORKER_NODES,
    Cluster,
    node_types,
    reserve_memory,
    stated_types,
    traffic,
    worker_spec,
)
from raytrain.config.workers import WorkerOptions, WorkerSpec
from raytrain.search.options import SearchOptions
from raytrain.training.options import TrainOptions
from raytrain.utils.errors import UserError

LAPTOP = Cluster(({"CPU": 2.0},))
PLENTY = 1e12


@pytest.mark.parametrize(
    ("worker_spec", "wanted", "memory", "expected"),
    [
        (WorkerSpec(1, 1, 0), None, PLENTY, 2),
        (WorkerSpec(2, 1, 0), 2, PLENTY, 1),
        (WorkerSpec(2, 0.5, 0), None, PLENTY, 2),
        (WorkerSpec(1, 0.5, 0), 3, PLENTY, 3),
        (WorkerSpec(1, 0.1, 0), None, 3.5 * HEAD_MEMORY_PER_TRIAL, 3),
        (WorkerSpec(2, 0.1, 0), None, 3.5 * HEAD_MEMORY_PER_TRIAL, 3),
        (WorkerSpec(1, 1, 0), None, 0.0, 1),
    ],
)
def test_as_many_run_as_fit(worker_spec: WorkerSpec, wanted: int | None, memory: float, expected: int) -> None:
    assert LAPTOP.admit(worker_spec, wanted, memory) == expected


def test_a_worker_never_spans_nodes() -> None:
    cluster = Cluster(({"CPU": 3.0}, {"CPU": 3.0}))
    assert cluster.worker_slots(WorkerSpec(1, 2, 0)) == 2
    with pytest.raises(UserError, match=r"needs 1 x \(4 CPU\), but only 0 of these workers fit.*at most 6 CPUs"):
        cluster.admit(WorkerSpec(1, 4, 0), None, PLENTY)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        UserError, match=r"needs 3 x \(1 CPU\), but only 2 of these.*at most 2 CPUs and 0 GPUs on 1 node"
    ):
        LAPTOP.admit(WorkerSpec(3, 1, 0), None, PLENTY)
    with pytest.raises(UserError, match=r"1 x \(1 CPU and 1 GPU\)"):
        LAPTOP.admit(WorkerSpec(1, 1, 1), None, PLENTY)


def test_what_the_autoscaler_may_add_counts() -> None:
    """A head without CPUs and workers that start at zero: nothing is up, and eight GPUs can be."""
    cluster = Cluster(({"CPU": 0.0},), (({"CPU": 8.0, "GPU": 2.0}, 4), ({"CPU": 0.0}, 1)))
    assert cluster.has_gpus
    assert cluster.admit(WorkerSpec(2, 1, 1), None, PLENTY) == 4
    assert cluster.admit(WorkerSpec(1, 1, 0.25), None, PLENTY) == 32


def test_a_worker_of_a_run_takes_the_cpus_beside_its_gpus() -> None:
    head, fast, slow = {"CPU": 0.0}, {"CPU": 48.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}
    for nodes in (Cluster((head, fast, slow)), Cluster((head,), ((fast, 2), (slow, 1)))):
        for gpus, cpus in ((1.0, 8), (2.0, 16), (0.5, 4), (0.1, 1)):
            assert worker_spec(WorkerOptions(gpus_per_worker=gpus), nodes) == WorkerSpec(1, cpus, gpus)
        assert nodes.admit(worker_spec(WorkerOptions(), nodes), None, PLENTY) == nodes.total("GPU")
    # a worker without a CPU does not start: two of these GPUs stay idle
    assert worker_spec(WorkerOptions(), Cluster(({"CPU": 2.0, "GPU": 4.0},))).cpus == 1
    assert worker_spec(WorkerOptions(cpus_per_worker=3.0), Cluster((slow,))).cpus == 3


def test_the_head_bounds_worker_groups_and_not_trials_that_have_no_process_there() -> None:
    nodes = ({"CPU": 8.0, "GPU": 8.0},) * 8
    for cluster in (Cluster(({"CPU": 0.0}, *nodes)), Cluster(({"CPU": 0.0},), ((nodes[0], 8),))):
        assert cluster.admit(WorkerSpec(1, 1, 1), None, 3.5 * HEAD_MEMORY_PER_TRIAL) == 64
        assert cluster.admit(WorkerSpec(2, 1, 1), None, 3.5 * HEAD_MEMORY_PER_TRIAL) == 3


def test_who_only_reserves_gpus_computes_on_the_cpu() -> None:
    assert [WorkerSpec(1, 1, gpus, device=device).on_gpus for gpus in (0, 1) for device in ("auto", "cpu")] == [
        False, False, True, False,
    ]  # fmt: skip
    assert WorkerSpec(1, 1, 1, device="cuda").on_gpus
    assert str(WorkerSpec(2, 1, 0.5, device="cpu")) == "2 x (1 CPU and 0.5 GPU)"  # NCCL is not asked


def test_worker_specs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="cannot share a GPU"):
        WorkerSpec(2, 1, 0.5)
    with pytest.raises(UserError, match="at least one"):
        WorkerSpec(0, 1, 0)
    with pytest.raises(UserError, match="nothing to compute on"):
        WorkerSpec(1, 0, 0)
    with pytest.raises(UserError, match="--device cuda: the workers reserve no GPU"):
        WorkerSpec(1, 1, 0, device="cuda")


def test_the_device_is_that_of_the_cluster_not_of_this_machine() -> None:
    gpus = Cluster(({"CPU": 0.0},), (({"CPU": 8.0, "GPU": 1.0}, 2),))
    for options in (TrainOptions(), SearchOptions()):
        assert worker_spec(options.worker_options(), gpus).gpus == 1
        assert worker_spec(options.worker_options(), LAPTOP).gpus == 0


@pytest.mark.slow
def test_what_an_autoscaler_publishes_is_read_from_a_real_cluster() -> None:
    """A real head without CPUs, and in its store the node groups as an autoscaler publishes them."""
    code = """
import json, os
import ray
from ray._private.worker import global_worker
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
from raytrain.cluster.resources import read_cluster
from raytrain.config.workers import WorkerSpec

ray.init(address="local", num_cpus=0, include_dashboard=False)
before = read_cluster()
group = NodeGroupConfig(resources={"CPU": 4, "GPU": 1}, min_count=0, max_count=3, name="gpu")
global_worker.gcs_client.report_cluster_config(ClusterConfig(node_group_configs=[group]).SerializeToString())
after = read_cluster()
print(json.dumps([before.has_gpus, after.has_gpus, after.admit(WorkerSpec(1, 1, 1), None, 1e12), after.num_nodes]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [False, True, 3, 4]  # the head is a node too


def test_what_may_be_added_can_be_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/kuberay.yaml does: its autoscaler leaves no file where a search could read it."""
    monkeypatch.setenv(WORKER_NODES, '[{"nodes": 8, "CPU": 7, "GPU": 1}, {"nodes": 1, "CPU": 16}]')
    assert stated_types() == (({"CPU": 7.0, "GPU": 1.0}, 8), ({"CPU": 16.0}, 1))
    monkeypatch.delenv(WORKER_NODES)
    assert stated_types() == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", "it is 8: must be a list"),
        ('[{"CPU": 7}]', "a type has no number of nodes"),
        ('[{"nodes": 0, "CPU": 7}]', "each type needs at least one node"),
        ('[{"nodes": 8}]', "and one resource"),
        ('[{"nodes": 1e999, "CPU": 1}]', "cannot convert float infinity"),
        ('[{"nodes": 2, "CPU": 1e999}]', "each resource must be a finite number of at least 0"),
        ('[{"nodes": 2, "CPU": NaN}]', "each resource must be a finite number of at least 0"),
        ('[{"nodes": 2, "GPU": -1}]', "each resource must be a finite number of at least 0"),
        ('[{"nodes": "x", "CPU": 7}]', "must be a number"),
        ("8 x GPU", "Expecting value|Extra data"),
    ],
)
def test_what_is_stated_wrongly_is_refused(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKER_NODES, text)
    with pytest.raises(UserError, match=f"{WORKER_NODES} is .*(?:{expected}).*; write, "):
        stated_types()


def test_what_an_autoscaler_may_add_is_read_from_its_own_file(tmp_path: Path) -> None:
    """As `ray up` leaves it on the head: no open autoscaler publishes its config.

    tests/cluster/test_aws.py has a real one.
    """
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(
        "max_workers: 3\nhead_node_type: head\navailable_node_types:\n"
        "  head: {resources: {CPU: 0}, max_workers: 0, node_config: {}}\n"
        "  spot: {resources: {CPU: 8, GPU: 1, 'accelerator_type:A10G': 1}, max_workers: 2, node_config: {}}\n"
        "  plain: {resources: {CPU: 8}, node_config: {}}\n"
        "  local: {resources: {}, max_workers: 2, node_config: {}}\n"
    )
    (tmp_path / "monitor.py").write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    options = ["--gcs-address=10.0.0.1:6379", f"--autoscaling-config={file}"]
    command = [sys.executable, str(tmp_path / "monitor.py"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        monitor.stdout.readline()
        spot = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:A10G": 1.0}
        assert node_types("10.0.0.1:6379") == ((spot, 2), ({"CPU": 8.0}, 3))
        assert node_types("10.0.0.2:6379") == ()
        monitor.kill()
    assert node_types("10.0.0.1:6379") == ()


GB = 10**9


@pytest.mark.parametrize(
    ("cluster", "spec", "need", "reserved", "runs"),
    [
        (Cluster(({"CPU": 8, "memory": 4 * GB},)), WorkerSpec(1, 1, 0), GB, GB, 4),
        (Cluster(({"CPU": 8, "memory": 4 * GB},) * 2), WorkerSpec(2, 1, 0), GB, GB, 4),
        (Cluster(({"CPU": 2, "memory": 4 * GB},)), WorkerSpec(1, 1, 0), GB, GB, 2),
        # one that takes more than half of a node might never start: as before there is nothing but CPUs to count
        (Cluster(({"CPU": 8, "memory": 4 * GB},)), WorkerSpec(1, 1, 0), 3 * GB, 0, 8),
        (Cluster(({"CPU": 8},)), WorkerSpec(1, 1, 0), GB, 0, 8),
        (Cluster(({"CPU": 8, "memory": 4 * GB},)), WorkerSpec(1, 1, 0), 0, 0, 8),
        (Cluster(({"CPU": 8, "memory": 64 * GB}, {"CPU": 8})), WorkerSpec(1, 1, 0), GB, 0, 16),
        # a group of which not all workers would find room
        (Cluster(({"CPU": 8, "memory": 4 * GB},)), WorkerSpec(4, 1, 0), 2 * GB, 0, 2),
        (Cluster(({"CPU": 8, "GPU": 8, "memory": 4 * GB},)), WorkerSpec(1, 1, 1), GB, 0, 8),
        # a head without CPUs has no workers, whatever its memory
        (Cluster(({"memory": GB}, {"CPU": 8, "memory": 4 * GB})), WorkerSpec(1, 1, 0), GB, GB, 4),
        (Cluster(({"CPU": 0},), (({"CPU": 8, "memory": 4 * GB}, 3),)), WorkerSpec(1, 1, 0), GB, GB, 12),
    ],
)
def test_memory_is_reserved_where_that_keeps_no_run_from_starting(
    cluster: Cluster, spec: WorkerSpec, need: int, reserved: int, runs: int
) -> None:
    found = reserve_memory(spec, cluster, need)
    assert (found.memory, found.per_worker) == (reserved, spec.per_worker)
    assert cluster.admit(found, None, PLENTY) == runs
    assert runs * found.workers * found.memory <= cluster.total("memory")


def test_what_workers_send_each_other_is_said_where_they_are_on_several_machines() -> None:
    pair = Cluster(({"CPU": 4.0}, {"CPU": 4.0}))
    spec = WorkerSpec(4, 2, 0)
    assert "each of 4 workers on several machines sends 6.0 MB of gradients a step" in traffic(pair, spec, 1_000_000)
    assert "takes 4.8 ms at 10 Gbit/s" in traffic(pair, spec, 1_000_000)
    assert "give a larger --batch-size or --gradients bfloat16" in traffic(pair, spec, 1_000_000)
    halved = traffic(pair, spec, 1_000_000, "bfloat16")
    assert "sends 3.0 MB" in halved
    assert "--gradients" not in halved
    assert traffic(pair, WorkerSpec(2, 2, 0), 1_000_000) == ""
    assert traffic(pair, WorkerSpec(1, 8, 0), 1_000_000) == ""
    # one that may come has room for all; of an elastic run the most workers count
    growing = Cluster(({"CPU": 4.0},), (({"CPU": 8.0}, 1),))
    assert traffic(growing, spec, 1_000_000) == ""
    assert "each of 8 workers" in traffic(growing, WorkerSpec(2, 2, 0, most=8), 1_000_000)
