"""Ray's private parts: each is where it was, and no other module imports any."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

import raytrain
from raytrain.cluster import ray_internals
from raytrain.cluster.ray_internals import PRIVATE

ROOT = Path(raytrain.__file__).parent
ATTRIBUTES = {
    "ActorManager": ("_actor_task_failed",),
    "GcsNodeInfo": ("ALIVE",),
    "state": ("get_cluster_config",),
    "TorchBackend": ("on_start",),
    "WorkerGroupCallback": ("after_worker_group_start", "after_worker_group_shutdown", "after_worker_group_abort"),
    "ControllerCallback": ("before_controller_shutdown",),
    "TRAIN_VARIABLES": ("add",),
    "TUNE_VARIABLES": ("difference_update",),
}
PARAMETERS = {
    "is_preempted_actor": ("error",),
    "put_value": ("key", "value"),
    "get_value": ("key",),
    "delete_value": ("key",),
    "canonicalize_bootstrap_address_or_die": ("addr",),
    "find_bootstrap_address": ("temp_dir",),
    "get_cluster_status": ("gcs_address",),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_it_is_where_it_was(name: str) -> None:
    private = PRIVATE[name]
    broken = f"Ray {ray.__version__} has changed {private.module}.{private.name}, which {private.reason}"
    try:
        value = getattr(ray_internals, name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{broken}: {error}")
    for attribute in ATTRIBUTES.get(name, ()):
        assert hasattr(value, attribute), f"{broken}: it has no {attribute}"
    if name in PARAMETERS:
        found = tuple(inspect.signature(value).parameters)[: len(PARAMETERS[name])]
        assert found == PARAMETERS[name], f"{broken}: it takes {found}"


def test_the_client_has_the_calls_that_draining_makes() -> None:
    """Ray's client passes them on to one that is compiled."""
    inner = import_module("ray._raylet").InnerGcsClient
    for call in ("get_draining_nodes", "get_all_node_info", "drain_node"):
        assert hasattr(inner, call), f"Ray {ray.__version__}: {inner} has no {call}"


def test_ray_train_still_calls_what_this_package_overrides() -> None:
    """A method that Ray has renamed would no longer be called, without a word."""
    trainer, controller = inspect.getsource(DataParallelTrainer), ray_internals.ControllerCallback
    broken = f"Ray {ray.__version__} has changed what worker_group.py overrides"
    assert "self._create_default_callbacks()" in trainer, f"{broken}: datasets are no longer left out"
    assert inspect.iscoroutinefunction(controller.before_controller_shutdown), f"{broken}: it is no coroutine"
    assert issubclass(TorchTrainer, DataParallelTrainer), broken
    parameters = list(inspect.signature(ray_internals.TorchBackend.on_start).parameters)
    assert parameters == ["self", "worker_group", "backend_config"], f"{broken}: on_start takes {parameters}"


def test_the_errors_of_a_worker_group_still_have_their_causes() -> None:
    """The supervisor reads these attributes, and takes the error itself for the cause if there is none."""
    for error, attribute in (
        (WorkerGroupError("lost", {0: ValueError()}), "worker_failures"),
        (ControllerError(ValueError()), "controller_failure"),
        (WorkerHealthCheckFailedError("lost", ValueError()), "health_check_failure"),
        (RayActorError(), "preempted"),
    ):
        assert hasattr(error, attribute), f"Ray {ray.__version__}: {type(error)} has no {attribute}"


def test_every_name_is_listed_once() -> None:
    assert sorted(ray_internals.__all__) == sorted(PRIVATE)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ray_internals.nothing  # noqa: B018


def is_private(module: str, name: str) -> bool:
    """Whether an import of Ray is of something that Ray does not document."""
    parts = [*module.split("."), *name.split(".")]
    return parts[0] == "ray" and (
        any(part.startswith("_") for part in parts[1:])
        or module.startswith(("ray.core.generated", "ray.tune.execution"))
    )


def test_no_other_module_uses_private_parts_of_ray() -> None:
    """Neither by an import nor as an attribute, such as ``ray._private``."""
    found = []
    for path in ROOT.rglob("*.py"):
        if path.name == "ray_internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [(node.module or "", alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [(ast.unparse(node), "")] if node.attr.startswith("_") else []
            else:
                continue
            found += [f"{path.relative_to(ROOT)}:{node.lineno} {'.'.join(n)}" for n in names if is_private(*n)]
    assert not found, "\n".join(found)
