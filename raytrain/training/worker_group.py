"""A gang of Ray Train workers that stays together from one run to the next, and what Ray Train leaves out of one."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal import constants as train_constants
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain.config.workers import WorkerSpec
from raytrain.training.coordinator import Coordinator

TRAIN_SETTINGS = {
    # Ray Train looks after its workers this often
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
"""Ray Train's settings where the user has not set them."""
PLACES_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Its setting of how long a gang waits for its places."""
FIXED_PLACES_S, ELASTIC_PLACES_S = "3600", "30"
"""An autoscaler may take minutes to bring them; but an elastic gang asks for as many as Ray sees, and Ray sees a node
for half a minute after its death: then it must ask anew."""
POLL_S = 0.5
"""How often a driver that waits for its gang looks whether there still is one."""


class WorkerGroup:
    """Workers that are started by the first run that needs them, and keep their places for the next.

    A gang is seven processes or more, most of which import torch and Ray: many times the work of a short trial.
    One that dies is started again by the next call of ``train``.
    """

    def __init__(
        self,
        worker_loop: Callable[[dict[str, Any]], None],
        worker_spec: WorkerSpec,
        name: str,
        scratch: str,
        callbacks: Sequence[Any] = (),
    ) -> None:
        """``serve`` is what each worker does, given {"desk": handle, "on_gpus": bool}.

        Ray's own bookkeeping goes to ``scratch``.
        """
        self.worker_spec = worker_spec
        self._serve = worker_loop
        self._name = name
        self._scratch = scratch
        self._callbacks = callbacks
        self._coordinator: Any = None
        self._fit: Future[Any] | None = None

    def train(self, job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        """Let the workers do ``job``; their evaluations go to ``send``, which stops them by raising.

        Raises:
            ray.exceptions.RayActorError, ray.train.TrainingFailedError: the gang has ended before the job has.
        """
        if self._fit is None or self._fit.done():
            self._start()
        number = self._wait(self._coordinator.give.remote(job))
        while (event := self._wait(self._coordinator.event.remote())) is not None:
            try:
                send(event)
            except BaseException:
                self._coordinator.answer.remote(number, int(event["step"]), False)
                # the workers are free for another job once they have closed what they had open
                with suppress(RayActorError, TrainingFailedError):
                    while self._wait(self._coordinator.event.remote()) is not None:
                        pass
                raise
            self._coordinator.answer.remote(number, int(event["step"]), True)

    def dismiss(self) -> None:
        """Send the workers home, and wait until they are gone."""
        if self._fit is not None and not self._fit.done():
            self._wait(self._coordinator.give.remote(None))
            self._fit.result()
        self._fit = None
        self._clear_coordinator()

    def _clear_coordinator(self) -> None:
        """End the desk of the last gang: Ray Train keeps a handle of it, and with it the process."""
        if self._coordinator is not None:
            ray.kill(self._coordinator)
            self._coordinator = None

    def _start(self) -> None:
        locations = ELASTIC_PLACES_S if self.worker_spec.most else FIXED_PLACES_S
        for variable, value in {**TRAIN_SETTINGS, PLACES_TIMEOUT: locations}.items():
            os.environ.setdefault(variable, value)
        # Ray's cleaner of placement groups asks "the" cluster of its host who is alive; with two on one host
        # it gives up, unless it is told which one is its own.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        train_constants.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
        self._clear_coordinator()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._coordinator = ray.remote(num_cpus=0, scheduling_strategy=here)(Coordinator).remote()
        trainer = WithoutDatasets(
            self._serve,
            train_loop_config={"desk": self._coordinator, "on_gpus": self.worker_spec.on_gpus},
            # Ray Train would choose by what is reserved
            torch_config=ProcessGroup("nccl" if self.worker_spec.on_gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=(self.worker_spec.workers, self.worker_spec.most)
                if self.worker_spec.most
                else self.worker_spec.workers,
                use_gpu=self.worker_spec.gpus > 0,
                resources_per_worker=self.worker_spec.per_worker,
            ),
            run_config=RunConfig(
                name=self._name,
                # checkpoints are ours; a place of its own keeps Ray from resuming an attempt in its own way
                storage_path=tempfile.mkdtemp(dir=self._scratch),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                callbacks=[*self._callbacks, LastMoments()],
            ),
        )
        ended: Future[Any] = Future()

        def fit() -> None:
            try:
                ended.set_result(trainer.fit())
            except BaseException as error:
                ended.set_exception(error)

        # not a pool's thread: this process may end while the gang stands
        threading.Thread(target=fit, name="worker-group", daemon=True).start()
        self._fit = ended

    def _wait(self, answer: Any) -> Any:
        """What the desk says, as long as there is a gang."""
        assert self._fit is not None
        while not ray.wait([answer], timeout=POLL_S)[0]:
            if self._fit.done():
                self._fit.result()
                raise RuntimeError("the workers have gone home before their work was done")
        try:
            return ray.get(answer)
        except RayActorError:
            self._fit.result()  # without a desk they end at their next evaluation; before, there is no place for others
            raise


class WithoutDatasets(TorchTrainer):
    """Ray Train without the actor that hands out Ray datasets: a process of 200 MB beside each gang for nothing."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]


class LastMoments(WorkerGroupCallback, ControllerCallback):
    """Takes down a gang whose worker died in the last moment of its start; runs inside Ray Train's controller.

    Ray's controller does not know of such a gang: it ends without freeing its placement group, which
    then lives as long as the search's job and keeps its resources from all other trials.
    """

    def __init__(self) -> None:
        self._gang: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._gang = worker_group

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._gang = None

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        self._gang = None

    async def before_controller_shutdown(self) -> None:
        if self._gang is not None:
            self._gang.shutdown()


GLOO_CARD = "GLOO_SOCKET_IFNAME"


class ProcessGroup(TorchConfig):
    """Ray Train's process group, for gloo on the card of the node's address.

    Gloo by itself takes the address that the host's own name stands for, or the loopback card where that cannot be
    used. Debian lets that name stand for 127.0.1.1, and then workers on two hosts never meet.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OnTheCard


class _OnTheCard(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_name_card)
        super().on_start(worker_group, backend_config)


def _name_card() -> None:
    """Tell gloo in this worker which card to use, unless the user has."""
    card = card_of(ray.util.get_node_ip_address())
    if card is not None:
        os.environ.setdefault(GLOO_CARD, card)


def card_of(address: str) -> str | None:
    """The name of this host's network card that has ``address``; ``None`` if none has, as behind a port mapping."""
    cards = psutil.net_if_addrs().items()
    return next((name for name, entries in cards if any(entry.address == address for entry in entries)), None)
