"""Options of a search, as the command line and the Python API take them."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain.config.workers import Device
from raytrain.metrics import Objective
from raytrain.runs.records import EXPERIMENT

NUM_SAMPLES = 8
"""Trials of a search that does not say how many."""


@dataclass
class SearchOptions:
    """Options of the command; all else is a field of every trial's config that the space does not set."""

    num_samples: int | None = None
    """Trials; default 8, or every point of a grid. A resumed search can be given more."""
    space: str | None = None
    """Search space: a Python file, or a name in search_spaces/; by default that of the model."""
    budget: str | None = None
    """One of the space's budgets, where it has any; default its first."""
    algorithm: str | None = None
    """How points are chosen: tpe, random, grid, or a registered one; default what the space says, otherwise tpe."""
    scheduler: str | None = None
    """Which trials are stopped early: asha, none, or a registered one; default asha, but none for a grid and for
    --objective pareto."""
    objective: Objective = "bound"
    """What is looked for: the lowest bound, the lowest importance-weighted likelihood estimate (nll), or the trials
    that none beats in both bound and KL (pareto: no trial is stopped for others)."""
    min_kl: float = 0.0
    """KL in nats per sample without which a trial is no winner."""
    warm_start: tuple[str, ...] = ()
    """Configs that are tried first: config.json files, run folders, MLflow run ids, models:/NAME@ALIAS."""
    time_budget: float | None = None
    """Seconds after which running trials are interrupted; --resume goes on with them."""
    max_concurrent: int | None = None
    """Most trials at once; by default as many as fit."""
    workers_per_trial: int = 1
    """DDP workers of each trial."""
    cpus_per_worker: float = 1.0
    """CPUs of each worker."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; default 1 if the cluster has any, otherwise 0. Fractions only with one worker."""
    device: Device = "auto"
    """What workers compute on: cpu leaves the GPUs that they reserve unused."""
    dry_run: bool = False
    """Check everything, say what the search would be, and stop. Nothing is recorded."""
    bench: tuple[str, ...] = ()
    """What ``python -m raytrain.bench MODEL --output`` has written, by which hours are foretold: files or s3://
    addresses, one for each model."""
    price_per_hour: float | None = None
    """Price of one worker's part of a machine for an hour, in any currency, by which the cost is foretold."""
    name: str | None = None
    """Name of the search; by default the model or space and the time. The same name and config resume it."""
    resume: str | None = None
    """Name of a search to go on with; nothing else is needed but where its storage is."""
    storage: str | None = None
    """Folder or s3://bucket/prefix for all that is kept; default $RAYTRAIN_STORAGE or ./runs."""
    address: str | None = None
    """Ray cluster to use; by default the one that is found, or a new one on this machine."""
    experiment: str = EXPERIMENT
    """MLflow experiment."""


WORKERS = ("time_budget", "max_concurrent", "workers_per_trial", "cpus_per_worker", "gpus_per_worker", "device")
"""The options that say how a trial runs, not what comes of it: a resumption may change them."""
