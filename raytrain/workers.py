"""What each worker does to train a run, in a gang or alone, and how a run outlives its gang."""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.config import RunConfig, from_dict
from raytrain.errors import UserError
from raytrain.json_text import parse_json, typed
from raytrain.reference import CHECKPOINTS
from raytrain.resources import Gang
from raytrain.storage import open_storage, patiently
from raytrain.trials import FIGURES

if TYPE_CHECKING:
    from raytrain.drain import OwnNode
    from raytrain.gangs import HeldGang
    from raytrain.storage import Storage
    from raytrain.trainer import World

UNSENT = "unsent_metrics.jsonl"
"""Metrics that MLflow did not take before the run ended, for ``python -m raytrain.tracking send``."""
OUTCOME = "outcome.json"
"""Written under a run's storage when it has ended: it is not trained again."""
TRAINED = {"best_step": int, "best": dict[str, float], "precision": str, "device": str, "samples": list[str]}
"""What is in it of a run that did not fail."""
RUNG = "comparable_step"
"""A run's step as the scheduler of a search sees it: reported only while the run may be stopped."""
RETRIES = 3
"""Gangs that take over from one that died, in training or while it started, as long as no newer checkpoint comes."""
PREEMPTIONS = 100
"""Times that a run survives the loss of a machine that was announced."""
CERTAIN = (
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
"""Errors that come back when the same is done again: a run ends with them at once."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know of a run; plain values, so that it travels anywhere."""

    config: dict[str, Any]
    corpus: dict[str, str]
    """What ``data.store.open_anywhere`` finds the corpus by."""
    storage: str
    """Folder or s3:// address that is the run's own."""
    tracking: dict[str, Any]
    """Address of its MLflow run: the fields of ``tracking.Run``."""
    cpus: float
    """CPUs of a worker: its threads."""
    draws: int = 0
    """Draws of z for the likelihood at each evaluation."""
    unigram: float | None = None
    """Bits per byte above which a trial is hopeless; a run that is no trial is never."""
    progress: str | None = None
    """Key of Ray's store under which the latest metrics are put for whoever shows them."""


def fit(job: Job, gang: HeldGang, send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train the run on a gang of workers; returns its outcome. ``send`` gets evaluations and may stop it by raising.

    Where a process of the gang dies, another gang goes on from the newest checkpoint: ``RETRIES`` times without a
    newer one, but not where an error comes back; where a machine is taken away with notice, ``PREEMPTIONS`` times. To
    wait for places is no failure.
    The retries are here and not in Ray's controller, which neither survives its own death, nor bounds those while
    workers start, nor tells an error that will come back from one that may not.

    Raises:
        ray.train.TrainingFailedError: an error that comes back, as it was raised.
        GangLostError: the run failed for good; the first of the causes since its newest checkpoint.
    """
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    from raytrain.checkpoint import newest_step
    from raytrain.drain import was_preempted

    checkpoints = open_storage(job.storage).child(CHECKPOINTS)
    newest = patiently(lambda: newest_step(checkpoints))
    causes: list[str] = []
    preemptions = 0
    while True:
        try:
            gang.train(asdict(job), send)
            return read_outcome(job.storage) or {"error": "the run ended without an outcome"}
        except (RayActorError, TrainingFailedError) as error:
            failures = _failures(error)
            if was_preempted(error) and preemptions < PREEMPTIONS:
                preemptions += 1
                _log.warning("another gang goes on from the newest checkpoint: %s", _in_words(failures[0]))
                continue
            if any(isinstance(failure, CERTAIN) for failure in failures):
                raise
            if isinstance(failures[0], WorkerGroupStartupTimeoutError):
                _log.warning("there was no place for a gang, asking again: %s", _in_words(failures[0]))
                continue
            if (step := patiently(lambda: newest_step(checkpoints))) != newest:
                newest, causes = step, []
            cause = _in_words(failures[0])
            # a death under the others comes to them as an error too, in words of its own each time
            comes_back = cause in causes and not isinstance(failures[0], RayActorError)
            causes.append(cause)
            if comes_back or len(causes) > RETRIES:
                raise GangLostError(
                    f"{len(causes)} gangs in a row died without a newer checkpoint; the first: {causes[0]}"
                ) from error
            _log.warning("a gang died, another goes on from its newest checkpoint: %s", causes[-1])


class GangLostError(Exception):
    """A run whose gangs died again and again."""


def _failures(error: Exception) -> list[BaseException]:
    """What ended a gang: the errors of its workers, of its controller, or the death of either."""
    of_workers = list(getattr(error, "worker_failures", {}).values())
    failures = of_workers or [getattr(error, "controller_failure", error)]
    # a death that Ray Train's controller has noticed first
    return [getattr(failure, "health_check_failure", failure) for failure in failures]


def _in_words(error: BaseException) -> str:
    """An error in one line: what its process said last, or where and of what it died."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "Traceback" in str(error):
        return lines[-1]
    told = dict(line.partition(": ")[::2] for line in lines)
    if "class_name" in told:
        why = next((line for line in lines if "because" in line), lines[0])
        return f"{told['class_name']} on {told.get('ip', 'no node')}: {why.partition('.')[0]}"
    return lines[0]


def read_outcome(storage: str) -> dict[str, Any] | None:
    """What a run that has ended left, ``None`` if it has not ended.

    Raises:
        UserError: something else stands there.
    """
    place = open_storage(storage)
    if not patiently(lambda: place.exists(OUTCOME)):
        return None
    try:
        outcome = typed(parse_json(patiently(lambda: place.read(OUTCOME))), dict[str, Any], "it")
        failed = {name: str for name in ("error", "hopeless") if name in outcome}
        for name, hint in (failed or TRAINED).items():
            typed(outcome.get(name), hint, name)
        if not failed and (missing := set(FIGURES) - outcome["best"].keys()):
            raise ValueError(f"best has no {min(missing)}")
        typed(outcome.get("unsent", 0), int, "unsent")
        return outcome
    except ValueError as error:
        raise UserError(
            f"{place.uri(OUTCOME)} is not the outcome of a run ({error}): delete it, and the run goes on from its "
            "newest checkpoint"
        ) from None


def serve(values: dict[str, Any]) -> None:
    """What each worker of a gang does: join the others, and train one run after the other until there is none."""
    import ray
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device

    from raytrain.trainer import World

    desk, context = values["desk"], ray_train.get_context()
    device = get_device() if values["on_gpus"] else torch.device("cpu")
    world = World(context.get_world_rank(), context.get_world_size(), device)
    node = context.get_node_rank() if context.get_local_rank() == 0 else None

    for number in itertools.count(ray.get(desk.begin.remote())):
        job = ray.get(desk.job.remote(number))
        if job is None:
            return

        def send(metrics: dict[str, Any], number: int = number) -> None:
            if not ray.get(desk.evaluated.remote(number, world.rank, metrics)):
                raise SystemExit  # as Tune does in a process of its own

        with suppress(SystemExit):
            run(Job(**job), world, send, node)
        ray.get(desk.ended.remote(world.size))


def work_alone(job: Job, gang: Gang, send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train the run in this very process, which has the resources of the gang's one worker; returns its outcome.

    The same loop and the same MLflow run as in a gang, without the processes that hold a gang together.

    Raises:
        ray.exceptions.RayActorError: its machine is about to go.
    """
    import torch
    from ray.exceptions import RayActorError

    from raytrain.notice import PreemptedError
    from raytrain.trainer import World

    try:
        run(job, World(device=torch.device("cuda" if gang.on_gpus else "cpu")), send, node=0)
    except PreemptedError as error:
        # the only error that Tune does not count among a trial's failures
        raise RayActorError(error_msg=str(error), preempted=True) from error
    return read_outcome(job.storage) or {"error": "the run ended without an outcome"}


def run(job: Job, world: World, send: Callable[[dict[str, Any]], None], node: int | None) -> None:
    """Run the loop on one worker and say what came of it; evaluations go to ``send``.

    ``node``: which of the run's machines this worker stands for in system metrics; ``None`` for the others.
    """
    import torch

    from raytrain.data.store import open_anywhere
    from raytrain.divergence import DivergedError
    from raytrain.hopeless import HopelessError
    from raytrain.loop import train
    from raytrain.memory import give_back
    from raytrain.notice import PreemptedError

    give_back()  # what the run before has left, which is not free before it has returned
    torch.set_num_threads(max(1, int(job.cpus)))
    config = from_dict(job.config)
    storage = open_storage(job.storage)
    report = RayReport(job, config, world.rank, node, send)
    try:
        trained = train(config, open_anywhere(job.corpus), world, storage.child(CHECKPOINTS), report, job.draws)
        outcome: dict[str, Any] = asdict(trained)
    except (FloatingPointError, HopelessError) as error:
        outcome = {"hopeless": str(error)}  # of the same figures on every worker
        if isinstance(error, DivergedError):
            outcome["last_good"] = error.last_good
    except CERTAIN as error:
        if world.size > 1:
            raise  # the others may be waiting for this worker
        _log.exception("the run has failed")
        outcome = {"error": f"{type(error).__name__}: {error}"}
    except PreemptedError:
        report.close(None)
        if world.size > 1:
            torch.distributed.barrier()  # the first to leave ends the gang: not before rank 0 has saved
        raise
    except SystemExit:
        # the trial was stopped, and its process goes on with another
        report.close(storage)
        raise
    unsent = report.close(storage)
    if world.rank == 0:
        outcome["unsent"] = unsent
        if "hopeless" not in outcome:
            outcome["samples"] = final_samples(job)
        text = json.dumps(outcome).encode()
        patiently(lambda: storage.write(OUTCOME, text))


def final_samples(job: Job, num: int = 10) -> list[str]:
    """Texts from the run's best checkpoint, kept as an artifact of its MLflow run."""
    from raytrain import checkpoint
    from raytrain.models import from_checkpoint, one_line, sample_text
    from raytrain.tracking import Run

    place = open_storage(job.storage).child(CHECKPOINTS)
    stored = patiently(lambda: checkpoint.best(place))
    if stored is None:
        return []
    samples = sample_text(from_checkpoint(stored), num)
    Run(**job.tracking).log_text("".join(one_line(text) + "\n" for text in samples), "samples.txt")
    return samples


class RayReport:
    """Rank 0's metrics to MLflow and to whoever watches; every rank's evaluations to Ray."""

    FLUSH_S = 10.0
    """Longest wait for MLflow before a report after which the run may be stopped."""

    def __init__(
        self,
        job: Job,
        config: RunConfig[Any],
        rank: int,
        node: int | None,
        send: Callable[[dict[str, Any]], None],
    ) -> None:
        from raytrain.objective import annealing_end
        from raytrain.tracking import MetricWriter, Run, SystemMetrics, host_tags
        from raytrain.tracking.server import connect

        self.send = send
        self.config = config
        self.unigram = job.unigram
        self.annealing_end = annealing_end(config.objective, config.steps)
        self.progress = job.progress
        self.writer: MetricWriter | None = None
        self.system: SystemMetrics | None = None
        self.system_writer: MetricWriter | None = None
        if rank != 0 and node is None:
            return
        run = Run(**job.tracking)
        connect(run.uri)  # imports MLflow before there are threads: two that import it at once can fail
        if rank == 0:
            run.set_tags(host_tags())
            self.writer = MetricWriter(run.uri, run.run_id)
            self.system = SystemMetrics(self.writer, run.created_ms)
        else:
            # no two writers share a metric, so that what is sent twice can be told
            self.system_writer = MetricWriter(run.uri, run.run_id)
            self.system = SystemMetrics(self.system_writer, run.created_ms, node=f"node-{node}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        assert self.writer is not None  # the loop logs on rank 0 only
        self.writer.log(step, metrics)
        if self.progress is not None:
            _internal_kv_put(self.progress, json.dumps([step, metrics]))

    def pending(self) -> list[Any]:
        return self.writer.pending() if self.writer is not None else []

    def replay(self, records: list[Any]) -> None:
        assert self.writer is not None
        try:
            self.writer.replay(records)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"the newest checkpoint keeps metrics that are none ({error}): delete it") from None

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        from raytrain.hopeless import HopelessError, why_hopeless

        hopeless = None if self.unigram is None else why_hopeless(self.config, step, metrics, self.unigram)
        # no trial is stopped before its own annealing has ended, nor while it writes its outcome
        comparable = self.annealing_end <= step < self.config.steps and hopeless is None
        if comparable and self.writer is not None and self.unigram is not None:
            # the scheduler's answer may be to kill this process; a run that is no trial has none
            self.writer.flush(self.FLUSH_S)
        self.send({"step": step, **metrics} | ({RUNG: step} if comparable else {}))
        if hopeless is not None:
            raise HopelessError(hopeless)  # on every rank: all have the same figures

    @cached_property
    def own_node(self) -> OwnNode:
        from raytrain.drain import OwnNode

        return OwnNode()

    def notice(self) -> bool:
        return self.own_node.is_draining()

    def close(self, storage: Storage | None) -> int:
        """Send what waits; what cannot be sent is kept under ``storage``. Returns the number of such records.

        ``None`` where the newest checkpoint keeps it.
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
                patiently(lambda: storage.upload(UNSENT, file))
        return num_unsent
