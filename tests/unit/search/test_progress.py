"""How far a search is: the time left by what was measured, the best so far beside counting, and the cost so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytrain.data.corpus import Corpus
from raytrain.models.ladder import validation_ladder
from raytrain.runs.repeats import Confirm
from raytrain.runs.trials import Trial
from raytrain.search import progress
from raytrain.search.plan import Plan
from raytrain.search.progress import Pace, SearchProgress, seconds_left, steps_left, time_left
from raytrain.search.recorder import TrialRecorder
from tests.conftest import tiny_config
from tests.unit.runs.test_trials import a_trial
from tests.unit.search.test_search_objective import a_plan, figures, searcher


def of_100_steps(number: int, **changes: Any) -> Trial:
    return replace(a_trial(number), **{"config": tiny_config("hybrid", steps=100), **changes})


# ----------------------------------------------------------------------------------------- time left


def test_the_pace_is_that_of_all_trials_together() -> None:
    pace, first, second = Pace([]), of_100_steps(0), of_100_steps(1)
    for trial in (first, second):
        pace.hear(trial)
    assert pace.step_seconds is None
    first.seconds = 5.0  # it starts, and has not been evaluated yet
    pace.hear(first)
    assert pace.step_seconds is None
    first.step, first.seconds = 10, 20.0
    second.step, second.seconds = 30, 40.0
    for trial in (first, second):
        pace.hear(trial)
    assert pace.step_seconds == pytest.approx(60 / 40)


def test_a_resumed_search_measures_only_itself() -> None:
    """Neither what was trained before, nor an evaluation of before that its driver had not heard of."""
    ended = of_100_steps(0, step=100, seconds=1.0, status="finished")
    going_on = of_100_steps(1, step=20, seconds=1000.0, status="interrupted")
    pace = Pace([ended, going_on])
    going_on.seconds += 1.0
    pace.hear(going_on)
    assert pace.step_seconds is None
    going_on.step, going_on.seconds = 40, 1003.0  # read from its checkpoint
    pace.hear(going_on)
    assert pace.step_seconds is None
    going_on.step, going_on.seconds = 50, 1023.0
    pace.hear(going_on)
    assert pace.step_seconds == pytest.approx(2.0)


def a_search(**changes: Any) -> Plan:
    return a_plan(bases={"hybrid": tiny_config("hybrid", steps=100)}, **changes)


CONFIRM = Confirm(configs=2, seeds=3, first_seed=1000)
STOPPED = [of_100_steps(0, step=100, status="finished"), of_100_steps(1, step=50, status="stopped")]


@pytest.mark.parametrize(
    ("plan", "trials", "repeats", "steps"),
    [
        # nothing has ended: all trials go to their last step
        (a_search(num_samples=3), [], None, [[100.0] * 3, []]),
        (a_search(num_samples=3), [of_100_steps(0, step=30, status="running")], None, [[70.0, 100.0, 100.0], []]),
        # those that have ended took three quarters of their steps; one that has begun is counted to its end
        (
            a_search(num_samples=5),
            [*STOPPED, of_100_steps(2, step=10, status="interrupted")],
            None,
            [[90.0, 75.0, 75.0], []],
        ),
        # a refused point says nothing of how long others take
        (a_search(num_samples=3), [*STOPPED[:1], of_100_steps(1, status="failed")], None, [[100.0], []]),
        # none of those that confirm is stopped, and a space may vary the steps
        (
            a_search(num_samples=2, confirm=CONFIRM),
            [of_100_steps(0, config=tiny_config("hybrid", steps=300), step=150, status="stopped"), STOPPED[1]],
            None,
            [[], [200.0] * 6],
        ),
        (a_search(num_samples=2, confirm=replace(CONFIRM, steps=70)), STOPPED, None, [[], [70.0] * 6]),
        (
            a_search(num_samples=2, confirm=CONFIRM),
            STOPPED,
            [of_100_steps(2, confirms=0, step=100, status="finished"), of_100_steps(3, confirms=0, step=60)],
            [[], [40.0]],
        ),
        # a repeat that is no longer wanted is none of them
        (a_search(num_samples=2, confirm=CONFIRM), [*STOPPED, of_100_steps(2, confirms=1)], [], [[], []]),
    ],
)
def test_the_steps_that_remain(
    plan: Plan, trials: list[Trial], repeats: list[Trial] | None, steps: list[list[float]]
) -> None:
    assert steps_left(plan, trials, repeats) == steps


@pytest.mark.parametrize(
    ("step_seconds", "phases", "concurrent", "seconds"),
    [
        (None, [[100.0], []], 2, None),
        (0.5, [[], []], 2, 0.0),
        (0.5, [[100.0, 100.0, 40.0], []], 2, 60.0),
        (0.5, [[100.0, 10.0], []], 4, 50.0),  # it cannot end before its longest trial
        (0.5, [[100.0, 100.0], [80.0, 80.0, 80.0]], 2, 50.0 + 60.0),
    ],
)
def test_the_time_that_remains(
    step_seconds: float | None, phases: list[list[float]], concurrent: int, seconds: float | None
) -> None:
    assert seconds_left(step_seconds, phases, [concurrent] * len(phases)) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "less than a minute left"),
        (59.9, "less than a minute left"),
        (61.0, "about a minute left"),
        (715.0, "about 12 minutes left"),
        (95 * 60.0, "about 95 minutes left"),
        (100 * 60.0, "about 2 hours left"),
        (47.4 * 3600, "about 47 hours left"),
        (75 * 3600.0, "about 3 days left"),
    ],
)
def test_time_is_said_no_more_exactly_than_it_is_known(seconds: float, text: str) -> None:
    assert time_left(seconds) == text


# ------------------------------------------------------------------------------------------ telling


class Hearer:
    """Hears what is said on the terminal, as an outlook, and to MLflow, instead of an outbox."""

    def __init__(self) -> None:
        self.outlooks: list[Callable[[], str]] = []
        self.descriptions: list[str] = []

    def show(self, trial: Trial, outlook: Callable[[], str]) -> None:
        self.outlooks.append(outlook)

    def describe(self, run_id: str, markdown: str) -> None:
        assert run_id == "parent"
        self.descriptions.append(markdown.partition("UTC: ")[2])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that a test moves."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    return clock


def test_a_search_says_how_far_it_is(corpus: Corpus, tmp_path: Path, clock: SimpleNamespace) -> None:
    found = searcher(a_search(num_samples=3), corpus, tmp_path)
    found.search = replace(found.search, price=36.0)
    hearer: Any = Hearer()
    told = SearchProgress(found, hearer.show, hearer)
    recorder = TrialRecorder(found, told.hear, hearer)
    told.close()
    assert hearer.descriptions == [], "what is said of a search that has ended stays where none of its trials runs"
    trial = SimpleNamespace(trial_id="0")
    assert isinstance(found.suggest("0"), dict)
    recorder.on_trial_start(0, [], trial)
    assert hearer.outlooks[-1]() == "cost so far 0.00"
    assert hearer.descriptions == ["0 of 3 trials ended (1 running); cost so far 0.00."]

    clock.now += 20
    recorder.on_trial_result(0, [], trial, {"step": 10, **figures(2.0)})
    ladder = validation_ladder(corpus, found.trials[0].config).comparison(2.0)
    assert ladder.startswith("model 2.000, byte ")
    # two seconds a step: 90 steps of the first trial and 200 of the others, one after the other
    outlook = hearer.outlooks[-1]
    assert outlook() == f"best trial 000: {ladder}; cost so far 0.20; about 10 minutes left"
    assert len(hearer.descriptions) == 1, "MLflow hears of it every half a minute"
    clock.now += 400
    assert outlook() == f"best trial 000: {ladder}; cost so far 0.20; about 3 minutes left"
    recorder.on_trial_result(0, [], trial, {"step": 60, **figures(1.5)})
    assert hearer.descriptions[-1].startswith("0 of 3 trials ended (1 running); best trial 000: model 1.500, byte ")
    assert hearer.descriptions[-1].endswith("; cost so far 4.20; about 28 minutes left.")
    told.close()
    assert hearer.descriptions[-1].endswith("; cost so far 4.20.")


def test_it_says_when_the_time_budget_ends_first(corpus: Corpus, tmp_path: Path, clock: SimpleNamespace) -> None:
    found = searcher(a_search(num_samples=3, min_used=2.0), corpus, tmp_path)
    found.search = replace(found.search, time_budget=300.0)
    hearer: Any = Hearer()
    recorder = TrialRecorder(found, SearchProgress(found, hearer.show, hearer).hear, hearer)
    assert isinstance(found.suggest("0"), dict)
    recorder.on_trial_start(0, [], SimpleNamespace(trial_id="0"))
    clock.now += 20
    recorder.on_trial_result(0, [], SimpleNamespace(trial_id="0"), {"step": 10, **figures(2.0, 0.5)})
    assert hearer.outlooks[-1]().endswith("; about 5 minutes left of --time-budget")
    clock.now += 250
    assert hearer.outlooks[-1]().endswith("; less than a minute left of --time-budget")
    assert hearer.outlooks[-1]().startswith("best trial 000 (none may win yet): model 2.000")


def test_those_that_confirm_are_counted_once_they_are_known(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DESCRIBE_EVERY_S", 0.0)
    found = searcher(a_search(num_samples=1, confirm=CONFIRM), corpus, tmp_path)
    hearer: Any = Hearer()
    told = SearchProgress(found, hearer.show, hearer)
    assert isinstance(found.suggest("0"), dict)
    told.hear(found.trials[0])
    assert hearer.descriptions[-1] == "0 of 7 trials ended (1 waiting)."
    found.trials[0].best, found.trials[0].status = figures(2.0), "finished"
    assert found.begin_confirmation() == 3  # one config, three seeds
    told.hear(found.trials[1])
    assert hearer.descriptions[-1].startswith("1 of 4 trials ended (1 finished, 3 waiting); best trial 000")
