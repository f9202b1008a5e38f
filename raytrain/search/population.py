"""Population-based training (Jaderberg et al. 2017): finds schedules of hyperparameters while the weights are trained.

The members of a population are trained in parts with equally many steps. After each part, the worst quarter is
replaced. A replaced member continues from the state of one of the best quarter, with hyperparameters near that
member's. The rule and its constants are those of Ray Tune's ``PopulationBasedTraining``. The bookkeeping is not: Tune
keeps its decisions in its own process, and decides by whatever has ended so far. Here, a part is a trial with its own
record, and later parts follow from how all earlier parts ended. A resumed search therefore ends like an undisturbed
one.

All members have the same seed, and so the same batches and the same noise. The state of a member then depends only on
its initial config and the changes since. With these as its ``changes``, the config describes a single run, which
``raytrain.train`` reproduces bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    json_to_distribution,
)

from raytrain.config.changes import CHANGEABLE, Change
from raytrain.config.schema import RunConfig, flatten, in_force
from raytrain.runs.repeats import searched
from raytrain.runs.trials import Trial
from raytrain.search.plan import Plan, WarmStart
from raytrain.search.space import PBT, Space
from raytrain.search.warm_start import point_of
from raytrain.utils.errors import UserError

REPLACED = 0.25
"""Share of the members that are replaced after each part, and of those whose states replace them."""
DRAWN_AGAIN = 0.25
"""Probability that a hyperparameter is redrawn instead of being multiplied by one of ``FACTORS``."""
FACTORS = (0.8, 1.2)
PARTS = 8
"""Most parts in which the members are trained if the number is not given."""


class ExtinctError(Exception):
    """No member has a state from which another can continue."""


@dataclass(frozen=True)
class Successor:
    """How a part continues from the state that another part has left."""

    parent: Trial
    """The trial that left the state."""
    step: int
    config: RunConfig[Any]
    params: dict[str, Any]
    """The parameters of the space that apply from here on."""


@dataclass(frozen=True)
class Part:
    """A part to train next."""

    member: int
    end: int
    """Step after which it ends."""
    successor: Successor | None = None
    """``None`` for the first part of a member, whose config is drawn."""


def part_steps(plan: Plan) -> int:
    """Return the steps of a part."""
    return next(iter(plan.bases.values())).steps // plan.parts


def find_parts(wanted: int | None, base: RunConfig[Any]) -> int:
    """Return the number of parts in which runs of ``base`` are trained: ``wanted``, or the largest up to ``PARTS``.

    Each part ends at an evaluation, so that an undivided run is evaluated at the same steps.

    Raises:
        UserError: no number of parts fits, or ``wanted`` does not; the message lists those that do.
    """
    steps, every = base.steps, base.evaluate_every
    fitting = [] if steps % every else [parts for parts in range(2, steps // every + 1) if steps // every % parts == 0]
    few = [parts for parts in fitting if parts <= PARTS]
    if wanted is None and few:
        return few[-1]
    if wanted is not None and wanted in fitting:
        return wanted
    numbers = ", ".join(map(str, fitting[:20]))
    others = f"give one of {numbers}" if fitting else "give other --steps or --evaluate-every"
    raise UserError(
        f"--parts {PARTS if wanted is None else wanted}: {steps} steps, evaluated every {every}, cannot be cut into so "
        f"many parts that end at an evaluation; {others}"
    )


def check_population(
    members: int, space: str, bases: dict[str, RunConfig[Any]], points: Sequence[RunConfig[Any]]
) -> None:
    """Refuse a population whose members differ in their number of steps, or in which nothing can change.

    Args:
        members: number of members.
        space: name of the search space.
        bases: the configs that the space's fields change, by model.
        points: configs drawn from the space.

    Raises:
        UserError: an option or field does not fit; the message names it.
    """
    if members < 2:
        raise UserError(f"--num-samples {members}: a population has at least 2 members")
    configs = [*bases.values(), *points]
    for name in ("steps", "evaluate_every", "seed"):
        if len({getattr(config, name) for config in configs}) > 1:
            raise UserError(f"search space {space} varies {name}, which all members of a population have in common")
    if any(config.changes for config in configs):
        raise UserError(f"--algorithm {PBT} finds changes itself: begin with a config that has none")
    if not any(len({flatten(config)[name] for config in points}) > 1 for name in CHANGEABLE):
        raise UserError(f"search space {space} draws nothing that may change during a run: {', '.join(CHANGEABLE)}")


def fit_start(start: WarmStart, plan_space: Space, bases: dict[str, RunConfig[Any]], budget: str | None) -> WarmStart:
    """Return a warm start as a member of a population, with the seed that all members share.

    Raises:
        UserError: it is not a point of the space, so nothing in it could change.
    """
    base = bases[start.config.model_name]
    fitted = dataclasses.replace(start, config=dataclasses.replace(start.config, seed=base.seed))
    if point_of(fitted, plan_space, bases, budget) is None:
        raise UserError(
            f"--warm-start {start.reference}: with --algorithm {PBT} it must be a point of search space "
            f"{plan_space.name}, whose parameters change"
        )
    return fitted


def next_part(plan: Plan, trials: Sequence[Trial]) -> Part | None:
    """Return the first part that has not begun and whose start is decided; ``None`` while there is none.

    A member that can no longer be among the worst continues while others are still training their parts.

    Raises:
        ExtinctError: no member has a result after a part.
        UserError: the record of a part belongs to another population.
    """
    parts: list[dict[int, Trial]] = [{} for _ in range(plan.parts)]
    for trial in searched(trials):
        number, rest = divmod(trial.end or 0, part_steps(plan))
        if rest or not 1 <= number <= plan.parts:
            raise UserError(f"the record of trial {trial.name} is of no part of this population: end is {trial.end}")
        parts[number - 1][trial.member or 0] = trial
    for part in range(plan.parts):
        for member in range(plan.members):
            if member in parts[part]:
                continue
            end = (part + 1) * part_steps(plan)
            if part == 0:
                return Part(member, end)
            if (found := _successor(plan, parts[part - 1], member)) is not None:
                return Part(member, end, found)
    return None


def is_extinct(plan: Plan, trials: Sequence[Trial]) -> bool:
    """Return whether no member of the search's population can continue; False without a population.

    Raises:
        UserError: the record of a part belongs to another population.
    """
    if not plan.parts:
        return False
    try:
        next_part(plan, trials)
    except ExtinctError:
        return True
    return False


def _successor(plan: Plan, before: dict[int, Trial], member: int) -> Successor | None:
    """Return how ``member`` continues after the part whose trials are ``before``; ``None`` until that is decided."""
    members = plan.members
    replaced = min(math.ceil(REPLACED * members), members // 2)
    own = before.get(member)
    if own is None or not own.ended:
        return None

    def key(trial: Trial) -> tuple[float, int]:
        return _score(plan, trial), trial.member or 0

    ended = sorted((trial for trial in before.values() if trial.ended), key=key)
    worse = len(ended) - 1 - ended.index(own)
    if math.isfinite(_score(plan, own)) and worse >= replaced:
        return Successor(own, _end(own), own.config, own.params)
    if len(ended) < members:
        return None
    best = [trial for trial in ended[:replaced] if math.isfinite(_score(plan, trial))]
    if not best:
        raise ExtinctError(f"no member of the population has a result at step {own.end}: {own.reason or own.status}")
    chance = random.Random(f"{plan.seed} {own.end} {member}")
    donor = chance.choice(best)
    return Successor(donor, _end(donor), *explored(plan, donor, chance))


def _end(trial: Trial) -> int:
    assert trial.end is not None  # trials of a population have one
    return trial.end


def _score(plan: Plan, trial: Trial) -> float:
    """Return the score of the state that a part left, not of its best state; infinite if it left none."""
    if trial.status != "finished" or not trial.history or trial.history[-1]["step"] != trial.end:
        return math.inf
    return plan.search_objective.score(trial.history[-1])


def explored(plan: Plan, donor: Trial, chance: random.Random) -> tuple[RunConfig[Any], dict[str, Any]]:
    """Return the config and the parameters with which a member continues from the state of ``donor``.

    Only parameters that affect nothing but ``CHANGEABLE`` fields are changed. The weights depend on the others.
    """
    params = dict(donor.params)
    for name, value in sorted(donor.params.items()):
        other = _near(value, json_to_distribution(donor.distributions[name]), chance)
        if _changed(plan, donor, {**params, name: other}) is not None:
            params[name] = other
    config = _changed(plan, donor, params)
    assert config is not None  # ``params`` holds only changes that were accepted
    return config, params


def _changed(plan: Plan, donor: Trial, params: dict[str, Any]) -> RunConfig[Any] | None:
    """Return ``donor``'s config with the changes by ``params`` from its end on; ``None`` if they are not possible."""
    step = _end(donor)
    before = flatten(in_force(donor.config, step))
    try:
        config = plan.space.resolve(plan.bases, optuna.trial.FixedTrial(params), plan.budget)
        after = {name: value for name, value in flatten(config).items() if value != before[name]}
        if not after.keys() <= set(CHANGEABLE):
            return None
        made = tuple(Change(step, name, float(value)) for name, value in sorted(after.items()))
        return dataclasses.replace(donor.config, changes=(*donor.config.changes, *made))
    except (Exception, SystemExit):  # the space file is the user's: if it makes no such config, keep the parameter
        return None


def _near(value: Any, distribution: BaseDistribution, chance: random.Random) -> Any:
    """Return another value of a parameter: near ``value``, for choices an adjacent one, or sometimes any in range."""
    again, factor, place = chance.random() < DRAWN_AGAIN, chance.choice(FACTORS), chance.random()
    if isinstance(distribution, CategoricalDistribution):
        last = len(distribution.choices) - 1
        beside = distribution.choices.index(value) + (1 if factor > 1 else -1)
        return distribution.choices[int(place * (last + 1)) if again else min(max(beside, 0), last)]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if not again:
        other = value * factor
    elif distribution.log:
        other = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
    else:
        other = low + place * (high - low)
    if step is not None:
        other = low + step * round((other - low) / step)
    other = min(max(other, low), high)
    return round(other) if isinstance(distribution, IntDistribution) else other
