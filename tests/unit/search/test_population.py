"""Population-based training: which part follows which, what is changed in it, and what is refused."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from raytrain.config.changes import CHANGEABLE
from raytrain.config.presets import PRESETS, preset
from raytrain.config.schema import flatten, in_force, override
from raytrain.data.corpus import Corpus
from raytrain.metrics import METRIC
from raytrain.runs.trials import Trial
from raytrain.search.estimate import Estimate
from raytrain.search.finish import unfinished
from raytrain.search.plan import Plan, WarmStart, read_plan
from raytrain.search.population import (
    ExtinctError,
    Part,
    _near,
    check_population,
    explored,
    find_parts,
    fit_start,
    is_extinct,
    next_part,
)
from raytrain.search.progress import seconds_left, steps_left
from raytrain.search.space import read_space
from raytrain.storage import open_storage
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.unit.search.test_search_objective import a_plan, figures, searcher

SPACE = """
def space(trial):
    return {
        "objective.annealing": "constant",
        "objective.weight": trial.suggest_float("weight", 0.1, 1.0, log=True),
        "optimizer.learning_rate": trial.suggest_float("rate", 1e-4, 1e-2, log=True),
        "model.latent": trial.suggest_categorical("latent", [4, 8]),
    }
"""
BASE = tiny_config("hybrid", steps=40, evaluate_every=10)
DRAWN = {"weight": 0.5, "rate": 1e-3, "latent": 4}
DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "weight": FloatDistribution(0.1, 1.0, log=True),
    "rate": FloatDistribution(1e-4, 1e-2, log=True),
    "latent": CategoricalDistribution([4, 8]),
}


def population(members: int = 4, **changes: Any) -> Plan:
    """A plan of four parts of 10 steps for each member."""
    settings = {"algorithm": "pbt", "parts": 4, "num_samples": 4 * members, "scheduler": "none"}
    return a_plan(space=read_space("mine", SPACE), bases={"hybrid": BASE}, **{**settings, **changes})


def a_part(plan: Plan, member: int, part: int, bits: float | None, params: dict[str, Any] | None = None) -> Trial:
    """A part of a member, counted from 0, that has ended with these bits per byte; without any it has failed."""
    params, end = params or DRAWN, 10 * (part + 1)
    return Trial(
        number=part * plan.num_samples // plan.parts + member,
        identity=f"{part}-{member}",
        config=override(BASE, {"objective.annealing": "constant", "objective.weight": params["weight"],
                               "optimizer.learning_rate": params["rate"], "model.latent": params["latent"]}),
        params=params,
        distributions={name: distribution_to_json(kind) for name, kind in DISTRIBUTIONS.items()},
        fields={},
        status="failed" if bits is None else "finished",
        history=[] if bits is None else [{"step": end, METRIC: bits, "kl": 1.0}],
        best={} if bits is None else figures(min(bits, 1.0)),
        member=member,
        end=end,
    )  # fmt: skip


def ended(plan: Plan, *bits: float | None, part: int = 0) -> list[Trial]:
    return [a_part(plan, member, part, value) for member, value in enumerate(bits)]


def following(plan: Plan, trials: list[Trial]) -> list[Part]:
    """All parts that can begin now."""
    found, trials = [], list(trials)
    while (part := next_part(plan, trials)) is not None:
        found.append(part)
        trials.append(replace(a_part(plan, part.member, part.end // 10 - 1, 1.0), status="running"))
    return found


def parents(parts: list[Part]) -> dict[int, str]:
    return {part.member: part.successor.parent.identity for part in parts if part.successor is not None}


# ------------------------------------------------------------------------------------------- selection


def test_a_population_begins_with_a_part_of_each_member() -> None:
    assert following(population(), []) == [Part(member, 10) for member in range(4)]


def test_the_worst_quarter_goes_on_from_the_best_and_all_others_as_they_were() -> None:
    plan = population(8)
    trials = ended(plan, 2.0, 1.9, 1.5, 2.5, 2.2, 2.6, 1.6, 2.1)
    found = following(plan, trials)
    assert [(part.member, part.end) for part in found] == [(member, 20) for member in range(8)]
    came = parents(found)
    assert {member: came[member] for member in (0, 1, 2, 4, 6, 7)} == {m: f"0-{m}" for m in (0, 1, 2, 4, 6, 7)}
    assert {came[3], came[5]} <= {"0-2", "0-6"}
    for part in found:
        assert part.successor is not None
        kept = part.member not in (3, 5)
        assert (part.successor.config == part.successor.parent.config) == kept
        assert (part.successor.params == part.successor.parent.params) == kept


def test_what_counts_is_the_state_that_a_part_has_left_not_its_best_one() -> None:
    plan = population()
    trials = ended(plan, 2.0, 1.9, 1.5, 1.8)
    trials[3].best = figures(0.1)
    trials[2].history.insert(0, {"step": 5, METRIC: 9.0, "kl": 1.0})
    assert parents(following(plan, trials)) == {0: "0-2", 1: "0-1", 2: "0-2", 3: "0-3"}


def test_one_that_uses_its_code_too_little_is_among_the_worst() -> None:
    plan = population(min_used=2.0)
    trials = ended(plan, 1.0, 1.9, 1.5, 1.8)
    for trial, use in zip(trials, (1.9, 2.1, 2.1, 2.1), strict=True):
        trial.history[-1]["used"] = use
    assert parents(following(plan, trials)) == {0: "0-2", 1: "0-1", 2: "0-2", 3: "0-3"}


def test_one_without_a_result_is_replaced() -> None:
    plan = population()
    trials = ended(plan, 2.0, None, 1.5, None)
    assert parents(following(plan, trials)) == {0: "0-0", 1: "0-2", 2: "0-2", 3: "0-2"}
    early = replace(trials[0], status="early_stopped")  # its last evaluation is of an earlier step
    early.history = [{"step": 5, METRIC: 0.1, "kl": 1.0}]
    assert parents(following(plan, [early, *trials[1:]])) == {0: "0-2", 1: "0-2", 2: "0-2", 3: "0-2"}


def test_a_population_of_which_nothing_is_left_ends_with_the_reason() -> None:
    plan = population()
    trials = [replace(trial, reason="out of luck") for trial in ended(plan, None, None, None, None)]
    with pytest.raises(ExtinctError, match="no member of the population has a result at step 10: out of luck"):
        next_part(plan, trials)
    assert is_extinct(plan, trials)
    assert not is_extinct(plan, trials[:3])
    assert not is_extinct(plan, ended(plan, None, None, None, 2.0))
    assert not is_extinct(a_plan(), trials)


def test_one_goes_on_as_soon_as_it_cannot_be_among_the_worst_any_more() -> None:
    plan = population()
    trials = ended(plan, 2.0, 1.9, 1.5, 1.8)
    running = [replace(trials[3], status="running", history=[])]
    assert next_part(plan, [replace(trial, status="running", history=[]) for trial in trials]) is None
    # the worst so far may be the worst of all; the others are not, however the last one ends
    assert parents(following(plan, [*trials[:3], *running])) == {1: "0-1", 2: "0-2"}
    for bits in (0.1, 3.0):
        late = parents(following(plan, [*trials[:3], replace(trials[3], history=[{"step": 10, METRIC: bits}])]))
        assert {1: "0-1", 2: "0-2"}.items() <= late.items()


def test_what_follows_does_not_depend_on_who_was_first() -> None:
    plan = population(5)
    trials = ended(plan, 2.0, 1.9, 1.5, 1.8, 2.2)
    expected = following(plan, trials)
    for order in itertools.permutations(trials):
        assert following(plan, list(order)) == expected
    numbered = [replace(trial, number=9 - trial.number) for trial in trials]
    assert parents(following(plan, numbered)) == parents(expected)


def test_a_population_has_ended_after_its_last_part() -> None:
    plan = population(2)
    trials = [trial for part in range(4) for trial in ended(plan, 1.0, 2.0, part=part)]
    assert next_part(plan, trials) is None
    assert next_part(plan, trials[:-1]) is not None


def test_the_steps_that_are_left_are_those_of_parts() -> None:
    plan = population()
    running = replace(a_part(plan, 0, 1, 1.0), status="running", step=15)
    trials = [replace(trial, step=10) for trial in ended(plan, 2.0, 1.9, 1.5, 1.8)]
    assert steps_left(plan, [*trials, running], None) == [[5.0, *[10.0] * 11], []]


# ------------------------------------------------------------------------------------------- exploring


def test_only_what_may_change_during_a_run_is_changed() -> None:
    plan, donor = population(), a_part(population(), 0, 1, 1.5)
    seen: set[str] = set()
    for seed in range(40):
        config, params = explored(plan, donor, random.Random(seed))
        assert replace(config, changes=()) == donor.config
        assert params["latent"] == 4
        assert {change.step for change in config.changes} <= {20}
        after, before = flatten(in_force(config, 20)), flatten(donor.config)
        changed = {name for name in after if after[name] != before[name]}
        assert changed <= set(CHANGEABLE)
        assert after["objective.weight"] == params["weight"]
        assert after["optimizer.learning_rate"] == params["rate"]
        assert in_force(config, 19) == donor.config
        seen |= changed
    assert seen == {"objective.weight", "optimizer.learning_rate"}


def test_parameters_that_do_not_go_together_stay() -> None:
    """Either may be larger, not both: what is recorded is what holds."""
    source = SPACE.replace(
        "    return {",
        """    weight = trial.suggest_float("weight", 0.1, 1.0, log=True)
    rate = trial.suggest_float("rate", 1e-4, 1e-2, log=True)
    if weight > 0.55 and rate > 1.1e-3:
        raise ValueError("too much of both")
    return {""",
    )
    plan = replace(population(), space=read_space("mine", source))
    both = 0
    for seed in range(60):
        config, params = explored(plan, a_part(plan, 0, 0, 1.5), random.Random(seed))
        held = flatten(in_force(config, 10))
        assert (held["objective.weight"], held["optimizer.learning_rate"]) == (params["weight"], params["rate"])
        assert not (params["weight"] > 0.55 and params["rate"] > 1.1e-3)
        both += params["weight"] != 0.5 and params["rate"] != 1e-3
    assert both > 10


def test_changes_follow_those_of_before() -> None:
    plan = population()
    config, params = explored(plan, a_part(plan, 0, 0, 1.5), random.Random(1))
    again, later = explored(plan, replace(a_part(plan, 1, 1, 1.5), config=config, params=params), random.Random(2))
    assert again.changes[: len(config.changes)] == config.changes
    assert {change.step for change in again.changes} == {10, 20}
    assert in_force(again, 19) == in_force(config, 19)
    assert flatten(in_force(again, 20))["objective.weight"] == later["weight"]


@pytest.mark.parametrize(
    ("value", "distribution"),
    [
        (0.5, FloatDistribution(0.0, 1.0)),
        (1.0, FloatDistribution(0.5, 1.0)),
        (1e-3, FloatDistribution(1e-4, 1e-2, log=True)),
        (0.5, FloatDistribution(0.0, 1.0, step=0.25)),
        (30, IntDistribution(1, 32)),
        (8, IntDistribution(1, 64, log=True)),
        ("a", CategoricalDistribution(["a", "b"])),
    ],
)
def test_other_values_are_near_or_anywhere_in_the_range(value: Any, distribution: BaseDistribution) -> None:
    found = [_near(value, distribution, random.Random(seed)) for seed in range(200)]
    assert all(distribution._contains(distribution.to_internal_repr(other)) for other in found)
    assert {type(other) for other in found} == {type(value)}
    assert len(set(found)) > 1
    if isinstance(distribution, FloatDistribution) and distribution.step is None:
        near = [other for other in found if math.isclose(other, min(0.8 * value, distribution.high))
                or math.isclose(other, min(1.2 * value, distribution.high))]  # fmt: skip
        assert 110 < len(near) < 180


# ------------------------------------------------------------------------------------------- searching


def test_a_search_draws_its_parts_and_a_resumed_one_goes_on_with_them(corpus: Corpus, tmp_path: Path) -> None:
    plan = population(2)
    first = searcher(plan, corpus, tmp_path)
    jobs = [first.suggest(str(number))["job"] for number in range(2)]  # type: ignore[index]
    assert [(job["end"], job["origin"], job["reported"]) for job in jobs] == [(10, None, 0)] * 2
    assert first.suggest("2") is None
    assert first.failure is None
    for trial, bits in zip(first.trials, (1.5, 2.0), strict=True):
        trial.history, trial.best, trial.status = [{"step": 10, METRIC: bits, "kl": 1.0}], figures(bits), "finished"
        first.ended(trial)
        first.records.add(trial)
    job = first.suggest("2")["job"]  # type: ignore[index]
    origin = first.location(first.trials[0]).uri()
    assert (job["end"], job["origin"], job["reported"]) == (20, origin, 10)

    second = searcher(plan, corpus, tmp_path)
    assert {**second.suggest("2")["job"], "tracking": {}} == {**job, "tracking": {}}  # type: ignore[index]
    last = second.suggest("3")["job"]  # type: ignore[index]
    assert (last["end"], last["origin"]) == (20, origin)
    assert [change["step"] for change in last["config"]["changes"]] == [10, 10]
    other = second.trials[3]
    assert other.fields["objective.weight"] == other.params["weight"] == last["config"]["changes"][0]["value"]
    assert not other.on_the_space
    assert second.suggest("4") is None


def test_a_search_that_was_killed_while_members_were_drawn_draws_the_same_others(
    corpus: Corpus, tmp_path: Path
) -> None:
    def drawn(folder: Path, *counts: int) -> list[dict[str, Any]]:
        for count in counts:  # as many in each driver, the earlier ones of which are killed
            found = searcher(population(4), corpus, folder)
            for number in range(count):
                found.suggest(str(number))
        return [trial.params for trial in found.trials]

    whole = drawn(tmp_path / "whole", 4)
    assert drawn(tmp_path / "killed", 2, 4) == whole
    assert len({tuple(params.values()) for params in whole}) == 4


def test_a_search_whose_members_have_all_ended_ends_with_what_it_has(corpus: Corpus, tmp_path: Path) -> None:
    found = searcher(population(2), corpus, tmp_path)
    for number in range(2):
        found.suggest(str(number))
    for trial in found.trials:
        trial.status, trial.best = "early_stopped", figures(3.0)
    assert found.suggest("2") == found.FINISHED
    assert (found.failure, found.extinct) == (
        None,
        "no member of the population has a result at step 10: early_stopped",
    )
    assert unfinished(found.search, found.trials) == ""


def test_a_plan_of_a_population_is_read_as_it_was_written(tmp_path: Path) -> None:
    storage, plan = open_storage(tmp_path), population()
    storage.write("search.json", plan.to_json())
    read = read_plan(storage)
    assert read is not None
    assert (read.parts, read.num_samples, read.algorithm) == (4, 16, "pbt")
    assert plan.differences(population(5)) == ["the population had 5 members, has 4"]
    assert plan.differences(population(4, parts=2, num_samples=8)) != []
    storage.write("search.json", plan.to_json().replace(b'"parts": 4', b'"parts": 3'))
    with pytest.raises(UserError, match="parts is 3, with 16 trials of pbt"):
        read_plan(storage)


@pytest.mark.parametrize(
    ("members", "changes", "message"),
    [
        (1, [{}], "--num-samples 1: a population has at least 2 members"),
        (4, [{"steps": 80}], "search space mine varies steps"),
        (4, [{}, {"seed": 1}], "search space mine varies seed"),
        (4, [{}, {"evaluate_every": 20}], "search space mine varies evaluate_every"),
        (4, [{}, {"model.latent": 3}], "search space mine draws nothing that may change during a run"),
        (
            4,
            [{}, {"changes": [{"step": 5, "field": "objective.weight", "value": 0.5}]}],
            "--algorithm pbt finds changes itself: begin with a config that has none",
        ),
    ],
)
def test_populations_that_cannot_be_are_refused(members: int, changes: list[dict[str, Any]], message: str) -> None:
    bases = {"hybrid": BASE}
    with pytest.raises(UserError, match=message):
        check_population(members, "mine", bases, [override(BASE, change) for change in changes])
    check_population(4, "mine", bases, [BASE, override(BASE, {"objective.weight": 0.5})])


@pytest.mark.parametrize(
    ("steps", "every", "wanted", "expected"),
    [
        (512, 64, None, 8),
        (100_000, 1000, None, 5),
        (30_000, 1000, None, 6),
        (40, 10, 2, 2),
        (1024, 64, 16, 16),
        (40, 10, 8, "--parts 8: 40 steps, evaluated every 10, cannot be cut .*; give one of 2, 4"),
        (40, 15, None, "; give other --steps or --evaluate-every"),
        (33, 3, None, "--parts 8: .*; give one of 11"),
    ],
)
def test_parts_end_at_evaluations(steps: int, every: int, wanted: int | None, expected: int | str) -> None:
    base = replace(BASE, steps=steps, evaluate_every=every)
    if isinstance(expected, int):
        assert find_parts(wanted, base) == expected
    else:
        with pytest.raises(UserError, match=expected):
            find_parts(wanted, base)


@pytest.mark.parametrize("name", [preset for preset, model in PRESETS if model == "hybrid"])
def test_every_preset_can_be_cut_into_parts(name: str) -> None:
    assert find_parts(None, preset(name, "hybrid")) > 1


def test_a_warm_start_is_a_member_like_the_others() -> None:
    plan = population()
    own = replace(a_part(plan, 0, 0, 1.0).config, seed=1003)
    start = WarmStart(reference="first", config=own, params=dict(DRAWN))
    assert fit_start(start, plan.space, plan.bases, None).config == replace(own, seed=BASE.seed)
    with pytest.raises(UserError, match="--warm-start first: with --algorithm pbt it must be a point of search space"):
        fit_start(replace(start, params=None), plan.space, plan.bases, None)


def test_hours_are_those_of_members_and_whole_repeats() -> None:
    """Four members in four parts of a quarter of an hour, then four repeats of an hour, on sixteen slots."""
    estimate = Estimate(
        num_trials=16, concurrent=16, most=4, workers=1, trial_seconds=900, num_repeats=4, repeat_share=4
    )
    assert estimate.hours == pytest.approx(2.0)
    assert seconds_left(1.0, [[10.0] * 16, [40.0] * 4], [4, 16]) == 80.0
