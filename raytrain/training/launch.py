"""Train one model on a gang of Ray Train workers.

    python -m raytrain.train hybrid
    python -m raytrain.train hybrid --preset paper-ptb --data-path PTB --workers 2 --name ptb
    python -m raytrain.train byte_lstm --config config.json
    python -m raytrain.train --best-of SEARCH --steps 10000 --seed 1
    python -m raytrain.train --resume NAME

Started again with the same --name, or with --resume, it goes on where it stopped.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from tempfile import TemporaryDirectory
from typing import Any

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

from raytrain.cluster.resources import Cluster
from raytrain.config.schema import RunConfig, flatten, identity, to_dict
from raytrain.config.workers import WorkerOptions, WorkerSpec, parse_workers
from raytrain.metrics import COLLAPSED_KL
from raytrain.runs.records import UNSENT, claim_name, read_outcome, write_run_address
from raytrain.runs.workspace import Workspace
from raytrain.tracking.runs import Experiment
from raytrain.training.options import TrainOptions
from raytrain.training.reporters import Progress
from raytrain.training.supervisor import WorkerGroupLostError, run_with_retries
from raytrain.training.worker import Job, worker_loop
from raytrain.training.worker_group import WorkerGroup
from raytrain.utils.errors import UserError


def make_worker_spec(options: TrainOptions, cluster: Cluster) -> WorkerSpec:
    """The workers to ask for: with GPUs if the cluster has or may get any, wherever this command runs."""
    fewest, most = parse_workers(options.workers)
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.has_gpus else 0.0
    cpus = options.cpus_per_worker
    if cpus is None:
        cpus = 1.0 if gpus else max(1.0, cluster.total("CPU") // max(1, most or fewest))
    return WorkerSpec(fewest, cpus, gpus, most, options.device)


def train(
    options: TrainOptions,
    config: RunConfig[Any],
    workspace: Workspace,
    worker_spec: WorkerSpec,
    best_of: str | None = None,
) -> None:
    """Run the training and print what came of it; ``best_of`` says of which search's trial the config is."""
    corpus = workspace.corpus
    name = options.name or f"{config.model_name}-{identity(config, corpus.digest)[:8]}"
    asked = WorkerOptions(options.workers, options.cpus_per_worker, options.gpus_per_worker, options.device)
    claim = claim_name(workspace.storage, name, config, corpus, options.experiment, asked)
    location = workspace.storage.uri(name)
    outcome = read_outcome(location)
    experiment = Experiment.open(workspace.tracking_uri, claim.experiment, workspace.artifact_root())
    print(f"run {name}: {config.model_name} on {corpus.name}, {worker_spec}, kept in {location}", flush=True)
    run = experiment.find_run(claim.identity)
    if outcome is None:
        run = experiment.open_run(
            claim.identity,
            name,
            config=to_dict(config),
            parameters=flatten(config),
            tags={
                "kind": "run",
                "corpus": corpus.digest,
                "seed": str(config.seed),
                "workers": str(worker_spec),
                "location": location,
            }
            | ({"best_of": best_of} if best_of is not None else {}),
        )
        write_run_address(workspace.storage.child(name), run)
        progress = f"raytrain/progress/{name}"
        job = Job(
            to_dict(config), workspace.corpus_address(), location, asdict(run), worker_spec.cpus, progress=progress
        )
        workspace.log_corpus(run)
        try:
            with shown_progress(progress, config.steps), TemporaryDirectory(prefix="raytrain-") as scratch:
                held = WorkerGroup(worker_loop, worker_spec, name, scratch)
                outcome = run_with_retries(job, held, send=lambda evaluation: None)
                held.dismiss()
        except BaseException as error:
            run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", repr(error))
            if isinstance(error, WorkerGroupLostError):
                raise UserError(f"run {name}: {error}; --resume {name} goes on from there") from error
            raise
        reason = outcome.get("error") or outcome.get("early_stopped")
        run.finish("FAILED" if reason else "FINISHED", reason)
    else:
        print("this run has ended already; choose another --name to train again")
    if outcome.get("unsent"):
        unsent = workspace.storage.child(name).uri(UNSENT)
        print(f"{outcome['unsent']} records did not reach MLflow: python -m raytrain.tracking send {unsent}")
    if reason := outcome.get("error") or outcome.get("early_stopped"):
        raise UserError(f"run {name} failed: {reason}")
    best = outcome["best"]
    print(f"computed in {outcome['precision']} on {outcome['device']}")
    print(
        f"best at step {outcome['best_step']}: bound {best['bits_per_byte']:.3f} bits/byte "
        f"({best['bound']:.1f} nats a sample, KL {best['kl']:.2f}, {best['active_units']:.0f} active units)"
    )
    if config.model_name != "byte_lstm" and best["kl"] < COLLAPSED_KL:
        print(
            f"warning: its posterior has collapsed (KL {best['kl']:.3f} nats): the latent code says nothing; "
            "try --objective.free-bits 2, or a later --objective.end"
        )
    print("\n".join(f"  {sample!r}" for sample in outcome["samples"]))
    print(f"see it: {run.ui_hint() if run is not None else experiment.ui_hint()}")


@contextmanager
def shown_progress(key: str, steps: int) -> Iterator[None]:
    """Print a progress line whenever rank 0 has put new metrics under ``key``."""
    progress = Progress(steps)
    ended = threading.Event()

    def watch() -> None:
        seen = None
        while not ended.wait(0.5):
            value = _internal_kv_get(key)
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
        _internal_kv_del(key)
