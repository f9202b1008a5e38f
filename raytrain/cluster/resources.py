"""Resources of a cluster: those that it has, those that its autoscaler may add, and how many worker groups fit."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml

from raytrain.cluster.ray_internals import state
from raytrain.config.workers import WorkerOptions, WorkerSpec, parse_workers
from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json, validate_type

HEAD_MEMORY_PER_TRIAL = 0.8 * 2**30
"""Bytes that a concurrent trial's small processes take on the head: ``benchmarks/head_cost.py`` measures 844 MB."""
MEMORY_SHARE = 0.5
"""Largest share of a node's memory that a worker may reserve: a node that starts has less than its type states."""
GRADIENT_BYTES = {"float32": 4, "bfloat16": 2}
NETWORK_GBITS = 10.0
"""Network rate that ``traffic`` assumes for its times: the best that small cloud machines have."""
UNLIMITED = 10_000
"""Number of nodes assumed for a group without a stated maximum."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of a Ray cluster, each as its resources: those that are up and those that may be added."""

    up: tuple[dict[str, float], ...]
    possible: tuple[tuple[dict[str, float], int], ...] = ()
    """Node types that the autoscaler may start, and the most nodes of each that may be up at once."""

    @property
    def has_gpus(self) -> bool:
        """True if a node with a GPU is up or may be added: this decides the device, wherever the command runs."""
        nodes = [*self.up, *(node for node, count in self.possible if count > 0)]
        return any(node.get("GPU", 0) > 0 for node in nodes)

    @property
    def num_nodes(self) -> int:
        """Most nodes that may be up at once: heads, which do not compute, count beside those that may be added."""
        heads = sum(not node.get("CPU") and not node.get("GPU") for node in self.up)
        return max(len(self.up), heads + sum(count for _, count in self.possible))

    def cpus_beside(self, gpus: float) -> float:
        """Return the whole CPUs that a worker with ``gpus`` GPUs may take on every node, with every GPU in use."""
        nodes = [*self.up, *(node for node, count in self.possible if count > 0)]
        shares = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU", 0) > 0]
        return max(1.0, float(math.floor(gpus * min(shares, default=1.0) + 1e-6)))

    def total(self, resource: str) -> float:
        """Return the largest possible amount of a resource: on the nodes that are up, or on those that may be added."""
        up = sum(node.get(resource, 0.0) for node in self.up)
        return max(up, sum(node.get(resource, 0.0) * count for node, count in self.possible))

    def usage(self, worker_spec: WorkerSpec, runs: int) -> str:
        """Return the share of the cluster that ``runs`` runs take at once, as text: ``2 of 8 CPUs (2 CPUs online)``."""
        names = worker_spec.per_worker
        taken = [f"{runs * worker_spec.workers * names[name]:g} of {self.total(name):g} {name}s" for name in names]
        up = [f"{sum(node.get(name, 0.0) for node in self.up):g} {name}s" for name in names]
        return f"{' and '.join(taken)} ({' and '.join(up)} online)"

    def worker_slots(self, worker_spec: WorkerSpec) -> int:
        """Return how many workers fit at once; a worker never spans nodes."""
        up = sum(_slots(node, worker_spec) for node in self.up)
        return max(up, sum(_slots(node, worker_spec) * count for node, count in self.possible))

    def admit(self, worker_spec: WorkerSpec, wanted: int | None, head_memory: float) -> int:
        """Return how many runs of ``worker_spec`` may train at once: at most ``wanted``, or all that fit if None.

        A run of one worker has no process on the head. So ``head_memory`` (bytes) limits such runs only if the head is
        the only node.

        Raises:
            UserError: not even one run fits; the message gives the numbers.
        """
        slots = self.worker_slots(worker_spec)
        if slots < worker_spec.workers:
            raise UserError(
                f"a run needs {worker_spec}, but only {slots} of these workers fit: the cluster has at most "
                f"{self.total('CPU'):g} CPUs and {self.total('GPU'):g} GPUs on {self.num_nodes} node(s); "
                "ask for fewer or smaller workers, or add nodes"
            )
        runs = min(slots // worker_spec.workers, wanted or UNLIMITED)
        if worker_spec.workers == 1 and (len(self.up) > 1 or self.possible):
            return runs
        return int(min(runs, max(1.0, head_memory / HEAD_MEMORY_PER_TRIAL)))


def traffic(cluster: Cluster, spec: WorkerSpec, parameters: int, gradients: str = "float32") -> str:
    """Describe, as text, the data that the workers of a run send each other per step; empty if they fit on one machine.

    To sum n tensors in a ring, each worker sends 2 (n - 1) / n of one (Patarasuk and Yuan 2009). DDP sends gradients of
    type ``gradients`` while others are still computed, so what counts is whether a step takes longer.
    """
    workers = spec.limit
    if workers == 1:
        return ""
    nodes = [*cluster.up, *(node for node, count in cluster.possible if count > 0)]
    if any(_slots(node, spec) >= workers for node in nodes):
        return ""
    sent = 2 * (workers - 1) / workers * GRADIENT_BYTES[gradients] * parameters
    milliseconds = sent * 8 / (NETWORK_GBITS * 1e9) * 1e3
    return (
        f"network: each of {workers} workers on several machines sends {sent / 1e6:,.1f} MB of gradients a step, which "
        f"takes {milliseconds:,.1f} ms at {NETWORK_GBITS:g} Gbit/s: where a step is shorter, give a larger --batch-size"
        + (" or --gradients bfloat16" if gradients == "float32" else "")
    )


def _slots(node: dict[str, float], worker_spec: WorkerSpec) -> int:
    return min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in worker_spec.reserved.items())


def reserve_memory(worker_spec: WorkerSpec, cluster: Cluster, need: int) -> WorkerSpec:
    """Return the workers with ``need`` bytes of memory reserved for each, so that no node gets more than it can hold.

    Nothing is reserved if that could keep a run from starting at all: on nodes that do not state their memory, or if a
    worker would take more than ``MEMORY_SHARE`` of it. Nothing is reserved with GPUs either, whose own memory matters.
    """
    nodes = [*cluster.up, *(node for node, count in cluster.possible if count > 0)]
    able = [node for node in nodes if _slots(node, worker_spec) > 0]
    if not need or worker_spec.gpus or not able or need > MEMORY_SHARE * min(node.get("memory", 0.0) for node in able):
        return worker_spec
    reserving = replace(worker_spec, memory=need)
    return reserving if cluster.worker_slots(reserving) >= worker_spec.workers else worker_spec


def worker_spec(options: WorkerOptions, cluster: Cluster) -> WorkerSpec:
    """Return the workers of a run: with GPUs if the cluster has or may get any, wherever this command runs."""
    fewest, most = parse_workers(options.workers)
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.has_gpus else 0.0
    cpus = options.cpus_per_worker
    if cpus is None:
        cpus = cluster.cpus_beside(gpus) if gpus else max(1.0, cluster.total("CPU") // max(1, most or fewest))
    return WorkerSpec(fewest, cpus, gpus, most, options.device)


def read_cluster() -> Cluster:
    """Return the nodes of the cluster that this process has joined, and those that its autoscaler may add."""
    up = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    return Cluster(up, _autoscaler_nodes())


def _autoscaler_nodes() -> tuple[tuple[dict[str, float], int], ...]:
    """Return the node types that the autoscaler may start: as stated by the user, published by Ray, or in its file."""
    if stated := stated_types():
        return stated
    # Ray can publish the config, but its open-source autoscalers do not do so
    config: Any = state.get_cluster_config()
    if config is None:
        return node_types(ray.get_runtime_context().gcs_address)
    groups = config.node_group_configs
    return tuple((dict(group.resources), group.max_count if group.max_count >= 0 else UNLIMITED) for group in groups)


WORKER_NODES = "RAYTRAIN_WORKER_NODES"
"""Environment variable with the worker types, which precedes any other source: '[{"nodes": 8, "CPU": 7, "GPU": 1}]'."""


def node_types(gcs_address: str) -> tuple[tuple[dict[str, float], int], ...]:
    """Return the worker types, and the most of each, that the autoscaler on this host may start for the cluster.

    The result is empty if no autoscaler runs here. `ray up` starts it on the head node, where `ray exec` and
    `ray job submit` also run their commands.
    """
    file = config_file(gcs_address)
    if file is None:
        return ()
    # `ray up` has filled in the resources of each instance type, and replaces the file whenever it changes anything
    config: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    limit = int(config["max_workers"])
    found = []
    for kind in config["available_node_types"].values():
        resources = {name: float(amount) for name, amount in (kind.get("resources") or {}).items()}
        most = min(limit, int(kind.get("max_workers", limit)))
        if resources and most > 0:
            found.append((resources, most))
    return tuple(found)


def stated_types() -> tuple[tuple[dict[str, float], int], ...]:
    """Return the worker types, and the most of each, in the variable ``WORKER_NODES``; empty if it is not set.

    Raises:
        UserError: its value is invalid.
    """
    text = os.environ.get(WORKER_NODES, "").strip()
    if not text:
        return ()
    try:
        kinds = validate_type(parse_json(text), list[dict[str, float]], "it")
        found = tuple(({name: kind[name] for name in kind if name != "nodes"}, int(kind["nodes"])) for kind in kinds)
        if any(count < 1 or not resources for resources, count in found):
            raise ValueError("each type needs at least one node and one resource")
        if not all(0 <= amount < math.inf for resources, _ in found for amount in resources.values()):
            raise ValueError("each resource must be a finite number of at least 0")
        return found
    except (ValueError, KeyError, OverflowError) as error:
        what = "a type has no number of nodes" if isinstance(error, KeyError) else error
        example = '[{"nodes": 8, "CPU": 7, "GPU": 1}]'
        raise UserError(f"{WORKER_NODES} is {text[:200]!r}: {what}; write, for example, {example}") from None


def config_file(gcs_address: str) -> Path | None:
    """Return the config file of the autoscaler that runs on this host for the cluster; ``None`` if none runs."""
    wanted, prefix = f"--gcs-address={gcs_address}", "--autoscaling-config="
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if wanted in words and any(word.endswith("/monitor.py") for word in words):
                for word in words:
                    if word.startswith(prefix):
                        return Path(word.removeprefix(prefix)).expanduser()
    return None
