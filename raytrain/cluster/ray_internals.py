"""Private parts of Ray that this package needs, and the reason for each.

No other module imports them, so an upgrade of Ray can break only this one. Its test,
``tests/unit/cluster/test_ray_internals.py``, then shows what broke. A name is imported on first use, since most
processes need few of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ray._private.services import canonicalize_bootstrap_address_or_die, find_bootstrap_address
    from ray._private.state import state
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.air.execution._internal.actor_manager import RayActorManager as ActorManager
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
    from ray.core.generated.gcs_pb2 import GcsNodeInfo
    from ray.experimental.internal_kv import _internal_kv_del as delete_value
    from ray.experimental.internal_kv import _internal_kv_get as get_value
    from ray.experimental.internal_kv import _internal_kv_put as put_value
    from ray.train.torch.config import _TorchBackend as TorchBackend
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE as TRAIN_VARIABLES
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor as is_preempted_actor
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE as TUNE_VARIABLES

__all__ = [
    "ActorManager",
    "ControllerCallback",
    "DRAIN_NODE_REASON_PREEMPTION",
    "DatasetsCallback",
    "GcsClient",
    "GcsNodeInfo",
    "TRAIN_VARIABLES",
    "TUNE_VARIABLES",
    "TorchBackend",
    "WorkerGroupCallback",
    "WorkerGroupStartupTimeoutError",
    "canonicalize_bootstrap_address_or_die",
    "delete_value",
    "find_bootstrap_address",
    "get_cluster_status",
    "get_value",
    "is_preempted_actor",
    "put_value",
    "state",
]

CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""gRPC method that a cluster's directory (GCS) answers, and nothing else does."""


class Private(NamedTuple):
    """A private name of Ray."""

    module: str
    name: str
    reason: str


PRIVATE = {
    # ------------------------------------------------------------------------------------ the cluster
    "GcsClient": Private(
        "ray._raylet", "GcsClient", "asks for draining nodes and drains one, as `ray drain-node` does"
    ),
    "GcsNodeInfo": Private("ray.core.generated.gcs_pb2", "GcsNodeInfo", "its ALIVE filters the list of nodes"),
    "DRAIN_NODE_REASON_PREEMPTION": Private(
        "ray.core.generated.autoscaler_pb2",
        "DRAIN_NODE_REASON_PREEMPTION",
        "makes Ray count what dies on a drained node as preempted",
    ),
    "canonicalize_bootstrap_address_or_die": Private(
        "ray._private.services",
        "canonicalize_bootstrap_address_or_die",
        "finds the cluster of this host, as Ray's own commands do",
    ),
    "find_bootstrap_address": Private(
        "ray._private.services",
        "find_bootstrap_address",
        "is the cluster that ray.init would join, which tries one that has died for a quarter of an hour",
    ),
    "state": Private("ray._private.state", "state", "its get_cluster_config has what an autoscaler publishes"),
    "get_cluster_status": Private(
        "ray.autoscaler.v2.sdk",
        "get_cluster_status",
        "says which nodes the autoscaler did not get, as `ray status` does",
    ),
    "put_value": Private(
        "ray.experimental.internal_kv", "_internal_kv_put", "rank 0's newest metrics, for the process that launched it"
    ),
    "get_value": Private("ray.experimental.internal_kv", "_internal_kv_get", "reads them there"),
    "delete_value": Private("ray.experimental.internal_kv", "_internal_kv_del", "leaves nothing behind"),
    # -------------------------------------------------------------------------------------- Ray Train
    "TRAIN_VARIABLES": Private(
        "ray.train.v2._internal.constants",
        "ENV_VARS_TO_PROPAGATE",
        "takes RAY_ADDRESS to Ray Train's cleaner of placement groups, which finds the wrong cluster of two otherwise",
    ),
    "DatasetsCallback": Private(
        "ray.train.v2._internal.callbacks.datasets",
        "DatasetsCallback",
        "is left out: it starts a process of 200 MB for each worker group",
    ),
    "WorkerGroupCallback": Private(
        "ray.train.v2._internal.execution.callback",
        "WorkerGroupCallback",
        "tells of the start and end of a worker group",
    ),
    "ControllerCallback": Private(
        "ray.train.v2._internal.execution.callback", "ControllerCallback", "tells of the end of Ray Train's controller"
    ),
    "WorkerGroupStartupTimeoutError": Private(
        "ray.train.v2._internal.exceptions",
        "WorkerGroupStartupTimeoutError",
        "is no failure: the worker group waits for resources",
    ),
    "is_preempted_actor": Private(
        "ray.train.v2._internal.execution.worker_group.poll",
        "_is_preempted_actor",
        "tells a worker that was taken away with notice from one that died",
    ),
    "TorchBackend": Private(
        "ray.train.torch.config", "_TorchBackend", "names gloo's network interface before the process group is set up"
    ),
    # --------------------------------------------------------------------------------------- Ray Tune
    "ActorManager": Private(
        "ray.air.execution._internal.actor_manager",
        "RayActorManager",
        "ends a whole search when Ray ends one trial's process for lack of memory: that is made a death like others",
    ),
    "TUNE_VARIABLES": Private(
        "ray.tune.execution.class_cache",
        "ENV_VARS_TO_PROPAGATE",
        "loses the AWS keys, which Tune would put into runtime environments and so into Ray's logs",
    ),
}


def __getattr__(name: str) -> Any:
    """Import a private name of Ray on first use."""
    if name not in PRIVATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(PRIVATE[name].module), PRIVATE[name].name)
    return value
