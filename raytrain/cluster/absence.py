"""Workers that never come: tells the user of a search why its cluster's autoscaler gets no nodes, and what helps."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
import yaml
from ray.exceptions import RayError

from raytrain.cluster.ray_internals import get_cluster_status
from raytrain.cluster.resources import Cluster, node_types
from raytrain.config.workers import WorkerSpec

WAIT_S = 600.0
"""How long workers may take to come before it is reported: an EC2 node takes some minutes to install its packages."""
ASK_S = 30.0
"""Pause between two checks of the cluster."""
NO_CAPACITY = ("InsufficientInstanceCapacity", "SpotMaxPriceTooLow")
"""EC2's error codes if it has no spot instance to offer."""
NO_QUOTA = ("MaxSpotInstanceCountExceeded", "VcpuLimitExceeded")
"""EC2's error codes if the account's quota does not allow the instance."""
UPDATE = "ray up --yes --no-restart cluster.yaml"
"""Command that applies a changed file to a running cluster."""
_log = logging.getLogger("raytrain.cluster")


class Absence:
    """The time for which a cluster has lacked nodes for a run of a search; reported once if it is too long."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._since = time.monotonic()
        self._asked = self._since
        self._said = False

    def look(self) -> None:
        """Check the cluster, at most every ``ASK_S``, and report why no worker has come for ``WAIT_S``."""
        now = time.monotonic()
        if now < self._asked + ASK_S:
            return
        self._asked = now
        try:
            up = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
            if Cluster(up).worker_slots(self._spec) >= self._spec.workers:
                self._since, self._said = now, False
            elif (waited := now - self._since) >= WAIT_S and not self._said:
                _log.warning("no worker has come for %.0f minutes: %s", waited / 60, why(time.time() - waited))
                self._said = True
        except (RayError, OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            # for example, ray up is just replacing the autoscaler's file: no reason to end a search
            _log.debug("the cluster does not say what it has: %s", error)


def why(since: float) -> str:
    """Return the autoscaler's reason for the newest node that it did not get, and what helps.

    Args:
        since: Unix time in seconds; earlier failures are ignored.
    Raises:
        RayError: the cluster does not answer.
        OSError, ValueError, TypeError, KeyError, yaml.YAMLError: the autoscaler's file cannot be read.
    """
    address = ray.get_runtime_context().gcs_address
    status = get_cluster_status(address)
    failed = [launch for launch in status.failed_launches if _failed_at(launch) >= since]
    if not failed:
        return "`ray status -v` says what the autoscaler waits for"
    newest = max(failed, key=_failed_at)
    kind, details = newest.ray_node_type_name, " ".join(str(newest.details).split())[:300]
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
    """Return the command that limits a node type of ``cluster.yaml`` to ``most`` nodes while the cluster is running.

    It replaces the type's own ``max_workers`` line, or adds one if only the whole cluster's limit applied.
    """
    removes = rf"-e '/^  {kind}:/,/^ \{{0,2\}}[^ #]/{{/^    max_workers:/d}}'"
    return rf"sed -i {removes} -e '/^  {kind}:/a\    max_workers: {most}' cluster.yaml && {UPDATE}"


def _failed_at(launch: Any) -> float:
    """Return the time at which Ray failed to get a node, in seconds since 1970."""
    return launch.failed_ts_s or launch.request_ts_s
