"""A search: Ray Tune draws configs from a space, runs each as a gang of workers, and stops the poor ones early."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from raytrain.config import RunConfig, flatten, identity, to_dict
from raytrain.resources import Gang
from raytrain.session import Session
from raytrain.space import Space, resolve
from raytrain.workers import RUNG, Job, fit, read_outcome

if TYPE_CHECKING:
    import optuna

    from raytrain.tracking import Experiment, Run

METRIC = "bound"
"""Nats per validation sample on the full bound: what trials are compared on, whatever their annealing."""
REDUCTION = 2
"""Half of the trials that reach a rung go on from it."""


@dataclass
class Trial:
    """One point of the search, and what is known of it."""

    number: int
    config: RunConfig[Any]
    fields: dict[str, Any]
    """The fields of the config that the space has set."""
    run: Run
    place: str
    """Its own storage."""
    point: optuna.trial.Trial
    status: str = "waiting"
    step: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    """The figures of its best evaluation."""
    seconds: float = 0.0
    started: float = 0.0

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.number:03}"


@dataclass(frozen=True)
class Search:
    """What is searched, and within what means."""

    name: str
    config: RunConfig[Any]
    space: Space
    session: Session
    experiment: Experiment
    parent: Run
    gang: Gang
    num_samples: int
    concurrent: int
    time_budget: float | None
    seed: int


class Proposals(Searcher):
    """Draws the next point from Optuna's TPE and makes everything that its trial needs.

    Runs in the driver, which so is the only one to create MLflow runs; workers get their addresses.
    """

    def __init__(self, search: Search, scratch: str) -> None:
        import optuna

        super().__init__(metric=METRIC, mode="min")
        self.search = search
        self.scratch = scratch
        self.study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=search.seed))
        self.trials: dict[str, Trial] = {}
        """By Tune's own trial ids."""
        self._drawn: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Tune's question for the next trial: the arguments of ``run_trial``."""
        search, corpus = self.search, self.search.session.corpus
        point = self.study.ask()
        config = resolve(search.space, search.config, point)
        # the same point can be drawn again: its repeat index makes it a run of its own
        repeat = self._drawn.get(key := identity(config, corpus.digest), 0)
        self._drawn[key] = repeat + 1
        own = identity(config, corpus.digest, repeat)
        number = len(self.trials)
        before, after = flatten(search.config), flatten(config)
        fields = {name: value for name, value in after.items() if value != before[name]}
        run = search.experiment.open_run(
            own,
            f"{search.name}-{number:03}",
            parent=search.parent.run_id,
            config=to_dict(config),
            parameters=after,
            tags={"corpus": corpus.digest, "seed": str(config.seed), "trial": str(number)},
        )
        place = search.session.storage.child(search.name).uri(f"trials/{own}")
        self.trials[trial_id] = Trial(number, config, fields, run, place, point)
        job = Job(to_dict(config), str(corpus.path), place, asdict(run), search.gang.cpus)
        name = f"{search.name}-{number:03}"
        return {"job": asdict(job), "gang": asdict(search.gang), "name": name, "scratch": self.scratch}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tune passes an evaluation on."""
        self.trials[trial_id].point.report(result[METRIC], int(result["step"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna the best bound that the trial reached."""
        import optuna

        trial = self.trials[trial_id]
        if error or not trial.figures:
            self.study.tell(trial.point, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial.point, trial.figures[METRIC])

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its settings for snapshots, which are not used

    def save(self, checkpoint_path: str) -> None:
        """Tune's own snapshots are not used: all that a search knows is in its trials' records."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is not restored from Tune's snapshots")


def run_trial(values: dict[str, Any]) -> None:
    """Tune's trainable: a driver without CPUs that runs one trial's gang and waits for it.

    Raises:
        RuntimeError: the run failed, for example because its loss was not finite.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    job, gang = Job(**values["job"]), Gang(**values["gang"])
    # where the driver of the search runs on another machine, its folder is made here too
    os.makedirs(values["scratch"], exist_ok=True)
    outcome = fit(job, gang, values["name"], values["scratch"], [TuneReportCallback()])
    if "error" in outcome:
        raise RuntimeError(outcome["error"])


class Ledger(tune.Callback):
    """Keeps the record of every trial up to date, in memory and in MLflow."""

    def __init__(self, proposals: Proposals, show: Any) -> None:
        self.proposals = proposals
        self.show = show

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as for Proposals

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.proposals.trials[trial.trial_id]
        record.status, record.started = "running", time.monotonic()
        self.show(record)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        record = self.proposals.trials[trial.trial_id]
        record.step = int(result["step"])
        figures = {name: result[name] for name in ("bound", "bits_per_byte", "reconstruction", "kl", "active_units")}
        if not record.figures or figures[METRIC] < record.figures[METRIC]:
            record.figures = figures
        self.show(record)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.proposals.trials[trial.trial_id]
        finished = read_outcome(record.place) is not None
        reason = None if finished else f"stopped early at step {record.step}: others were better there, or time was up"
        self._end(record, "finished" if finished else "stopped", "FINISHED" if finished else "KILLED", reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.proposals.trials[trial.trial_id]
        outcome = read_outcome(record.place) or {}
        self._end(record, "failed", "FAILED", outcome.get("error") or _last_line(trial.error_file))

    def close(self) -> None:
        """End what the search has left unended: it was interrupted."""
        for record in self.proposals.trials.values():
            if record.status in ("waiting", "running"):
                self._end(record, "stopped", "KILLED", f"the search was interrupted at step {record.step}")

    def _end(self, record: Trial, status: str, mlflow_status: Any, reason: str | None) -> None:
        record.status = status
        record.seconds = time.monotonic() - record.started
        record.run.finish(mlflow_status, reason)
        self.show(record)


def _last_line(error_file: str | None) -> str:
    try:
        lines = Path(error_file or "").read_text().strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "the trial ended with an error that Ray did not keep"


def run_search(search: Search, show: Any) -> list[Trial]:
    """Run all trials; returns their records. ``show(trial)`` is called whenever one has changed."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own banner; `show` is what the user sees
    scratch = tempfile.mkdtemp(prefix="raytrain-tune-")
    proposals = Proposals(search, scratch)
    ledger = Ledger(proposals, show)
    tuner = tune.Tuner(
        # the driver takes no CPU from the workers; on the head it outlives every worker node
        tune.with_resources(run_trial, {"CPU": 0, "node:__internal_head__": 0.001}),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            search_alg=proposals,
            scheduler=make_scheduler(search.config),
            num_samples=search.num_samples,
            max_concurrent_trials=search.concurrent,
            time_budget_s=search.time_budget,
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name=search.name,
            storage_path=scratch,
            callbacks=[ledger],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    try:
        tuner.fit()
    finally:
        ledger.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return list(proposals.trials.values())


def make_scheduler(config: RunConfig[Any]) -> AsyncHyperBandScheduler:
    """ASHA with rungs at an eighth, a quarter and half of the steps.

    A trial enters it when its own annealing has ended, so that none is stopped before; and leaves it
    at the last step, so that none is killed while it writes its outcome.
    """
    return AsyncHyperBandScheduler(
        time_attr=RUNG,
        grace_period=max(1, config.steps // 8),
        max_t=config.steps,
        reduction_factor=REDUCTION,
        stop_last_trials=False,
    )
