"""Worker: the job that it is given, the loop that it runs, and the reporter that sends its metrics on."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray import train as ray_train
from ray.exceptions import RayActorError
from ray.train.torch import get_device

from raytrain.cluster.draining import OwnNode
from raytrain.cluster.ray_internals import put_value
from raytrain.config.schedules import annealing_end
from raytrain.config.schema import RunConfig, from_dict
from raytrain.config.workers import WorkerSpec
from raytrain.data.cache import open_anywhere
from raytrain.data.corpus import Corpus
from raytrain.metrics import RUNG
from raytrain.models import buffers
from raytrain.models.sampling import sample_text
from raytrain.runs import checkpoint
from raytrain.runs.encoders import read_encoder
from raytrain.runs.records import CHECKPOINTS, OUTCOME, UNSENT, read_outcome
from raytrain.runs.trained_model import from_checkpoint, stored_vocabulary
from raytrain.storage import open_storage
from raytrain.storage.base import retry_storage
from raytrain.storage.lease import Fence, LeaseLostError
from raytrain.tracking.client import TRACKING_ERRORS, connect, explain, patience
from raytrain.tracking.metric_writer import MetricWriter
from raytrain.tracking.runs import Run
from raytrain.tracking.system import SystemMetrics, host_tags
from raytrain.training.divergence import DivergedError
from raytrain.training.early_stopping import EarlyStoppedError, why_early_stopped
from raytrain.training.loop import Part, train
from raytrain.training.preemption import PreemptedError
from raytrain.training.trainer import Trainer, World
from raytrain.utils.errors import UserError

if TYPE_CHECKING:
    from raytrain.storage.base import Storage

PERMANENT_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    TypeError,
    UserError,
    ValueError,
)
"""Errors that would repeat on a retry: they end a run at once."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a worker needs to know about a run, in plain values that any process can receive."""

    config: dict[str, Any]
    corpus: dict[str, str]
    """Address of the corpus, for ``data.cache.open_anywhere``."""
    storage: str
    """Folder or s3:// address of the run."""
    tracking: dict[str, Any]
    """Address of its MLflow run: the fields of ``tracking.runs.Run``."""
    cpus: float
    """CPUs of a worker, and so its threads."""
    draws: int = 0
    """Draws of z for the likelihood estimate at each evaluation; 0 leaves it out."""
    baseline: float | None = None
    """Bits per byte of the n-gram that early stopping compares with; ``None`` for a run that is not a trial."""
    fence: dict[str, Any] | None = None
    """Address of the fence that every write is checked against; ``None`` if nobody else writes there."""
    reported: int = 0
    """Step of the last evaluation that the driver has recorded; later ones of the newest checkpoint are sent again."""
    losses: bool = False
    """Whether its outcome includes the loss of every validation sample."""
    end: int | None = None
    """Step after which the job ends; ``None`` for the last one of its config."""
    origin: str | None = None
    """Storage of the run whose newest checkpoint it starts from; ``None`` for a run that begins with its first step."""
    progress: str | None = None
    """Key of Ray's key-value store for the latest metrics, which the launching process prints."""


def worker_loop(values: dict[str, Any]) -> None:
    """Serve a worker group: join the other workers, then train one run after another until there are no more.

    ``values`` are {"coordinator": handle, "on_gpus": bool}. Ray Train calls this on each worker.
    """
    coordinator, context = values["coordinator"], ray_train.get_context()
    device = get_device() if values["on_gpus"] else torch.device("cpu")
    world = World(rank=context.get_world_rank(), size=context.get_world_size(), device=device)
    node = context.get_node_rank() if context.get_local_rank() == 0 else None

    for number in itertools.count(ray.get(coordinator.begin.remote())):
        job = ray.get(coordinator.job.remote(number))
        if job is None:
            return

        def send(metrics: dict[str, Any], number: int = number) -> None:
            if not ray.get(coordinator.evaluated.remote(number, world.rank, metrics)):
                raise SystemExit  # as Tune does in the process of a trial

        with suppress(SystemExit):
            run(Job(**job), world, send, node)
        ray.get(coordinator.ended.remote(world.size))


def run_in_process(job: Job, worker_spec: WorkerSpec, send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train the run in this process, which has the resources of one worker; return its outcome.

    The loop and the MLflow run are the same as in a worker group, without the group's other processes.

    Raises:
        ray.exceptions.RayActorError: this machine is about to be taken away.
    """
    try:
        run(job, World(device=torch.device("cuda" if worker_spec.on_gpus else "cpu")), send, node=0)
    except PreemptedError as error:
        # the only error that Tune does not count as a failure of the trial
        raise RayActorError(error_msg=str(error), preempted=True) from error
    return read_outcome(job.storage) or {"error": "the run ended without an outcome"}


def run(job: Job, world: World, send: Callable[[dict[str, Any]], None], node: int | None) -> None:
    """Run the training loop on one worker and record its outcome; evaluations go to ``send``.

    ``node`` is the number of the machine whose system metrics this worker logs; ``None`` if another worker logs them.
    """
    release_memory()  # left by the previous run, and not freed until that had returned
    torch.set_num_threads(max(1, int(job.cpus)))
    config = from_dict(job.config)
    storage = open_storage(job.storage)
    if job.fence is not None:
        storage = Fence.at(job.fence).guard(storage)
    report = RayReporter(job, config, rank=world.rank, node=node, send=send)
    encoder = None
    if config.encoder_from is not None:
        # the storage that keeps the corpora for all nodes keeps the encoders too
        encoder = partial(read_encoder, open_storage(job.corpus["storage"]), config.encoder_from)
    part = None
    if job.end is not None:
        part = Part(job.end, None if job.origin is None else open_storage(job.origin).child(CHECKPOINTS))
    try:
        corpus = open_anywhere(job.corpus)
        trained = train(config, corpus, world, storage.child(CHECKPOINTS), report, job.draws, encoder, part)
        outcome: dict[str, Any] = asdict(trained)
    except (FloatingPointError, EarlyStoppedError) as error:
        outcome = {"early_stopped": str(error)}  # from the same metrics on every worker
        if isinstance(error, DivergedError):
            outcome["last_good"] = error.last_good
    except LeaseLostError:
        report.close(None)
        raise
    except PERMANENT_ERRORS as error:
        if world.size > 1:
            raise  # the other workers may be waiting for this one
        _log.exception("the run has failed")
        outcome = {"error": f"{type(error).__name__}: {error}"}
    except PreemptedError:
        report.close(None)
        if world.size > 1:
            torch.distributed.barrier()  # the first worker to leave ends the group: not before rank 0 has saved
        raise
    except SystemExit:
        # the trial was stopped, and its process continues with another
        report.close(storage)
        raise
    unsent = report.close(storage)
    if world.rank == 0:
        outcome["unsent"] = unsent
        if "early_stopped" not in outcome:
            outcome["samples"] = final_samples(job)
            if job.losses and "error" not in outcome:
                outcome["losses"] = validation_losses(job, config, corpus, world.device)
        text = json.dumps(outcome).encode()
        retry_storage(lambda: storage.write(OUTCOME, text))


def final_samples(job: Job, num: int = 10) -> list[str]:
    """Draw texts from the run's best checkpoint, for its outcome and for its MLflow run, where the driver puts them."""
    location = open_storage(job.storage).child(CHECKPOINTS)
    stored = retry_storage(lambda: checkpoint.best(location))
    if stored is None:
        return []
    return sample_text(from_checkpoint(stored), num)


def validation_losses(
    job: Job, config: RunConfig[Any], corpus: Corpus, device: torch.device
) -> dict[str, list[float]] | None:
    """Return ``Trainer.losses`` of the run's best checkpoint; ``None`` if the run has none."""
    stored = retry_storage(lambda: checkpoint.best(open_storage(job.storage).child(CHECKPOINTS)))
    if stored is None:
        return None
    trainer = Trainer(config, corpus, World(device=device))
    trainer.use_vocabulary(stored_vocabulary(stored))
    trainer.model.load_state_dict(stored.matching("model", trainer.model.state_dict()))
    return trainer.losses(job.draws)


class RayReporter:
    """Reporter of a worker: rank 0's metrics go to MLflow and to the terminal, every rank's evaluations to Ray."""

    FLUSH_S = 10.0
    """Longest wait for MLflow before an evaluation is reported, since the run may be stopped then."""

    def __init__(
        self,
        job: Job,
        config: RunConfig[Any],
        *,
        rank: int,
        node: int | None,
        send: Callable[[dict[str, Any]], None],
    ) -> None:
        self.send = send
        self.config = config
        self.baseline = job.baseline
        self.annealing_end = annealing_end(config.objective, config.steps)
        self.progress = job.progress
        self.reported = job.reported
        self.writer: MetricWriter | None = None
        self.system: SystemMetrics | None = None
        self.system_writer: MetricWriter | None = None
        if rank != 0 and node is None:
            return
        run = Run(**job.tracking)
        connect(run.uri)  # before there are threads
        if rank == 0:
            self._tag(run)
            self.writer = MetricWriter(run.uri, run.run_id)
            self.system = SystemMetrics(self.writer, run.created_ms)
        else:
            # no two writers share a metric, so that repetitions can be recognised
            self.system_writer = MetricWriter(run.uri, run.run_id)
            self.system = SystemMetrics(self.system_writer, run.created_ms, node=f"node-{node}")

    def _tag(self, run: Run) -> None:
        """Tag the run with where it is now computed, if MLflow accepts that at once: training does not wait."""
        try:
            with patience(0):
                run.set_tags(host_tags())
        except TRACKING_ERRORS as error:
            _log.warning("the host of run %s is not recorded: %s", run.run_id, explain(error))

    def resumed(self, evaluations: list[dict[str, float]]) -> None:
        for evaluation in evaluations:
            if evaluation["step"] > self.reported:
                metrics = {name: value for name, value in evaluation.items() if name != "step"}
                self.evaluated(int(evaluation["step"]), metrics)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        assert self.writer is not None  # the loop logs on rank 0 only
        self.writer.log(step, metrics)
        if self.progress is not None:
            put_value(self.progress, json.dumps([step, metrics]))

    def pending(self) -> list[Any]:
        return self.writer.pending() if self.writer is not None else []

    def replay(self, records: list[Any]) -> None:
        assert self.writer is not None
        try:
            self.writer.replay(records)
        except ValueError as error:
            raise UserError(f"the newest checkpoint keeps metrics that are none ({error}): delete it") from None

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        early_stopped = None if self.baseline is None else why_early_stopped(self.config, step, metrics, self.baseline)
        # no trial is stopped before its own annealing has ended, nor while it writes its outcome
        comparable = self.annealing_end <= step < self.config.steps and early_stopped is None
        if comparable and self.writer is not None and self.baseline is not None:
            # the scheduler may answer by killing this process; a run that is no trial has no scheduler
            self.writer.flush(self.FLUSH_S)
        self.send({"step": step, **metrics} | ({RUNG: step} if comparable else {}))
        if early_stopped is not None:
            raise EarlyStoppedError(early_stopped)  # on every rank: all have the same metrics

    @cached_property
    def own_node(self) -> OwnNode:
        return OwnNode()

    def preemption_notice(self) -> bool:
        return self.own_node.is_draining()

    def close(self, storage: Storage | None) -> int:
        """Send pending records; keep under ``storage`` those that cannot be sent. Return how many those are.

        ``storage`` is ``None`` if the newest checkpoint keeps them.
        """
        if self.system is not None:
            self.system.close()
        if self.system_writer is not None:
            self.system_writer.close()
        if self.writer is None:
            return 0
        if storage is None:
            return self.writer.close(self.FLUSH_S)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / UNSENT
            num_unsent = self.writer.close(unsent=file)
            if num_unsent:
                retry_storage(lambda: storage.upload(UNSENT, file))
        return num_unsent


def release_memory() -> None:
    """Return unused memory of this process to the system.

    glibc keeps freed memory in arenas, eight for every core, and each run's threads get other arenas than those of the
    previous run. In time the process would hold many times the memory of one run. On a GPU PyTorch keeps freed memory,
    which another process on the same GPU may need.
    """
    gc.collect()  # a trainer and its recorder reference each other
    buffers.clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)
