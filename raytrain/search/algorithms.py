"""What decides which points a search tries and which of its trials go on: Optuna's samplers and ASHA, set up."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import optuna
from ray.tune.schedulers import AsyncHyperBandScheduler

from raytrain.metrics import RUNG, SearchObjective
from raytrain.search.plan import Plan

if TYPE_CHECKING:
    import optuna

REDUCTION = 2
"""Half of the trials that reach a rung go on from it."""
SCORE = "score"
MOST_RANDOM, FEWEST_RANDOM = 10, 4
"""Random trials before TPE begins: a third of all within these bounds; Optuna's ten would be all of a short search."""


class Halving(AsyncHyperBandScheduler):
    """ASHA with rungs at an eighth, a quarter and half of the steps, which can be told of earlier trials.

    A trial enters it when its own annealing has ended, so that none is stopped before; and leaves it
    at the last step, so that none is killed while it writes its outcome. It compares what the search looks for.
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
        """Tune's own metric is the bound; the score is made of it here."""
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        return super().on_trial_result(tune_controller, trial, {**result, SCORE: self.search_objective.score(result)})

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Take note of the last result, as of any other."""
        super().on_trial_complete(tune_controller, trial, {**result, SCORE: self.search_objective.score(result)})

    def recall(self, trial_id: str, history: list[dict[str, Any]]) -> None:
        """Take note of what a trial has reported before the search was resumed."""
        for entry in history:
            if RUNG in entry:
                self._brackets[0].on_result(
                    SimpleNamespace(trial_id=trial_id), entry[RUNG], -self.search_objective.score(entry)
                )


def make_study(plan: Plan, num_known: int) -> optuna.Study:
    """The memory of the search's algorithm; a resumed search draws on from another place of the same seed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = plan.seed + num_known
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    if plan.algorithm == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of ``group``
            sampler = optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=min(MOST_RANDOM, max(FEWEST_RANDOM, plan.num_samples // 3)),
                # settings that only work together are found together, and in a conditional space those of a branch
                # are modelled among themselves instead of one by one
                multivariate=True,
                group=True,
                # several trials are drawn before the first has ended: a running one counts as poor, so that the next
                # is drawn elsewhere and not at the same point
                constant_liar=True,
            )
    return optuna.create_study(sampler=sampler, directions=plan.search_objective.directions)
