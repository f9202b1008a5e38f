"""Progress of a search: estimates the time left from its trials so far, and shows it on the terminal and in MLflow."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from raytrain.analysis.tables import trial_counts
from raytrain.metrics import METRIC
from raytrain.runs.repeats import searched
from raytrain.runs.trials import Trial, rank
from raytrain.search.plan import Plan

if TYPE_CHECKING:
    from raytrain.search.searcher import OptunaSearcher
    from raytrain.tracking.outbox import Outbox

DESCRIBE_EVERY_S = 30.0
"""Shortest time between two updates of the MLflow description while a search runs."""


# ----------------------------------------------------------------------------------------- time left


class Pace:
    """Seconds per step of a trial, including evaluations and the start of its process.

    Only training since the search was begun or resumed counts, since a resumed search may run with other workers.
    """

    def __init__(self, known: Iterable[Trial]) -> None:
        """Take the trials that a resumed search already has."""
        self._trials: dict[str, Trial] = {}
        self._from: dict[str, tuple[int, float]] = {}
        """Step and seconds from which each trial is measured."""
        self._resumed = {trial.identity for trial in known}
        for trial in known:
            self._begin(trial)

    def hear(self, trial: Trial) -> None:
        """Take note of a trial that has changed."""
        identity = trial.identity
        if identity not in self._trials:
            self._begin(trial)
        elif identity in self._resumed and trial.step > self._from[identity][0]:
            # its first report may be about earlier steps: a driver can die before it receives an evaluation
            self._resumed.remove(identity)
            self._begin(trial)

    @property
    def step_seconds(self) -> float | None:
        """Seconds per step of a trial; ``None`` before a step has been measured."""
        steps, seconds = 0, 0.0
        for identity, (step, before) in self._from.items():
            if identity not in self._resumed:
                steps += self._trials[identity].step - step
                seconds += self._trials[identity].seconds - before
        return seconds / steps if steps > 0 else None

    def _begin(self, trial: Trial) -> None:
        self._trials[trial.identity], self._from[trial.identity] = trial, (trial.step, trial.seconds)


def steps_left(plan: Plan, trials: Sequence[Trial], repeats: Sequence[Trial] | None) -> list[list[float]]:
    """Return the steps that each trial still needs: first for the search's own trials, then for those that confirm.

    Trials that have begun count up to their last step. Trials still to be drawn are scaled by the average share of
    their steps that ended trials needed, since the scheduler stops some.

    Args:
        repeats: the trials that confirm; ``None`` before they are known.
    """
    own = searched(trials)
    ended = [trial.step / trial.last_step for trial in own if trial.ended and trial.status != "failed"]
    share = statistics.fmean(ended) if ended else 1.0
    configs = [trial.config for trial in own] or list(plan.bases.values())
    steps = statistics.fmean(config.steps for config in configs)  # a space may vary them
    first = [float(trial.last_step - trial.step) for trial in own if not trial.ended]
    first += [share * steps / max(1, plan.parts)] * (plan.num_samples - len(own))
    if repeats is not None:
        second = [float(trial.config.steps - trial.step) for trial in repeats if not trial.ended]
    elif plan.confirm is not None:
        second = [float(plan.confirm.steps or steps)] * plan.confirm.num_trials
    else:
        second = []
    return [first, second]


def seconds_left(
    step_seconds: float | None, phases: Sequence[Sequence[float]], concurrent: Sequence[int]
) -> float | None:
    """Return the seconds until the last trial has ended; ``None`` before anything has been measured.

    Args:
        step_seconds: seconds per step of a trial.
        phases: result of ``steps_left``; a phase starts when the previous one has ended.
        concurrent: concurrent trials in each phase.
    """
    if step_seconds is None:
        return None
    # as long as they all take, shared, but no shorter than the longest of them
    return step_seconds * sum(
        max(sum(steps) / together, *steps) for steps, together in zip(phases, concurrent, strict=True) if steps
    )


def time_left(seconds: float) -> str:
    """Return a time as text, no more precisely than it is known."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 60:
        return "less than a minute left"
    if minutes < 100:
        return f"about {minutes} minutes left" if minutes > 1 else "about a minute left"
    return f"about {hours:.0f} hours left" if hours < 48 else f"about {hours / 24:.0f} days left"


# ------------------------------------------------------------------------------------------ telling


class SearchProgress:
    """Reports a search's progress to the terminal and MLflow whenever one of its trials has changed."""

    def __init__(
        self, searcher: OptunaSearcher, show: Callable[[Trial, Callable[[], str]], Any], outbox: Outbox
    ) -> None:
        """Take the searcher, the function that shows a trial on the terminal, and the outbox for MLflow."""
        self.searcher = searcher
        self.show = show
        self.outbox = outbox
        self.pace = Pace(searcher.trials)
        budget = searcher.search.time_budget
        self._deadline = math.inf if budget is None else time.monotonic() + budget
        self._describe_at = -math.inf

    def hear(self, trial: Trial) -> None:
        """Report a trial that has changed; MLflow gets the report now or with a later trial."""
        self.pace.hear(trial)
        outlook = self.outlook()
        self.show(trial, outlook)
        if (now := time.monotonic()) >= self._describe_at:
            self._describe_at = now + DESCRIBE_EVERY_S
            self._describe(outlook())

    def close(self) -> None:
        """Report the progress at the end of the search to MLflow, unless none of its trials has changed."""
        if self._describe_at > -math.inf:
            self._describe(self._standing())

    def outlook(self) -> Callable[[], str]:
        """Return a function that describes the best trial (compared with counting n-grams), the cost and the time left.

        The time left decreases from call to call, until the next trial changes.
        """
        search, standing, at = self.searcher.search, self._standing(), time.monotonic()
        phases = steps_left(search.plan, self.searcher.trials, self.searcher.repeats)
        together = [min(search.concurrent, search.plan.members), search.concurrent]
        left = seconds_left(self.pace.step_seconds, phases, together)

        def text() -> str:
            now = time.monotonic()
            if not left or left - (now - at) <= self._deadline - now:
                said = time_left(max(0.0, left - (now - at))) if left else ""
            else:
                said = f"{time_left(max(0.0, self._deadline - now))} of --time-budget"
            return "; ".join(filter(None, (standing, said)))

        return text

    def _standing(self) -> str:
        """Return the best trial so far, compared with counting n-grams, and the cost so far, as text."""
        search, parts = self.searcher.search, []
        own, search_objective = searched(self.searcher.trials), search.plan.search_objective
        best = rank([trial for trial in own if trial.best], search_objective)[:1]
        for trial in best:
            short = "" if search_objective.may_win(trial.best) else " (none may win yet)"
            comparison = self.searcher.ladder(trial.config).comparison(trial.best[METRIC])
            parts.append(f"best trial {trial.name}{short}: {comparison}")
        if search.price is not None:
            seconds = sum(trial.seconds for trial in self.searcher.trials)
            parts.append(f"cost so far {search.price * search.worker_spec.workers * seconds / 3600:,.2f}")
        return "; ".join(parts)

    def _describe(self, outlook: str) -> None:
        plan = self.searcher.search.plan
        repeats = self.searcher.repeats
        num_repeats = 0 if plan.confirm is None else plan.confirm.num_trials if repeats is None else len(repeats)
        shown = [*searched(self.searcher.trials), *(repeats or ())]
        parts = filter(None, (trial_counts(shown, plan.num_samples + num_repeats), outlook))
        at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        self.outbox.describe(self.searcher.search.parent.run_id, f"At {at}: {'; '.join(parts)}.")
