"""Launching a run: claim its name, open its MLflow run, start its worker group and follow it to the end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

from raytrain.cluster.connection import connect
from raytrain.cluster.ray_internals import delete_value, get_value
from raytrain.cluster.resources import read_cluster, traffic, worker_spec
from raytrain.config.schema import RunConfig, fingerprint, flatten, to_dict
from raytrain.config.workers import WorkerSpec, parse_workers
from raytrain.models import num_parameters
from raytrain.models.ladder import Ladder, validation_ladder
from raytrain.runs.encoders import Encoder, find_encoder
from raytrain.runs.records import (
    UNSENT,
    add_unsent,
    check_free,
    claim_name,
    known_claim,
    read_outcome,
    write_run_address,
)
from raytrain.runs.workspace import Workspace
from raytrain.storage.base import Storage
from raytrain.storage.lease import Lease, driving, find_free
from raytrain.tracking.client import check_tracking
from raytrain.tracking.outbox import Outbox
from raytrain.tracking.runs import Experiment, Run
from raytrain.training.checks import check_samples
from raytrain.training.options import TrainOptions
from raytrain.training.reporters import Progress
from raytrain.training.supervisor import WorkerGroupLostError, run_with_retries
from raytrain.training.worker import Job, worker_loop
from raytrain.training.worker_group import WorkerGroup
from raytrain.utils.errors import UserError

ENDED_S, INTERRUPTED_S = 30.0, 5.0
"""Seconds that the end of a run waits for MLflow: after a run that is done, and after an interrupted one."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run that has reached its end."""

    name: str
    location: str
    """Folder or s3:// address of its checkpoints and records."""
    config: RunConfig[Any]
    outcome: dict[str, Any]
    """Contents of its ``outcome.json``: best step and metrics, precision, device, samples."""
    ladder: Ladder
    """The bits per byte that n-grams reach on the samples of its evaluations."""
    run: Run | None
    """Its MLflow run, if the tracking store still has it."""
    view: str
    """How to look at it in MLflow, as text."""


def train(
    without_gpus: RunConfig[Any],
    with_gpus: RunConfig[Any],
    options: TrainOptions,
    workspace: Workspace,
    best_of: str | None = None,
) -> TrainedRun:
    """Train one run on a group of Ray Train workers and return it; a known name with the same config is resumed.

    The first config is for a cluster without GPUs, the second for one with GPUs. They are the same if the caller has
    decided. ``best_of`` names the trial that the config is from.

    Raises:
        UserError: a config, a number of workers or a cluster cannot be used; or the run failed, with its cause.
    """
    fewest, most = parse_workers(options.workers)
    workers = most or fewest
    # a resumed run has already loaded its encoder
    encoder = find_encoder(without_gpus, workspace.storage) if options.resume is None else None
    if encoder is not None and without_gpus == with_gpus:
        encoder.check(without_gpus)
    fits_later = workers <= with_gpus.batch_size // with_gpus.group_size
    check_samples(without_gpus, workspace.corpus, 1 if fits_later else workers)
    if options.name is not None:
        check_free(workspace.storage, options.name)
        option = "name" if options.resume is None else "resume"
        free = find_free(workspace.storage.child(options.name), f"--{option} {options.name}: the run")

    connect(options.address)
    cluster = read_cluster()
    config = with_gpus if cluster.has_gpus and options.device != "cpu" else without_gpus
    check_samples(config, workspace.corpus, workers)
    check_tracking(workspace.tracking_uri, cluster.num_nodes)
    spec = worker_spec(options.worker_options(), cluster)
    cluster.admit(spec, 1, head_memory=float("inf"))
    if said := traffic(cluster, spec, num_parameters(config), config.gradients):
        print(said, flush=True)

    if encoder is not None:
        config = encoder.start(config, workspace.storage)
    name = options.name or f"{config.model_name}-{fingerprint(config, workspace.corpus.digest)[:8]}"
    known_claim(workspace.storage, name, config, workspace.corpus)
    if options.name is None:
        free = find_free(workspace.storage.child(name), f"the run {name}")
    with driving(workspace.storage.child(name), free, f"the run {name}") as lease:
        return train_as_driver(name, config, options, workspace, spec, lease, encoder, best_of)


def train_as_driver(
    name: str,
    config: RunConfig[Any],
    options: TrainOptions,
    workspace: Workspace,
    spec: WorkerSpec,
    lease: Lease,
    encoder: Encoder | None,
    best_of: str | None,
) -> TrainedRun:
    """Claim the name of a run, open its MLflow run and train it, under a lease; return it.

    Raises:
        UserError: see ``train``.
    """
    claim = claim_name(
        workspace.storage,
        name,
        config,
        workspace.corpus,
        experiment=options.experiment,
        worker_options=options.worker_options(),
    )
    location = workspace.storage.uri(name)
    outcome = read_outcome(location)
    experiment = Experiment.open(workspace.tracking_uri, claim.experiment, workspace.artifact_root())
    print(f"run {name}: {config.model_name} on {workspace.corpus.name}, {spec}, kept in {location}", flush=True)
    if encoder is not None:
        print(f"encoder of {encoder.reference}, digest {encoder.digest[:12]}", flush=True)
    if outcome is not None:
        print("this run has ended already; choose another --name to train again")
        run = experiment.find_run(claim.identity)
        if run is not None and run.is_running():
            # the previous driver died after the run had ended and before MLflow knew of it
            outcome = record_end(Outbox(run.uri), run, outcome, lease.fence.guard(workspace.storage.child(name)))
    else:
        print(validation_ladder(workspace.corpus, config, quick=True), flush=True)
        run = experiment.deleted_run(claim.identity)
        deleted = run is not None
        if run is None:
            tags = {"workers": str(spec), "location": location}
            tags |= {"best_of": best_of} if best_of is not None else {}
            tags |= {"encoder_from": encoder.reference} if encoder is not None else {}
            run = open_run(experiment, claim.identity, name, config, workspace, tags)
        write_run_address(lease.fence.guard(workspace.storage.child(name)), run)
        outcome = follow(name, config, workspace, spec, run, lease)
        run = None if deleted else run
    if outcome.get("unsent"):
        unsent = workspace.storage.child(name).uri(UNSENT)
        print(f"{outcome['unsent']} records did not reach MLflow: python -m raytrain.tracking send {unsent}")
    if reason := outcome.get("error") or outcome.get("early_stopped"):
        raise UserError(f"run {name} failed: {reason}")
    view = run.ui_hint() if run is not None else experiment.ui_hint()
    ladder = validation_ladder(workspace.corpus, config)
    return TrainedRun(name=name, location=location, config=config, outcome=outcome, ladder=ladder, run=run, view=view)


def open_run(
    experiment: Experiment, identity: str, name: str, config: RunConfig[Any], workspace: Workspace, tags: dict[str, str]
) -> Run:
    """Return the MLflow run of a run, with its config and its corpus; an existing one runs again."""
    run = experiment.open_run(
        identity,
        name,
        config=to_dict(config),
        parameters=flatten(config),
        tags={"kind": "run", "corpus": workspace.corpus.digest, "seed": str(config.seed)} | tags,
    )
    workspace.log_corpus(run)
    return run


def follow(
    name: str, config: RunConfig[Any], workspace: Workspace, spec: WorkerSpec, run: Run, lease: Lease
) -> dict[str, Any]:
    """Start the worker group, print its progress, end the MLflow run with it; return the outcome.

    Records of the end that MLflow does not accept are kept for ``tracking send``.

    Raises:
        UserError: the worker group died again and again.
        LeaseLostError: another driver has taken the run over, and its MLflow run is left to that driver.
    """
    workspace.share_vocabulary(config)
    progress = f"raytrain/progress/{name}"
    job = Job(
        config=to_dict(config),
        corpus=workspace.corpus_address(config),
        storage=workspace.storage.uri(name),
        tracking=asdict(run),
        cpus=spec.cpus,
        fence=lease.fence.address(),
        progress=progress,
    )
    outbox = Outbox(run.uri)
    try:
        with shown_progress(progress, config.steps), TemporaryDirectory(prefix="raytrain-") as scratch:
            group = WorkerGroup(worker_loop, spec, name, scratch)
            outcome = run_with_retries(job, group, send=lambda evaluation: lease.check())
            group.dismiss()
    except BaseException as error:
        lease.confirm()
        # not kept if MLflow is unreachable: the run continues when it is resumed, and its end is reported then
        outbox.end(run.run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", repr(error))
        outbox.close(INTERRUPTED_S)
        if isinstance(error, WorkerGroupLostError):
            raise UserError(f"run {name}: {error}; resume with --resume {name}") from error
        raise
    lease.confirm()
    return record_end(outbox, run, outcome, lease.fence.guard(workspace.storage.child(name)))


def record_end(outbox: Outbox, run: Run, outcome: dict[str, Any], location: Storage) -> dict[str, Any]:
    """Tell MLflow how a run has ended, and close the outbox; keep and count the records that MLflow does not accept."""
    if outcome.get("samples"):
        outbox.log_samples(run.run_id, outcome["samples"])
    reason = outcome.get("error") or outcome.get("early_stopped")
    outbox.end(run.run_id, "FAILED" if reason else "FINISHED", reason)
    if unsent := outbox.close(ENDED_S):
        add_unsent(location, unsent)
    return outcome | {"unsent": outcome.get("unsent", 0) + len(unsent)}


@contextmanager
def shown_progress(key: str, steps: int) -> Iterator[None]:
    """Print a progress line whenever rank 0 has put new metrics under ``key`` of Ray's internal key-value store."""
    progress = Progress(steps)
    ended = threading.Event()

    def watch() -> None:
        seen = None
        while not ended.wait(0.5):
            value = get_value(key)
            if value is not None and value != seen:
                seen = value
                step, metrics = json.loads(value)
                print(progress.line(step, metrics), flush=True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        delete_value(key)
