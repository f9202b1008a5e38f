"""A gang of Ray Train workers that trains one run, and what each of them does."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.config import RunConfig, from_dict
from raytrain.resources import Gang

if TYPE_CHECKING:
    from raytrain.storage import Storage

UNSENT = "unsent_metrics.jsonl"
"""Metrics that MLflow did not take before the run ended, for ``python -m raytrain.tracking send``."""
OUTCOME = "outcome.json"
"""Written under a run's storage when it has ended: it is not trained again."""
RUNG = "comparable_step"
"""A run's step as the scheduler of a search sees it: reported only while the run may be stopped."""
RETRIES = 3
"""Deaths of workers, and then of controllers, that a run survives."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know of a run; plain values, so that it travels anywhere."""

    config: dict[str, Any]
    corpus: str
    """Folder of the prepared corpus."""
    storage: str
    """Folder or s3:// address that is the run's own."""
    tracking: dict[str, Any]
    """Address of its MLflow run: the fields of ``tracking.Run``."""
    cpus: float
    """CPUs of a worker: its threads."""
    progress: str | None = None
    """Key of Ray's store under which the latest metrics are put for whoever shows them."""


def fit(job: Job, gang: Gang, name: str, scratch: str, callbacks: list[Any] | None = None) -> dict[str, Any]:
    """Train the run on a gang of workers; returns its outcome. Ray's own bookkeeping goes to ``scratch``.

    A dead worker restarts the gang from the newest checkpoint. Ray's controller has no restarts of its
    own, so a bounded retry stands around it.

    Raises:
        ray.train.TrainingFailedError: the run failed more often than it may.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal import constants as train_constants

    # Ray's cleaner of placement groups asks "the" cluster of its host who is alive; with two on one host
    # it gives up, unless it is told which one is its own.
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    train_constants.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    for attempt in range(RETRIES + 1):
        trainer = TorchTrainer(
            work,
            train_loop_config=asdict(job),
            scaling_config=ScalingConfig(
                num_workers=gang.workers, use_gpu=gang.gpus > 0, resources_per_worker=gang.per_worker
            ),
            run_config=RunConfig(
                name=name,
                # checkpoints are ours; a place of its own keeps Ray from resuming an attempt in its own way
                storage_path=tempfile.mkdtemp(dir=scratch),
                failure_config=FailureConfig(max_failures=RETRIES),
                callbacks=callbacks or [],
            ),
        )
        try:
            trainer.fit()
            break
        except RayActorError:
            if attempt == RETRIES:
                raise
    return read_outcome(job.storage) or {"error": "the run ended without an outcome"}


def read_outcome(storage: str) -> dict[str, Any] | None:
    """What a run that has ended left, ``None`` if it has not ended."""
    from raytrain.storage import open_storage

    place = open_storage(storage)
    return json.loads(place.read(OUTCOME)) if place.exists(OUTCOME) else None


def work(values: dict[str, Any]) -> None:
    """What each worker does: join the others, run the loop, say what came of it."""
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device

    from raytrain.data.corpus import Corpus
    from raytrain.loop import World, train
    from raytrain.storage import open_storage

    job = Job(**values)
    torch.set_num_threads(max(1, int(job.cpus)))
    context = ray_train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    config = from_dict(job.config)
    storage = open_storage(job.storage)
    report = RayReport(job, config, world.rank)
    try:
        outcome: dict[str, Any] = asdict(
            train(config, Corpus.open(job.corpus), world, storage.child("checkpoints"), report)
        )
    except FloatingPointError as error:
        # the same would happen again: an outcome, not something to retry
        outcome = {"error": str(error)}
    if world.rank == 0:
        outcome["unsent"] = report.close(storage)
        if "error" not in outcome:
            outcome["samples"] = final_samples(job)
        storage.write(OUTCOME, json.dumps(outcome).encode())


def final_samples(job: Job, num: int = 10) -> list[str]:
    """Texts from the run's best checkpoint, kept as an artifact of its MLflow run."""
    from raytrain import checkpoint
    from raytrain.models import from_checkpoint, sample_text
    from raytrain.storage import open_storage
    from raytrain.tracking import Run

    stored = checkpoint.best(open_storage(job.storage).child("checkpoints"))
    if stored is None:
        return []
    samples = sample_text(from_checkpoint(stored), num)
    Run(**job.tracking).log_text("\n".join(samples) + "\n", "samples.txt")
    return samples


class RayReport:
    """Rank 0's metrics to MLflow and to whoever watches; every rank's evaluations to Ray."""

    FLUSH_S = 10.0
    """Longest wait for MLflow before a report after which the run may be stopped."""

    def __init__(self, job: Job, config: RunConfig[Any], rank: int) -> None:
        from raytrain.objective import annealing_end
        from raytrain.tracking import MetricWriter, Run, SystemMetrics, host_tags

        self.steps = config.steps
        self.annealing_end = annealing_end(config.objective, config.steps)
        self.progress = job.progress
        self.writer = None
        if rank == 0:
            run = Run(**job.tracking)
            run.set_tags(host_tags())
            self.writer = MetricWriter(run.uri, run.run_id)
            self.system = SystemMetrics(self.writer, run.created_ms)

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
        self.writer.replay(records)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        from ray import train as ray_train

        # no trial is stopped before its own annealing has ended, nor while it writes its outcome
        comparable = self.annealing_end <= step < self.steps
        if comparable and self.writer is not None:
            # the scheduler's answer may be to kill this process
            self.writer.flush(self.FLUSH_S)
        ray_train.report({"step": step, **metrics} | ({RUNG: step} if comparable else {}))

    def close(self, storage: Storage) -> int:
        """Send what waits; what cannot be sent is kept under ``storage``. Returns the number of such records."""
        if self.writer is None:
            return 0
        self.system.close()
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / UNSENT
            num_unsent = self.writer.close(unsent=file)
            if num_unsent:
                storage.upload(UNSENT, file)
        return num_unsent
