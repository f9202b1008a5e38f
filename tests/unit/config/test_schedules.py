"""The learning rate over the steps, and the decay of the moving average."""

from __future__ import annotations

import math

import pytest

from raytrain.config.schedules import LEARNING_RATE_SCHEDULES, OptimizerConfig, average_decay, learning_rate


def rates(config: OptimizerConfig, *steps: int, of: int = 1000) -> list[float]:
    return [learning_rate(config, step, of) for step in steps]


def test_the_learning_rate_decays_by_hundredths() -> None:
    config = OptimizerConfig(1.0, decay=0.95, decay_start=0.2)
    assert rates(config, 0, 200, 209, 210, 220, 999) == pytest.approx([1, 1, 1, 0.95, 0.95**2, 0.95**79])


def test_a_constant_rate_stays() -> None:
    assert set(rates(OptimizerConfig(0.5, schedule="constant"), *range(1000))) == {0.5}


def test_linear_and_cosine_fall_from_the_end_of_the_warm_up_to_0() -> None:
    linear = OptimizerConfig(2.0, schedule="linear", warmup=0.2)
    assert rates(linear, 200, 400, 600, 1000) == pytest.approx([2, 1.5, 1, 0])
    cosine = OptimizerConfig(2.0, schedule="cosine", warmup=0.2)
    assert rates(cosine, 200, 400, 600, 1000) == pytest.approx([2, 1 + math.cos(math.pi / 4), 1, 0])
    assert rates(OptimizerConfig(2.0, schedule="cosine"), 0, 500, 1000) == pytest.approx([2, 1, 0])


@pytest.mark.parametrize("schedule", list(LEARNING_RATE_SCHEDULES))
def test_the_rate_rises_evenly_over_the_warm_up_and_never_after_it(schedule: str) -> None:
    config = OptimizerConfig(1.0, schedule=schedule, warmup=0.1)
    assert rates(config, 0, 24, 49, 98, 99) == pytest.approx([0.01, 0.25, 0.5, 0.99, 1])
    after = rates(config, *range(99, 1000))
    assert after == sorted(after, reverse=True)
    assert min(after) > 0


@pytest.mark.parametrize("schedule", list(LEARNING_RATE_SCHEDULES))
def test_without_a_warm_up_the_first_step_has_the_whole_rate(schedule: str) -> None:
    assert rates(OptimizerConfig(0.3, schedule=schedule), 0, of=7) == [0.3]


def test_the_average_starts_with_a_short_memory() -> None:
    config = OptimizerConfig(ema=0.99)
    assert [average_decay(config, step) for step in (0, 8, 890, 10**6)] == pytest.approx([0.1, 0.5, 0.99, 0.99])
