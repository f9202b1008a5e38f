"""Worker group: Ray Train workers that stay together from one run to the next."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain.cluster.environment import set_up_network, set_up_worker_group
from raytrain.cluster.ray_internals import (
    TRAIN_VARIABLES,
    ControllerCallback,
    DatasetsCallback,
    TorchBackend,
    WorkerGroupCallback,
)
from raytrain.config.workers import WorkerSpec
from raytrain.training.coordinator import Coordinator

FIXED_START_S, ELASTIC_START_S = "3600", "30"
"""Seconds to wait for workers. An autoscaler may take minutes. But an elastic worker group asks for as many workers as
Ray sees room for, and Ray sees a node for half a minute after its death: then the group must ask again."""
POLL_S = 0.5
"""Seconds between two checks of a waiting driver that its worker group still exists."""


class WorkerGroup:
    """Workers that are started by the first run that needs them, and keep their resources for the next.

    A worker group is seven processes or more, most of which import torch and Ray: many times the cost of a short trial.
    A group that dies is started again by the next call of ``train``.
    """

    def __init__(
        self,
        worker_loop: Callable[[dict[str, Any]], None],
        worker_spec: WorkerSpec,
        name: str,
        scratch: str,
        callbacks: Sequence[Any] = (),
    ) -> None:
        """``worker_loop`` is called on each worker with {"coordinator": handle, "on_gpus": bool}.

        Ray's own files go to the folder ``scratch``.
        """
        self.worker_spec = worker_spec
        self._worker_loop = worker_loop
        self._name = name
        self._scratch = scratch
        self._callbacks = callbacks
        self._coordinator: Any = None
        self._fit: Future[Any] | None = None

    def train(self, job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        """Let the workers do ``job``; pass their evaluations to ``send``, which stops them by raising.

        Raises:
            ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.train.TrainingFailedError: the worker
                group ended before the job.
        """
        if self._fit is None or self._fit.done():
            self._start()
        number = self._wait(self._coordinator.give.remote(job))
        while (event := self._wait(self._coordinator.event.remote())) is not None:
            try:
                send(event)
            except BaseException:
                self._coordinator.answer.remote(number, int(event["step"]), False)
                # the workers are free for another job once they have closed everything they had open
                with suppress(RayActorError, OutOfMemoryError, TrainingFailedError):
                    while self._wait(self._coordinator.event.remote()) is not None:
                        pass
                raise
            self._coordinator.answer.remote(number, int(event["step"]), True)

    def dismiss(self) -> None:
        """Dismiss the workers, and wait until they are gone."""
        if self._fit is not None and not self._fit.done():
            self._wait(self._coordinator.give.remote(None))
            self._fit.result()
        self._fit = None
        self._clear_coordinator()

    def _clear_coordinator(self) -> None:
        """End the coordinator of the last worker group: Ray Train keeps a handle of it, and so its process."""
        if self._coordinator is not None:
            ray.kill(self._coordinator)
            self._coordinator = None

    def _start(self) -> None:
        timeout = ELASTIC_START_S if self.worker_spec.most else FIXED_START_S
        set_up_worker_group(ray.get_runtime_context().gcs_address, timeout)
        TRAIN_VARIABLES.add("RAY_ADDRESS")
        self._clear_coordinator()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._coordinator = ray.remote(num_cpus=0, scheduling_strategy=here)(Coordinator).remote()
        trainer = WithoutDatasets(
            self._worker_loop,
            train_loop_config={"coordinator": self._coordinator, "on_gpus": self.worker_spec.on_gpus},
            # by default Ray Train would choose by whether the workers reserve GPUs
            torch_config=ProcessGroup("nccl" if self.worker_spec.on_gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=(self.worker_spec.workers, self.worker_spec.most)
                if self.worker_spec.most
                else self.worker_spec.workers,
                use_gpu=self.worker_spec.gpus > 0,
                resources_per_worker=self.worker_spec.reserved,
            ),
            run_config=RunConfig(
                name=self._name,
                # the loop stores its own checkpoints; a new folder keeps Ray from resuming an earlier attempt
                storage_path=tempfile.mkdtemp(dir=self._scratch),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                callbacks=[*self._callbacks, FailedStartCleanup()],
            ),
        )
        ended: Future[Any] = Future()

        def fit() -> None:
            try:
                ended.set_result(trainer.fit())
            except BaseException as error:
                ended.set_exception(error)

        # a daemon, unlike a pool's threads: this process may end while the worker group exists
        threading.Thread(target=fit, name="worker-group", daemon=True).start()
        self._fit = ended

    def _wait(self, answer: Any) -> Any:
        """Return the coordinator's answer, as long as the worker group exists."""
        assert self._fit is not None
        while not ray.wait([answer], timeout=POLL_S)[0]:
            if self._fit.done():
                self._fit.result()
                raise RuntimeError("the workers have ended before their job was done")
        try:
            return ray.get(answer)
        except (RayActorError, OutOfMemoryError):
            self._fit.result()  # without a coordinator the workers end at their next evaluation, and free resources
            raise


class WithoutDatasets(TorchTrainer):
    """Ray Train without the actor that serves Ray datasets: an unused process of 200 MB beside each worker group."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]


class FailedStartCleanup(WorkerGroupCallback, ControllerCallback):
    """Shuts down a worker group whose worker died at the last moment of its start; runs in Ray Train's controller.

    The controller does not know of such a group: it ends without freeing its placement group, which then lives as long
    as the search's job and keeps its resources from all other trials.
    """

    def __init__(self) -> None:
        self._group: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group = worker_group

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._group = None

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        self._group = None

    async def before_controller_shutdown(self) -> None:
        if self._group is not None:
            self._group.shutdown()


class ProcessGroup(TorchConfig):
    """Ray Train's process group, with gloo on the network interface of the node's address.

    By default gloo takes the address of the host's own name, or the loopback interface if that cannot be used. Debian
    resolves that name to 127.0.1.1, and then workers on two hosts never meet.
    """

    @property
    def backend_cls(self) -> type[TorchBackend]:
        return _OnInterface


class _OnInterface(TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


def _name_interface() -> None:
    """Tell gloo in this worker which network interface to use, unless the user has."""
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        set_up_network(interface)


def interface_of(address: str) -> str | None:
    """Return the name of this host's network interface with ``address``; ``None`` if none has it (a port mapping)."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if any(entry.address == address for entry in entries)), None)
