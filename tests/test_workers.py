from __future__ import annotations

from typing import Any

import pytest
import ray.train

from raytrain.config import ObjectiveConfig, to_dict
from raytrain.search import make_scheduler
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
    monkeypatch: pytest.MonkeyPatch, objective: ObjectiveConfig, comparable: list[int]
) -> None:
    config = tiny_config("hybrid", steps=100, evaluate_every=25, objective=objective)
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.train, "report", reported.append)
    report = RayReport(Job(to_dict(config), "", "", {}, 1.0), config, rank=1)
    for step in (25, 50, 75, 100):
        report.evaluated(step, {"bound": 1.0})
    assert [result["step"] for result in reported if RUNG in result] == comparable
    # the scheduler looks at nothing else
    assert make_scheduler(config)._time_attr == RUNG
