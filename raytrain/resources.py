"""What a cluster has, what its autoscaler may add, and how many gangs of workers fit."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from typing import Any, Literal

from raytrain.errors import UserError

Device = Literal["auto", "cpu", "cuda"]
"""What workers compute on; ``auto``: on the GPUs that they reserve, if any."""
HEAD_MEMORY_PER_TRIAL = 0.8 * 2**30
"""Bytes that the small processes of one concurrent trial take on the head: ``benchmarks/head_cost.py`` finds 844 MB."""
UNLIMITED = 10_000
"""Nodes of a group whose maximum is not stated."""


@dataclass
class GangOptions:
    """What the command line says about the workers of one run."""

    workers: str = "1"
    """DDP workers; 2:8 goes on with as few as 2 and grows to 8 where there are places."""
    cpus_per_worker: float | None = None
    """CPUs of each worker; default: an equal share of a machine's (CPU runs), or 1 beside its GPU."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; default 1 if the cluster has any, otherwise 0."""
    device: Device = "auto"
    """What workers compute on: cpu leaves the GPUs that they reserve unused."""


@dataclass(frozen=True)
class Gang:
    """What one run asks for: workers that start together or wait together."""

    workers: int
    """Workers, of an elastic run the fewest."""
    cpus: float
    """CPUs of each worker."""
    gpus: float
    """GPUs that each worker reserves."""
    most: int | None = None
    """The most workers of an elastic run, which goes on with as many as there are places for."""
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"{self.workers} workers: a run needs at least one")
        if self.most is not None and self.most < self.workers:
            raise UserError(f"--workers {self.workers}:{self.most}: the most must not be less than the fewest")
        if self.cpus < 0 or self.gpus < 0 or self.cpus + self.gpus == 0:
            raise UserError(f"a worker of {self.cpus:g} CPUs and {self.gpus:g} GPUs has nothing to compute on")
        if self.device == "cuda" and self.gpus == 0:
            raise UserError(
                "--device cuda: the workers reserve no GPU; use a cluster that has some, and --gpus-per-worker 1"
            )
        if self.limit > 1 and self.gpus % 1 and self.on_gpus:
            raise UserError(
                f"{self.limit} workers with {self.gpus:g} GPUs each: workers of one run cannot share a GPU (NCCL "
                "refuses two ranks on one card); use whole GPUs, or fractions with one worker"
            )

    @property
    def limit(self) -> int:
        """The most workers that there may be."""
        return self.most or self.workers

    @property
    def on_gpus(self) -> bool:
        """Whether the workers compute on GPUs, rather than only reserving them."""
        return self.gpus > 0 and self.device != "cpu"

    @property
    def per_worker(self) -> dict[str, float]:
        """The resources of one worker, as Ray names them."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount > 0}

    def __str__(self) -> str:
        each = " and ".join(f"{amount:g} {name}" for name, amount in self.per_worker.items())
        return f"{self.workers}{f':{self.most}' if self.most else ''} x ({each})"


def parse_workers(text: str) -> tuple[int, int | None]:
    """The fewest workers, and the most where a run is elastic: of "2" or "2:8".

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", text)
    if match is None:
        raise UserError(f"--workers {text!r} is neither a number of workers nor a range of them: give 2, or 2:8")
    return int(match[1]), int(match[2]) if match[2] else None


@dataclass(frozen=True)
class Cluster:
    """The nodes that can compute, each as its resources: those that are up and those that may come."""

    up: tuple[dict[str, float], ...]
    possible: tuple[tuple[dict[str, float], int], ...] = ()
    """Kinds of node that the autoscaler may start, and how many of each there may be in all."""

    @property
    def has_gpus(self) -> bool:
        """Whether there is a GPU, or one can come: what decides the device, wherever the command runs."""
        nodes = [*self.up, *(node for node, count in self.possible if count > 0)]
        return any(node.get("GPU", 0) > 0 for node in nodes)

    @property
    def num_nodes(self) -> int:
        """The most nodes that may be up at once: beside those that may come, there are those that do not work."""
        heads = sum(not node.get("CPU") and not node.get("GPU") for node in self.up)
        return max(len(self.up), heads + sum(count for _, count in self.possible))

    def total(self, resource: str) -> float:
        """The most of a resource that there may be: on the nodes that are up or on those that may be."""
        up = sum(node.get(resource, 0.0) for node in self.up)
        return max(up, sum(node.get(resource, 0.0) * count for node, count in self.possible))

    def usage(self, gang: Gang, runs: int) -> str:
        """What so many runs at once take of what there may be, in words."""
        names = gang.per_worker
        taken = [f"{runs * gang.workers * names[name]:g} of {self.total(name):g} {name}s" for name in names]
        up = [f"{sum(node.get(name, 0.0) for node in self.up):g} {name}s" for name in names]
        return f"{' and '.join(taken)} that the cluster may have; {' and '.join(up)} are up"

    def worker_slots(self, gang: Gang) -> int:
        """How many workers fit at once; a worker never spans nodes."""
        up = sum(_slots(node, gang) for node in self.up)
        return max(up, sum(_slots(node, gang) * count for node, count in self.possible))

    def admit(self, gang: Gang, wanted: int | None, head_memory: float) -> int:
        """How many runs of ``gang`` may be under way at once: at most ``wanted``, and all that fit if None.

        A run of one worker has no process on the head, so that ``head_memory`` (bytes) bounds such runs only where
        the head is the one node there is.

        Raises:
            UserError: not even one fits; the line gives the numbers.
        """
        slots = self.worker_slots(gang)
        if slots < gang.workers:
            raise UserError(
                f"a run needs {gang}, but only {slots} of these workers fit: the cluster has at most "
                f"{self.total('CPU'):g} CPUs and {self.total('GPU'):g} GPUs on {self.num_nodes} node(s); "
                "ask for fewer or smaller workers, or add nodes"
            )
        runs = min(slots // gang.workers, wanted or UNLIMITED)
        if gang.workers == 1 and (len(self.up) > 1 or self.possible):
            return runs
        return int(min(runs, max(1.0, head_memory / HEAD_MEMORY_PER_TRIAL)))


def _slots(node: dict[str, float], gang: Gang) -> int:
    return min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in gang.per_worker.items())


def connect(address: str | None) -> None:
    """Join the Ray cluster at ``address``, or the one that can be found, or start one on this machine.

    Raises:
        UserError: there is no cluster at ``address``.
    """
    import ray

    from raytrain.storage import storage_environment

    if address is not None and ":" in address:
        _check_answers(address)
    # a process for each gang; workers ask themselves whether their node is draining
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        ray.init(
            address=address,
            dashboard_host="127.0.0.1",
            include_dashboard=None if address not in (None, "local") else True,
            # endpoint and region reach every node this way; keys never do
            runtime_env={"env_vars": settings} if (settings := storage_environment()) else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}") from None


def _check_answers(address: str) -> None:
    """Ray itself would try a wrong address for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}; correct --address") from None


def read_cluster() -> Cluster:
    """What the cluster that this process has joined has, and what its autoscaler may add."""
    import ray

    up = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    return Cluster(up, _autoscaler_nodes())


def _autoscaler_nodes() -> tuple[tuple[dict[str, float], int], ...]:
    """Kinds of node that the autoscaler may start: as stated, by the config that is published, or by its own file."""
    import ray
    from ray._private.state import state

    from raytrain.autoscaler import node_types, stated_types

    if stated := stated_types():
        return stated
    # Ray has a place for the config, but its open autoscalers put nothing there
    config: Any = state.get_cluster_config()
    if config is None:
        return node_types(ray.get_runtime_context().gcs_address)
    groups = config.node_group_configs
    return tuple((dict(group.resources), group.max_count if group.max_count >= 0 else UNLIMITED) for group in groups)
