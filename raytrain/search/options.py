"""Options of a search, as the command line and the Python API take them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from raytrain.config.schema import RunConfig
from raytrain.config.workers import Device, WorkerOptions
from raytrain.metrics import Objective
from raytrain.runs.records import EXPERIMENT, check_name
from raytrain.runs.repeats import Confirm
from raytrain.search.space import Space
from raytrain.utils.errors import UserError

NUM_SAMPLES = 8
"""Trials of a search whose number is not given."""


@dataclass
class SearchOptions:
    """Options of a search; all else is a field of every trial's config that the space does not set."""

    num_samples: int | None = None
    """Trials, or members of a population; default 8, or every point of a grid. A resumed search can be given more
    trials."""
    space: str | None = None
    """Search space: a Python file, or a name in search_spaces/; default: the model's name."""
    budget: str | None = None
    """Budget of the space, where it defines any; default: its first."""
    algorithm: str | None = None
    """Sampler that draws the trials: tpe, gp, random, grid or a registered one; or pbt, which changes hyperparameters
    while a population of models is trained; default: the one that the space names, otherwise tpe."""
    parts: int | None = None
    """With pbt: parts in which each member is trained; after each the worst members are replaced; default: the most up
    to 8 that end at an evaluation."""
    scheduler: str | None = None
    """Scheduler that stops trials early: asha, none or a registered one; default: asha, but none for a grid and for
    --search-objective pareto."""
    search_objective: Objective = "bound"
    """Search objective: the lowest negative ELBO (bound), the lowest importance-weighted likelihood estimate (nll), or
    the Pareto front of negative ELBO and use of the code (pareto: ASHA stops no trial)."""
    min_used: float = 0.0
    """Constraint: a trial whose decoder uses less of the code, in nats per sample, cannot win."""
    max_parameters: int | None = None
    """Limit: a point of the space whose model has more parameters is drawn again, not trained; default: no limit."""
    confirm: str | None = None
    """K:S, confirm the winner: when the search has ended, its best K configs are trained again with S new seeds each,
    and the best mean wins; default: none, since it takes K x S whole trials more."""
    confirm_steps: int | None = None
    """Steps of the trials that confirm; default: those of the search's trials."""
    confirm_share: float = 1.0
    """Share of its new seeds in which a config must keep the constraint to win."""
    warm_start: tuple[str, ...] = ()
    """Earlier searches (names, folders or MLflow experiments), whose comparable results the sampler begins with; or
    configs of the first trials: config.json files, run folders, MLflow run ids or models:/NAME@ALIAS."""
    ablate: str | None = None
    """Name of an earlier search: what each field of its winner brings. The winner is trained again, and again with each
    field back at the default, each with 3 new seeds, or with the S of --confirm K:S."""
    time_budget: float | None = None
    """Seconds after which running trials are interrupted, to be continued by --resume; default: no limit."""
    max_concurrent: int | None = None
    """Most trials at once; default: as many as fit."""
    workers_per_trial: int = 1
    """DDP workers of each trial."""
    cpus_per_worker: float = 1.0
    """CPUs of each worker."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; default: 1 if the cluster has any, otherwise 0. Fractions only with one worker."""
    device: Device = "auto"
    """Device that workers compute on; cpu leaves the GPUs that they reserve unused."""
    dry_run: bool = False
    """Check everything, print the plan, and stop. Nothing is recorded."""
    bench: tuple[str, ...] = ()
    """Benchmark files (paths or s3:// addresses) used to estimate the run time; one per model."""
    price_per_hour: float | None = None
    """Price of one worker's share of a machine for an hour, in any currency; default: no cost estimate."""
    name: str | None = None
    """Name of the search; default: the model or space, the time and a random part. The same name and config resume
    it."""
    resume: str | None = None
    """Name of the search to resume; only its storage must be given beside it, if that is not the default."""
    storage: str | None = None
    """Folder or s3://bucket/prefix where everything is kept; default: $RAYTRAIN_STORAGE or ./runs."""
    address: str | None = None
    """Address of the Ray cluster; default: the one that is found, otherwise a new one on this machine."""
    experiment: str = EXPERIMENT
    """MLflow experiment."""

    def worker_options(self) -> WorkerOptions:
        """Return the options of one trial's workers."""
        return WorkerOptions(str(self.workers_per_trial), self.cpus_per_worker, self.gpus_per_worker, self.device)

    def confirmation(self, seed: int) -> Confirm | None:
        """Return how a search with this ``seed`` confirms its winner; ``None`` if it does not.

        Raises:
            UserError: one of the confirmation options has an invalid value.
        """
        if self.confirm is None:
            return None
        return Confirm.parse(self.confirm, seed, self.confirm_steps, self.confirm_share)

    def check(self) -> None:
        """Refuse invalid numbers and names.

        Raises:
            UserError: an option is invalid; the message names it.
        """
        if self.name is not None:
            check_name(self.name)
        if self.num_samples is not None and self.num_samples < 1:
            raise UserError(f"--num-samples is {self.num_samples}: a search needs at least one trial")
        if self.parts is not None and self.parts < 2:
            raise UserError(f"--parts is {self.parts}: give at least 2, after the first of which members are replaced")
        if not (self.min_used >= 0 and math.isfinite(self.min_used)):
            raise UserError(f"--min-used is {self.min_used:g}: give nats of at least 0")
        if self.max_parameters is not None and self.max_parameters < 1:
            raise UserError(f"--max-parameters is {self.max_parameters}: a model has at least one")
        if self.confirm is None and (self.confirm_steps is not None or self.confirm_share != 1):
            option = "--confirm-share" if self.confirm_steps is None else "--confirm-steps"
            raise UserError(f"{option} needs --confirm K:S")
        self.confirmation(seed=0)
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise UserError(f"--max-concurrent is {self.max_concurrent}: at least one trial must run")
        price = self.price_per_hour
        if price is not None and not (price >= 0 and math.isfinite(price)):
            raise UserError(f"--price-per-hour is {price:g}: give a price of at least 0")
        if self.time_budget is not None and not self.time_budget > 0:
            raise UserError(f"--time-budget is {self.time_budget:g}: give a number of seconds above 0")


RESUMABLE = ("time_budget", "max_concurrent", "workers_per_trial", "cpus_per_worker", "gpus_per_worker", "device")
"""Options that affect how trials run but not their results: a resumed search may change them."""


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """A search as requested: its options, and the configs that its space changes."""

    options: SearchOptions
    space: Space
    bases: dict[str, RunConfig[Any]]
    """Model name -> the config that the space's fields change."""
    size: str
    """Origin of the configs, as text."""
    corpus: tuple[str, str] | None = None
    """Digest of the corpus of an earlier search, and its path there; ``None`` where ``first`` names the text."""

    @property
    def first(self) -> RunConfig[Any]:
        """The config of the first model: its seed and text are those of the search."""
        return next(iter(self.bases.values()))
