"""Node draining: the spot watcher tells Ray which node will be taken away; workers ask Ray about their own node."""

from __future__ import annotations

import logging
import time

import ray
from ray.exceptions import RayError

from raytrain.cluster.ray_internals import (
    DRAIN_NODE_REASON_PREEMPTION,
    GcsClient,
    GcsNodeInfo,
    canonicalize_bootstrap_address_or_die,
)

ASK_TIMEOUT_S = 0.5
"""Longest time that a step waits for Ray's answer; without an answer, the node counts as not draining."""
CALL_TIMEOUT_S = 10.0
"""Longest time to wait for any other answer."""
_log = logging.getLogger(__name__)


class OwnNode:
    """The node of this process, as seen by the cluster that it has joined."""

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        self._node_id = context.get_node_id()
        # Ray's own client, as used by `ray drain-node`: it knows the cluster's token, if there is one
        self._client = GcsClient(address=context.gcs_address)
        self._answers = True

    def is_draining(self) -> bool:
        """Return whether Ray has been told that the node will be taken away; takes 0.5 ms, at most ``ASK_TIMEOUT_S``.

        Ray never revokes that: the node gets no more work, and ends when its last process has ended.
        """
        try:
            draining = self._client.get_draining_nodes(timeout=ASK_TIMEOUT_S)
        except RayError as error:
            if self._answers:
                _log.warning("Ray does not say whether this node will be taken away: %s", error)
            self._answers = False
            return False
        self._answers = True
        return self._node_id in draining


def alive_nodes(address: str | None) -> dict[str, str]:
    """Return the nodes of the cluster at ``address``, or of the one on this host: id -> IP address.

    Raises:
        ConnectionError: no cluster runs here.
        ray.exceptions.RayError: it does not answer.
    """
    nodes = _connect(address).get_all_node_info(timeout=CALL_TIMEOUT_S, state_filter=GcsNodeInfo.ALIVE)
    return {node_id.hex(): node.node_manager_address for node_id, node in nodes.items()}


def drain(address: str | None, node_id: str, why: str, seconds: float) -> None:
    """Tell Ray that a node will be taken away in ``seconds``: it gets no more work, and its workers can see that.

    Ray ends nothing at that time, but counts processes that die afterwards as preempted.

    Raises:
        ConnectionError: no cluster runs here.
        ray.exceptions.RayError: it does not answer.
        LookupError: Ray refuses; the message gives its reason.
    """
    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, reason = _connect(address).drain_node(
        node_id, DRAIN_NODE_REASON_PREEMPTION, why, deadline_ms, timeout=CALL_TIMEOUT_S
    )
    if not accepted:
        raise LookupError(f"Ray does not drain node {node_id}: {reason}")


def _connect(address: str | None) -> GcsClient:
    return GcsClient(address=canonicalize_bootstrap_address_or_die(address))
