"""Nodes of a Ray cluster that are about to go: Ray is told, by who knows, and asked, by who works there."""

from __future__ import annotations

import logging
import time
from typing import Any

ASK_TIMEOUT_S = 0.5
"""Longest that a step waits for Ray's answer: without one, there is no notice this time."""
CALL_TIMEOUT_S = 10.0
"""Longest wait for an answer to anything else."""
_log = logging.getLogger(__name__)


class OwnNode:
    """The node that this process works on, as the cluster that it has joined sees it."""

    def __init__(self) -> None:
        import ray
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        context = ray.get_runtime_context()
        self._node_id = context.get_node_id()
        # Ray's own client, as `ray drain-node` uses it: it knows the cluster's token, if it has one
        self._client = GcsClient(address=context.gcs_address)
        self._answers = True

    def is_draining(self) -> bool:
        """Whether Ray has been told that the node is about to go; takes half a millisecond, ``ASK_TIMEOUT_S`` at most.

        Ray never takes that back: the node gets no more work, and ends when its last process has.
        """
        from ray.exceptions import RayError

        try:
            draining = self._client.get_draining_nodes(timeout=ASK_TIMEOUT_S)
        except RayError as error:
            if self._answers:
                _log.warning("Ray does not say whether this node is about to go: %s", error)
            self._answers = False
            return False
        self._answers = True
        return self._node_id in draining


def alive_nodes(address: str | None) -> dict[str, str]:
    """The nodes of the cluster at ``address``, or of the one that runs here: id -> IP address.

    Raises:
        ConnectionError: no cluster runs here.
        ray.exceptions.RayError: it does not answer.
    """
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    nodes = _connect(address).get_all_node_info(timeout=CALL_TIMEOUT_S, state_filter=GcsNodeInfo.ALIVE)
    return {node_id.hex(): node.node_manager_address for node_id, node in nodes.items()}


def drain(address: str | None, node_id: str, why: str, seconds: float) -> None:
    """Tell Ray that a node is about to go: it gets no more work, and those who work there can see it.

    ``seconds`` until then; Ray ends nothing when they are over, but takes what dies after as preempted.

    Raises:
        ConnectionError: no cluster runs here.
        ray.exceptions.RayError: it does not answer.
        LookupError: Ray refuses, and says why.
    """
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, reason = _connect(address).drain_node(
        node_id, DRAIN_NODE_REASON_PREEMPTION, why, deadline_ms, timeout=CALL_TIMEOUT_S
    )
    if not accepted:
        raise LookupError(f"Ray does not drain node {node_id}: {reason}")


def _connect(address: str | None) -> Any:
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=canonicalize_bootstrap_address_or_die(address))
