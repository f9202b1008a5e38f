"""A search: Ray Tune draws configs from a space, runs each as a gang of workers, and stops the poor ones early."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raytrain.algorithms import Halving, make_study
from raytrain.config import RunConfig, flatten, identity, to_dict
from raytrain.goal import METRIC
from raytrain.hopeless import unigram_bits
from raytrain.ledger import Ledger, TimeBudget
from raytrain.plan import Plan
from raytrain.reference import note_run
from raytrain.resources import Gang
from raytrain.session import Session, open_storage_root
from raytrain.space import grid
from raytrain.start import express
from raytrain.trainables import run_alone, run_gang
from raytrain.trials import Records, Trial
from raytrain.workers import RETRIES, Job

if TYPE_CHECKING:
    import optuna

    from raytrain.storage import Storage
    from raytrain.tracking import Experiment, Run


@dataclass(frozen=True)
class Search:
    """What is searched, and within what means."""

    name: str
    plan: Plan
    session: Session
    experiment: Experiment
    parent: Run
    gang: Gang
    concurrent: int
    time_budget: float | None

    @property
    def place(self) -> Storage:
        """Where all of the search is."""
        return self.session.storage.child(self.name)

    @property
    def resume_command(self) -> str:
        """The command that goes on with it."""
        root = self.session.storage.uri()
        storage = "" if root == open_storage_root(None).uri() else f" --storage {root}"
        return f"python -m raytrain.tune --resume {self.name}{storage}"


class Proposals(Searcher):
    """Draws the next point and makes everything that its trial needs.

    Runs in the driver, which so is the only one to create MLflow runs; workers get their addresses.
    """

    def __init__(self, search: Search, records: Records, known: list[Trial], scheduler: TrialScheduler) -> None:
        super().__init__(metric=METRIC, mode="min")
        self.search = search
        self.records = records
        self.scratch = ""
        self.study = make_study(search.plan, len(known))
        self.trials = list(known)
        """All of them, in the order of their numbers."""
        self.scheduler = scheduler
        self._points: dict[str, optuna.Trial] = {}
        """Optuna's trial of one of ours, by identity; a config that is no point of the space has none."""
        self._unigram: dict[str, float] = {}
        self._by_tune: dict[str, Trial] = {}
        self._again = [trial for trial in known if not trial.ended]
        self._grid = grid(search.plan.space, search.plan.budget) if search.plan.algorithm == "grid" else None
        self._drawn: dict[str, int] = {}
        for trial in known:
            self._repeat(identity(trial.config, search.plan.corpus))
            if trial.ended:
                trial.known_to(self.study, search.plan.goal)
                self._recall(f"known-{trial.name}", trial)

    def trial(self, trial_id: str) -> Trial:
        """Our trial of one of Tune's ids."""
        return self._by_tune[trial_id]

    def place(self, trial: Trial) -> Storage:
        """Where a trial keeps what it makes."""
        return self.records.place(trial.identity)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Tune's question for the next trial: the arguments of the trainable."""
        trial = self._resume(self._again.pop(0)) if self._again else self._draw()
        self._by_tune[trial_id] = trial
        self._recall(trial_id, trial)
        search, corpus = self.search, self.search.session.corpus
        place = self.place(trial)
        # before there is an MLflow run of it: a trial that is drawn is never drawn otherwise
        self.records.add(trial)
        run = search.experiment.open_run(
            trial.identity,
            f"{trial.name} {search.name}",
            parent=search.parent.run_id,
            config=to_dict(trial.config),
            parameters=flatten(trial.config),
            tags={
                "kind": "trial",
                "corpus": corpus.digest,
                "seed": str(trial.config.seed),
                "trial": str(trial.number),
                "place": place.uri(),
            }
            | ({"started_from": trial.origin} if trial.origin else {}),
        )
        trial.run = run.address()
        search.session.log_corpus(run)
        note_run(place, run)
        job = Job(
            to_dict(trial.config),
            search.session.corpus_address(),
            place.uri(),
            asdict(run),
            search.gang.cpus,
            draws=search.plan.goal.draws,
            unigram=self._hopeless_above(trial.config.sampling),
        )
        return {"job": asdict(job), "gang": asdict(search.gang), "name": search.name, "scratch": self.scratch}

    def _hopeless_above(self, sampling: str) -> float:
        """Bits per byte that every trial must beat in time."""
        if sampling not in self._unigram:
            self._unigram[sampling] = unigram_bits(self.search.session.corpus, sampling)
        return self._unigram[sampling]

    def _draw(self) -> Trial:
        """A new trial: at a config to start from while there are any, then at the space's next point."""
        plan, number = self.search.plan, len(self.trials)
        if number < len(plan.starts):
            start = plan.starts[number]
            values = express(plan.space, plan.bases, plan.budget, start.config)
            return self._add(start.config, None if values is None else self._point(values)[0], start.reference)
        if self._grid is not None:
            point, config = self._point(self._grid[(number - len(plan.starts)) % len(self._grid)])
        else:
            point, config = self._point(None)
        return self._add(config, point)

    def _point(self, values: dict[str, Any] | None) -> tuple[optuna.Trial, RunConfig[Any]]:
        """Optuna's next trial, at these values where they are given, and its config."""
        plan = self.search.plan
        if values is not None:
            self.study.enqueue_trial(values)
        point = self.study.ask()
        return point, plan.space.resolve(plan.bases, point, plan.budget)

    def _add(self, config: RunConfig[Any], point: optuna.Trial | None, origin: str = "") -> Trial:
        import optuna

        plan = self.search.plan
        # the same point can be drawn again: its repeat index makes it a run of its own
        own = identity(config, plan.corpus, self._repeat(identity(config, plan.corpus)))
        before, after = flatten(plan.bases[config.model_name]), flatten(config)
        kinds = {} if point is None else point.distributions
        trial = Trial(
            len(self.trials),
            own,
            config,
            {} if point is None else dict(point.params),
            {name: optuna.distributions.distribution_to_json(kind) for name, kind in kinds.items()},
            {name: value for name, value in after.items() if value != before[name]},
            origin=origin,
        )
        self.trials.append(trial)
        if point is not None:
            self._points[own] = point
        return trial

    def _resume(self, trial: Trial) -> Trial:
        """A trial that had begun, at its own point."""
        if trial.on_the_space:
            self._points[trial.identity], _ = self._point(trial.params)
        return trial

    def _repeat(self, key: str) -> int:
        repeat = self._drawn.get(key, 0)
        self._drawn[key] = repeat + 1
        return repeat

    def _recall(self, trial_id: str, trial: Trial) -> None:
        if isinstance(self.scheduler, Halving):
            self.scheduler.recall(trial_id, trial.history)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tune passes an evaluation on, or says that a trial has ended without any."""
        if METRIC not in result:
            return
        point, goal = self._points.get(self._by_tune[trial_id].identity), self.search.plan.goal
        if point is not None and len(goal.directions) == 1:  # Optuna takes none where there are two
            point.report(goal.score(result), int(result["step"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing yet: how the trial ended is known to its record."""

    def ended(self, trial: Trial) -> None:
        """Tell Optuna what a trial has reached in the end."""
        point = self._points.get(trial.identity)
        if point is not None and trial.ended:
            state, values = trial.told(self.search.plan.goal)
            self.study.tell(point, values, state=state)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its settings for snapshots, which are not used

    def save(self, checkpoint_path: str) -> None:
        """Tune's own snapshots are not used: all that a search knows is in its trials' records."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is not restored from Tune's snapshots")


def keep_keys_from_ray() -> None:
    """Keep Tune from putting AWS keys into its trials' runtime environment, whose values Ray writes to its logs."""
    from ray.tune.execution import class_cache

    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(keys)


def run_search(search: Search, show: Any) -> list[Trial]:
    """Run all trials that have not ended; returns every trial. ``show(trial)`` is called whenever one has changed.

    Raises:
        KeyboardInterrupt: the user stopped it; trials under way are recorded as interrupted.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own banner; `show` is what the user sees
    # Tune's handler would end the search as if it had run to its end
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # a trial that ends before its first evaluation would end the whole search; and the score that ASHA compares is
    # made here, not by the trial
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # nothing is read from the files that Tune writes about a search, and a full disk under them would end it
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "inf"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    keep_keys_from_ray()
    steps = max(config.steps for config in search.plan.bases.values())
    scheduler = Halving(steps, search.plan.goal) if search.plan.early_stopping else FIFOScheduler()
    records = Records(search.place)
    known = records.read()
    proposals = Proposals(search, records, known, scheduler)
    ledger = Ledger(proposals, show)
    for trial in known:
        show(trial)
    num_left = search.plan.num_samples - sum(trial.ended for trial in known)
    scratch = proposals.scratch = tempfile.mkdtemp(prefix="raytrain-tune-")
    try:
        if num_left > 0:
            make_tuner(search, proposals, ledger, scheduler, num_left).fit()
    finally:
        ledger.close()
        records.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return proposals.trials


def make_tuner(
    search: Search, proposals: Proposals, ledger: Ledger, scheduler: TrialScheduler, num_left: int
) -> tune.Tuner:
    """Ray Tune, set to run what is left of the search."""
    alone = search.gang.workers == 1
    # the driver of a gang takes no CPU from its workers; on the head it outlives every worker node
    resources = search.gang.per_worker if alone else {"CPU": 0, "node:__internal_head__": 0.001}
    return tune.Tuner(
        tune.with_resources(run_alone if alone else run_gang, resources),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            search_alg=proposals,
            scheduler=scheduler,
            num_samples=num_left,
            max_concurrent_trials=search.concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=search.name,
            storage_path=proposals.scratch,
            callbacks=[ledger],
            stop=TimeBudget(ledger, search.time_budget) if search.time_budget is not None else None,
            verbose=0,
            # a gang is started again by its driver
            failure_config=tune.FailureConfig(max_failures=RETRIES if alone else 0),
        ),
    )
