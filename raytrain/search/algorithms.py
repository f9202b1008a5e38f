"""Algorithms of a search: Optuna samplers, which draw its points, and Tune schedulers, which stop its trials."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from raytrain.metrics import RUNG, Objective, SearchObjective
from raytrain.runs.trials import Trial
from raytrain.search.plan import Plan
from raytrain.search.space import GRID, PBT, Space
from raytrain.utils.errors import UserError

# ------------------------------------------------------------------------------------------- samplers

MOST_RANDOM, FEWEST_RANDOM = 10, 4
"""Bounds on the random trials before TPE or a Gaussian process starts: a third of all trials, within these bounds.
Optuna's default of ten would use up a whole short search."""


def tpe(plan: Plan, seed: int) -> BaseSampler:
    """Return Optuna's TPE sampler, configured for a short search with parallel trials."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # about ``group``
        return TPESampler(
            seed=seed,
            n_startup_trials=num_random(plan),
            # find parameters that only work together, and in a conditional space model the parameters of a branch
            # jointly instead of one by one
            multivariate=True,
            group=True,
            # by default a running trial counts as poor, so that parallel trials spread out
        )


def gp(plan: Plan, seed: int) -> BaseSampler:
    """Return Optuna's Gaussian process sampler. It draws parameters that only some trials have at random."""
    return GPSampler(seed=seed, n_startup_trials=num_random(plan), warn_independent_sampling=False)


def num_random(plan: Plan) -> int:
    """Return the number of random trials before a sampler starts to learn from results."""
    return min(MOST_RANDOM, max(FEWEST_RANDOM, plan.num_samples // 3))


SAMPLERS: dict[str, Callable[[Plan, int], BaseSampler]] = {
    "tpe": tpe,
    "gp": gp,
    "random": lambda plan, seed: RandomSampler(seed=seed),
}
"""The sampler of each algorithm that ``--algorithm`` and a space's ``ALGORITHM`` may name, besides ``grid``.

To add one from outside the package, set ``SAMPLERS["name"] = function`` in the driver. The function takes the plan of
the search and the seed of its draws.
"""


def learns(algorithm: str) -> bool:
    """Return whether an algorithm uses the results of trials to draw; a plugin's is assumed to."""
    return algorithm not in (GRID, PBT, "random")


def make_study(plan: Plan, num_known: int) -> optuna.Study:
    """Return the Optuna study of a search. A resumed search uses a new seed, so that it repeats no draws.

    Raises:
        UserError: there is no such algorithm.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # the searcher enqueues the points of a grid, so its sampler draws nothing; a population starts at random
    name = "random" if plan.algorithm in (GRID, PBT) else _known("algorithm", plan.algorithm, SAMPLERS)
    sampler = SAMPLERS[name](plan, plan.seed + num_known)
    return optuna.create_study(sampler=sampler, directions=plan.search_objective.directions)


def optuna_result(trial: Trial, search_objective: SearchObjective) -> tuple[TrialState, list[float] | None]:
    """Return the state and the values with which to report an ended trial to Optuna.

    A trial that diverged before its first evaluation is pruned, which Optuna ranks below any value. A failed trial
    says nothing about its point.
    """
    if trial.status != "failed" and math.isfinite(trial.best.get(search_objective.metric, math.nan)):
        return TrialState.COMPLETE, search_objective.values(trial.best)
    # Optuna does not prune trials with two objectives
    if trial.status == "early_stopped" and search_objective.objective != "pareto":
        return TrialState.PRUNED, None
    return TrialState.FAIL, None


def set_constraints(point: optuna.Trial, trial: Trial, search_objective: SearchObjective) -> None:
    """Tell Optuna by how much an ended trial misses each constraint."""
    for name, value in search_objective.constraints(trial.best).items():
        point.set_constraint(name, value)


def optuna_trial(trial: Trial, search_objective: SearchObjective) -> FrozenTrial:
    """Convert one of our trials to an Optuna trial: its point and, once it has ended, its result.

    Raises:
        UserError: its record holds a point that Optuna cannot have drawn.
    """
    state, values = TrialState.WAITING if trial.status == "waiting" else TrialState.RUNNING, None
    if trial.ended:
        state, values = optuna_result(trial, search_objective)
    try:
        steps = {entry["step"]: search_objective.score(entry) for entry in trial.history}
        return optuna.trial.create_trial(
            state=state,
            params=trial.params,
            distributions={
                name: optuna.distributions.json_to_distribution(text) for name, text in trial.distributions.items()
            },
            values=values,
            # Optuna accepts no intermediate values with two objectives
            intermediate_values=steps if len(search_objective.directions) == 1 else None,
            constraints=search_objective.constraints(trial.best) if trial.ended else None,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the record of trial {trial.name} has no point of a search: {error}") from None


def add_to_study(study: optuna.Study, trial: Trial, search_objective: SearchObjective) -> None:
    """Add a trial that ended before the search was resumed, unless it is not a point of the space.

    Raises:
        UserError: its record holds a point that Optuna cannot have drawn.
    """
    if trial.on_the_space:
        study.add_trial(optuna_trial(trial, search_objective))


# ----------------------------------------------------------------------------------------- schedulers

REDUCTION = 2
"""Half of the trials that reach a rung continue from it."""
SCORE = "score"


@runtime_checkable
class Recalls(Protocol):
    """A scheduler that takes earlier trials into account when a search is resumed."""

    def recall(self, trial_id: str, history: list[dict[str, Any]]) -> None:
        """Take note of the evaluations that a trial reported before the search was resumed."""


class Halving(AsyncHyperBandScheduler):
    """ASHA with rungs at 1/8, 1/4 and 1/2 of the steps, which takes earlier trials into account.

    A trial enters it only once its own annealing has ended, so that no trial is stopped earlier. It leaves at the last
    step, so that no trial is killed while it writes its outcome. ASHA compares the score of the search objective.
    """

    def __init__(self, steps: int, search_objective: SearchObjective) -> None:
        super().__init__(
            time_attr=RUNG,
            metric=SCORE,
            mode="min",
            grace_period=max(1, steps // 8),
            max_t=steps,
            reduction_factor=REDUCTION,
            stop_last_trials=False,
        )
        self.search_objective = search_objective

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Ignore Tune's own metric, the negative ELBO: this class computes the score itself."""
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return the decision of the scheduler: whether the trial continues."""
        return super().on_trial_result(tune_controller, trial, {**result, SCORE: self.search_objective.score(result)})

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Take note of the last result, like any other."""
        super().on_trial_complete(tune_controller, trial, {**result, SCORE: self.search_objective.score(result)})

    def recall(self, trial_id: str, history: list[dict[str, Any]]) -> None:
        """Take note of the evaluations that a trial reported before the search was resumed."""
        for entry in history:
            if RUNG in entry:
                self._brackets[0].on_result(
                    SimpleNamespace(trial_id=trial_id), entry[RUNG], -self.search_objective.score(entry)
                )


def asha(plan: Plan) -> TrialScheduler:
    """Return ASHA over the steps of the longest trial."""
    return Halving(max(config.steps for config in plan.bases.values()), plan.search_objective)


SCHEDULERS: dict[str, Callable[[Plan], TrialScheduler]] = {"asha": asha, "none": lambda plan: FIFOScheduler()}
"""The schedulers that ``--scheduler`` may name; ``none`` runs every trial to its last step.

To add one from outside the package, set ``SCHEDULERS["name"] = function`` in the driver. Trials report
``training_iteration``, ``step``, every evaluation metric and, while they may be stopped, ``raytrain.metrics.RUNG``. A
scheduler with a method ``recall`` also receives the evaluations of earlier trials: see ``Recalls``.
"""


def make_scheduler(plan: Plan) -> TrialScheduler:
    """Return the scheduler of a search.

    Raises:
        UserError: there is no such scheduler.
    """
    return SCHEDULERS[_known("scheduler", plan.scheduler, SCHEDULERS)](plan)


# ---------------------------------------------------------------------------------------------- names


def resolve_algorithm(option: str | None, space: Space) -> str:
    """Return the algorithm that ``--algorithm`` names, or else the one of the space.

    Raises:
        UserError: there is no such algorithm.
    """
    known = (*SAMPLERS, GRID, PBT)
    if option is None and space.algorithm not in known:
        raise UserError(
            f"search space {space.name}: ALGORITHM has {space.algorithm!r}: must be one of {', '.join(known)}"
        )
    return _known("algorithm", space.algorithm if option is None else option, known)


def resolve_scheduler(option: str | None, algorithm: str, objective: Objective) -> str:
    """Return the scheduler that ``--scheduler`` names, or else the default: ASHA, or none if no trial may be stopped.

    A grid runs in full, because its points are to be compared. In a search for a Pareto front, a trial that is behind
    in one of the two metrics may be ahead in the other. In a population, the worst members are replaced, not stopped.

    Raises:
        UserError: there is no such scheduler, or the search cannot use one.
    """
    if algorithm == PBT and option not in (None, "none"):
        raise UserError(f"--scheduler {option}: --algorithm {PBT} replaces the worst trials itself; leave it out")
    default = "none" if algorithm in (GRID, PBT) or objective == "pareto" else "asha"
    return _known("scheduler", default if option is None else option, SCHEDULERS)


def check_algorithms(plan: Plan) -> None:
    """Make sure that the algorithm and the scheduler of a recorded plan are registered in this process.

    Raises:
        UserError: one of them is not.
    """
    _known("algorithm", plan.algorithm, (*SAMPLERS, GRID, PBT))
    _known("scheduler", plan.scheduler, SCHEDULERS)


def _known(option: str, name: str, known: Collection[str]) -> str:
    if name not in known:
        raise UserError(f"--{option} is {name!r}: must be one of {', '.join(known)}")
    return name
