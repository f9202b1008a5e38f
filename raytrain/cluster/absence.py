"""Workers that do not come: a search that waits for its cluster's autoscaler says why, and what helps."""

from __future__ import annotations

import logging
import time

import ray
from ray.exceptions import RayError

from raytrain.cluster.ray_internals import get_cluster_status
from raytrain.cluster.resources import Cluster, node_types
from raytrain.config.workers import WorkerSpec

WAIT_S = 600.0
"""How long workers may take to come before it is said: a node on EC2 installs its packages for some minutes."""
ASK_S = 30.0
"""Pause between two looks at the cluster."""
NO_CAPACITY = ("InsufficientInstanceCapacity", "SpotMaxPriceTooLow")
"""What EC2 calls a spot instance that it does not have."""
NO_QUOTA = ("MaxSpotInstanceCountExceeded", "VcpuLimitExceeded")
"""What EC2 calls an instance that the account may not have."""
UPDATE = "ray up --yes --no-restart cluster.yaml"
"""Command by which a changed file takes effect on a cluster that works."""
_log = logging.getLogger("raytrain.cluster")


class Absence:
    """The time in which a cluster has no node for a worker of a search; it is said once when that is too long."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._since = time.monotonic()
        self._asked = self._since
        self._said = False

    def look(self) -> None:
        """Look at the cluster, every ``ASK_S`` at most, and say why no worker has come for ``WAIT_S``."""
        now = time.monotonic()
        if now < self._asked + ASK_S:
            return
        self._asked = now
        try:
            up = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
            if Cluster(up).worker_slots(self._spec) > 0:
                self._since, self._said = now, False
            elif now >= self._since + WAIT_S and not self._said:
                _log.warning("no worker has come for %.0f minutes: %s", (now - self._since) / 60, why())
                self._said = True
        except RayError as error:
            _log.debug("the cluster does not say what it has: %s", error)


def why() -> str:
    """Return what the autoscaler of this process's cluster says of the newest node that it did not get, and what helps.

    Raises:
        RayError: the cluster does not answer.
    """
    address = ray.get_runtime_context().gcs_address
    status = get_cluster_status(address)
    failed = sorted(status.failed_launches, key=lambda launch: launch.failed_ts_s or launch.request_ts_s)
    if not failed:
        return "`ray status -v` says what the autoscaler waits for"
    kind, details = failed[-1].ray_node_type_name, " ".join(str(failed[-1].details).split())[:300]
    if any(sign in details for sign in NO_CAPACITY):
        said = f"EC2 has no more instances for {kind} now"
        if len(node_types(address)) < 2:
            return f"{said}: name more zones or another InstanceType in cluster.yaml, then {UPDATE}"
        up = sum(node.ray_node_type_name == kind for node in (*status.active_nodes, *status.idle_nodes))
        return (
            f"{said}, and Ray asks for no other type while {kind} may grow. For those of another type, run where you "
            f"ran ray up: {lower(kind, up)}; the search goes on by itself"
        )
    if any(sign in details for sign in NO_QUOTA):
        return f"the AWS account may not have more instances of {kind}: ask AWS for a higher quota ({details})"
    return f"{kind} cannot be started: {details}"


def lower(kind: str, most: int) -> str:
    """Return the command that lets a node type of ``cluster.yaml`` have ``most`` nodes, while the cluster works on."""
    change = f"'/^  {kind}:/,/max_workers:/s/max_workers: [0-9]*/max_workers: {most}/'"
    return f"sed -i {change} cluster.yaml && {UPDATE}"
