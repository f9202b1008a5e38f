from __future__ import annotations

from typing import Any

import pytest

from raytrain.config import ObjectiveConfig, to_dict
from raytrain.search import Halving
from raytrain.workers import RUNG, Job, RayReport
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    ("objective", "comparable"),
    [
        (ObjectiveConfig(annealing="linear", start=0.0, end=0.5), [50, 75]),
        (ObjectiveConfig(annealing="cyclical", start=0.0, end=0.3), [50, 75]),
        (ObjectiveConfig(annealing="constant"), [25, 50, 75]),
    ],
)
def test_a_trial_can_be_stopped_only_between_its_annealing_and_its_last_step(
    objective: ObjectiveConfig, comparable: list[int]
) -> None:
    config = tiny_config("hybrid", steps=100, evaluate_every=25, objective=objective)
    reported: list[dict[str, Any]] = []
    report = RayReport(Job(to_dict(config), {}, "", {}, 1.0), config, rank=1, node=None, send=reported.append)
    for step in (25, 50, 75, 100):
        report.evaluated(step, {"bound": 1.0})
    assert [result["step"] for result in reported if RUNG in result] == comparable
    # the scheduler looks at nothing else
    assert Halving(config.steps)._time_attr == RUNG


def test_a_resumed_search_stops_what_earlier_trials_have_beaten() -> None:
    from types import SimpleNamespace

    fresh, told = Halving(80), Halving(80)
    for number in range(4):
        told.recall(f"known-{number}", [{"step": 10, "bits_per_byte": 2.0 + number / 10, RUNG: 10}, {"step": 5}])
    for scheduler, decision in ((fresh, "CONTINUE"), (told, "STOP")):
        scheduler.set_search_properties("bits_per_byte", "min")
        trial = SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, {"bits_per_byte": 2.4, RUNG: 10}) == decision
