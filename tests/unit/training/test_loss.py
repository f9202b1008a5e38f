from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from raytrain.config.schedules import annealing_end, auxiliary_weight, kl_weight
from raytrain.config.schema import ObjectiveConfig
from raytrain.models.terms import Terms
from raytrain.training.loss import BoundTotals, loss
from raytrain.training.multiplier import Multiplier
from tests.conftest import tiny_config


def test_constant_is_constant() -> None:
    config = ObjectiveConfig(annealing="constant", weight=0.3)
    assert {kl_weight(config, step, 100) for step in range(0, 200, 10)} == {0.3}
    assert annealing_end(config, 100) == 0


def test_linear_rises_evenly_between_start_and_end() -> None:
    config = ObjectiveConfig(annealing="linear", start=0.1, end=0.5, weight=2.0, floor=0.0)
    weights = [kl_weight(config, step, 1000) for step in (0, 100, 200, 300, 400, 499, 500, 1000)]
    assert weights == pytest.approx([0, 0, 0.5, 1.0, 1.5, 1.995, 2.0, 2.0])
    assert annealing_end(config, 1000) == 500


def test_sigmoid_is_bowmans() -> None:
    config = ObjectiveConfig(annealing="sigmoid", start=0.0, end=0.7, floor=0.0)
    for step in (500, 2000, 3500, 5000, 6500):
        assert kl_weight(config, step, 10_000) == pytest.approx((math.tanh((step - 3500) / 1000) + 1) / 2, abs=1e-12)
    assert kl_weight(config, 7000, 10_000) == 1.0


def test_cyclical_ramps_over_half_of_each_cycle() -> None:
    config = ObjectiveConfig(annealing="cyclical", start=0.0, end=0.4, cycles=4, floor=0.0)
    cycle = [kl_weight(config, step, 1000) for step in (0, 25, 50, 75, 99)]
    assert cycle == pytest.approx([0, 0.5, 1, 1, 1])
    assert [kl_weight(config, 100 + step, 1000) for step in (0, 25, 50, 75, 99)] == pytest.approx(cycle)
    assert kl_weight(config, 400, 1000) == kl_weight(config, 999, 1000) == 1.0
    assert annealing_end(config, 1000) == 400


@pytest.mark.parametrize("annealing", ["constant", "linear", "sigmoid", "cyclical"])
def test_every_schedule_ends_at_its_weight_and_never_leaves_its_range(annealing: str) -> None:
    config = ObjectiveConfig(annealing=annealing, start=0.05, end=0.5, weight=0.8)  # type: ignore[arg-type]
    weights = [kl_weight(config, step, 333) for step in range(400)]
    assert all(0 <= weight <= 0.8 for weight in weights)
    assert set(weights[annealing_end(config, 333) :]) == {0.8}


@pytest.mark.parametrize("annealing", ["linear", "sigmoid", "cyclical"])
def test_the_weight_is_never_below_its_floor_while_it_is_annealed(annealing: str) -> None:
    config = ObjectiveConfig(annealing=annealing, start=0.1, end=0.5)
    plain = replace(config, floor=0.0)
    weights = [(kl_weight(config, step, 1000), kl_weight(plain, step, 1000)) for step in range(1000)]
    assert config.floor == 0.001  # that of the authors' code
    assert weights[0] == weights[100] == (0.001, 0.0)
    assert all(floored == max(0.001, weight) for floored, weight in weights)


def test_a_floor_is_never_above_the_weight_and_leaves_a_constant_one_alone() -> None:
    small = ObjectiveConfig(annealing="linear", weight=1e-4)
    assert {kl_weight(small, step, 100) for step in range(100)} == {1e-4}
    assert kl_weight(ObjectiveConfig(annealing="constant", weight=0.0), 0, 100) == 0.0
    assert kl_weight(ObjectiveConfig(annealing="linear", weight=0.0), 0, 100) == 0.0


def test_alpha_falls_evenly_to_its_end() -> None:
    assert {auxiliary_weight(ObjectiveConfig(alpha=0.3), step, 100) for step in (0, 50, 99)} == {0.3}
    falling = ObjectiveConfig(alpha=0.8, alpha_end=0.5)
    assert [auxiliary_weight(falling, step, 100) for step in (0, 25, 49, 50, 99)] == pytest.approx(
        [0.8, 0.4, 0.016, 0, 0]
    )


def make_terms(num: int = 32, latent: int = 4) -> Terms:
    generator = torch.Generator().manual_seed(0)
    return Terms(
        reconstruction=torch.rand(num, generator=generator) * 100,
        kl=torch.rand(num, latent, generator=generator),
        auxiliary=torch.rand(num, generator=generator) * 100,
        mean=torch.randn(num, latent, generator=generator),
        log_variance=torch.randn(num, latent, generator=generator),
        z=torch.randn(num, latent, generator=generator),
    )


def part_of(terms: Terms, rows: slice) -> Terms:
    """The terms of some samples."""
    return Terms(*(part[rows] for name, part in vars(terms).items() if name not in ("swapped", "state")))


def test_loss_is_the_weighted_sum() -> None:
    terms, config = make_terms(), tiny_config("hybrid")
    expected = terms.reconstruction.sum() + 0.5 * terms.kl.sum() + 0.2 * terms.auxiliary.sum()
    torch.testing.assert_close(loss(terms, config, 0.5, 0.2), expected)


def test_free_bits_cost_nothing_below_their_threshold() -> None:
    terms, config = make_terms(), tiny_config("hybrid", objective=ObjectiveConfig(alpha=0.0, free_bits=2.0))
    groups = terms.kl.unflatten(0, (2, 16)).mean(1)  # two groups of 16
    expected = terms.reconstruction.sum() + 16 * groups.clamp(min=0.5).sum()
    torch.testing.assert_close(loss(terms, config, 1.0, 0.0), expected)
    free = replace(config, objective=ObjectiveConfig(alpha=0.0, free_bits=400.0))
    terms.kl.requires_grad_()
    loss(terms, free, 1.0, 0.0).backward()
    assert terms.kl.grad is not None
    assert not terms.kl.grad.any()


def test_target_kl_is_a_distance() -> None:
    terms, config = make_terms(), tiny_config("hybrid", objective=ObjectiveConfig(alpha=0.0, target_kl=3.0))
    groups = terms.kl.sum(1).unflatten(0, (2, 16)).mean(1)
    torch.testing.assert_close(
        loss(terms, config, 0.7, 0.0), terms.reconstruction.sum() + 0.7 * 16 * (groups - 3.0).abs().sum()
    )


def test_a_rate_costs_what_the_kl_lacks_and_has_no_gradient_for_the_multiplier() -> None:
    terms, config = make_terms(), tiny_config("hybrid", objective=ObjectiveConfig(alpha=0.0, rate=5.0))
    multiplier = Multiplier(5.0)
    multiplier.value.fill_(-0.4)  # its sign has no meaning
    terms.kl.requires_grad_()
    found = loss(terms, config, 1.0, 0.0, multiplier)
    expected = terms.reconstruction.sum() + terms.kl.sum() + 0.4 * 32 * (5.0 - terms.kl.sum() / 32)
    torch.testing.assert_close(found, expected)
    found.backward()
    torch.testing.assert_close(terms.kl.grad, torch.full_like(terms.kl, 1.0 - 0.4))
    assert multiplier.value.grad is None


@pytest.mark.parametrize("pair", [("free_bits", "target_kl"), ("free_bits", "rate"), ("target_kl", "rate")])
def test_only_one_thing_may_hold_the_kl(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{pair[0]} is 1.0: cannot be combined with objective\.{pair[1]}"):
        ObjectiveConfig(**dict.fromkeys(pair, 1.0))


@pytest.mark.parametrize(
    "objective",
    [ObjectiveConfig(), ObjectiveConfig(free_bits=2.0), ObjectiveConfig(target_kl=3.0), ObjectiveConfig(rate=3.0)],
)
def test_loss_adds_up_over_slices_of_groups(objective: ObjectiveConfig) -> None:
    terms, config = make_terms(), tiny_config("hybrid", objective=objective)
    slices = [part_of(terms, half) for half in (slice(0, 16), slice(16, 32))]
    multiplier = Multiplier(objective.rate) if objective.rate else None
    total = sum(loss(part, config, 0.5, 0.2, multiplier) for part in slices)
    torch.testing.assert_close(total, loss(terms, config, 0.5, 0.2, multiplier))


def test_bound_has_full_weight_and_counts_active_units() -> None:
    terms = make_terms()
    terms.mean[:, 0] = 1.0  # says nothing
    totals = BoundTotals(4)
    totals.add(part_of(terms, slice(20)), 400)
    totals.add(part_of(terms, slice(20, 32)), 240)
    metrics = totals.metrics()
    bound = (terms.reconstruction.sum() + terms.kl.sum()).item()
    assert metrics["bound"] == pytest.approx(bound / 32)
    assert metrics["bits_per_byte"] == pytest.approx(bound / 640 / math.log(2))
    assert "used" not in metrics
    assert metrics["active_units"] == 3


def test_what_is_used_of_a_code_is_what_another_samples_code_costs() -> None:
    terms = make_terms()
    totals = BoundTotals(4)
    for half in (slice(0, 16), slice(16, 32)):
        half_terms = part_of(terms, half)
        totals.add(replace(half_terms, swapped=half_terms.reconstruction + 2.5), 320)
    assert totals.metrics()["used"] == pytest.approx(2.5, rel=1e-5)
