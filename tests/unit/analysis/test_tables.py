"""The live table of a search: what fits a terminal, however many trials there are."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from raytrain.analysis.tables import BEST_ROWS, FEWEST_RUNNING, LiveTable
from raytrain.metrics import METRIC, SearchObjective
from raytrain.runs.trials import Trial
from tests.unit.runs.test_trials import a_trial, reached


def rendered(trials: list[Trial], height: int) -> str:
    """What the live table of a search of 1,000 trials shows on a terminal of that height."""
    table = LiveTable(1000, SearchObjective("bound"))
    table.outlook = lambda: "best trial 007: a bit; about 3 minutes left"
    table.console = Console(file=StringIO(), width=120, height=height)
    for trial in trials:
        table.trials[trial.number] = trial
    console = Console(record=True, width=120, file=StringIO())
    console.print(table.renderable())
    return console.export_text()


def rows(text: str) -> list[str]:
    return re.findall(r"^│ (\d+)", text, re.MULTILINE)


@pytest.mark.parametrize("height", [10, 40])
def test_it_shows_running_trials_then_the_best_and_counts_all(height: int) -> None:
    trials = [a_trial(number, status="finished", best=reached(1 + (number * 37 % 101))) for number in range(101)]
    trials += [a_trial(number, status="stopped") for number in range(101, 121)]
    trials += [a_trial(number, status="running", best=reached(0.5)) for number in range(121, 151)]
    text = rendered(trials, height)
    room = max(FEWEST_RUNNING, height - 17)
    best = sorted(trials[:101], key=lambda trial: trial.best[METRIC])[:BEST_ROWS]
    assert rows(text) == [trial.name for trial in (*trials[121 : 121 + room], *best)]
    title = " ".join(text[: text.index("┏")].split())
    assert title == (
        f"121 of 1000 trials ended (101 finished, 20 stopped, 30 running); {room} running ones; the best others below "
        "best trial 007: a bit; about 3 minutes left"
    )


def test_it_can_be_shown_before_any_trial_and_where_all_run() -> None:
    assert "0 of 1000 trials ended (none begun)" in rendered([], 24)
    text = rendered([a_trial(number, status="running") for number in range(2)], 24)
    assert rows(text) == ["000", "001"]
    assert "running ones" not in text


def test_without_a_terminal_it_says_how_far_the_search_is_when_a_trial_has_ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise once a minute, and nothing of a search that has nothing to say yet."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    table = LiveTable(3, SearchObjective("bound"))
    told = ((0, "running", 0), (0, "running", 1), (1, "running", 1), (0, "finished", 1), (2, "running", 61))
    table.show(a_trial(0, status="running"), str)
    for number, status, seconds in told:
        now[0] = 1000.0 + seconds
        table.show(a_trial(number, status=status), lambda: "a minute left")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("trial ")] == [
        "0 of 3 trials ended (1 running); a minute left",
        "1 of 3 trials ended (1 finished, 1 running); a minute left",
        "1 of 3 trials ended (1 finished, 2 running); a minute left",
    ]
    assert len(lines) == 6 + 3
