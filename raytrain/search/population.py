"""Population-based training (Jaderberg et al. 2017): schedules that are found while the weights are trained.

The members of a population are trained in parts of equally many steps. After each part the worst quarter is replaced:
such a member goes on from the state of one of the best quarter, with hyperparameters near that one's. The rule and its
numbers are those of Ray Tune's ``PopulationBasedTraining``. The bookkeeping is not: Tune keeps what it has decided in
its own process, and decides by what has ended so far. Here a part is a trial with a record of its own, and the next
ones follow from how all parts before have ended, so that a search that was resumed ends as an undisturbed one does.

All members have one seed, and so the same batches and the same noise. The state of a member then depends on nothing but
the config that it began with and the changes since: with these as its ``changes``, the config is that of one run, which
``raytrain.train`` repeats bit by bit.
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
"""Share of the members that are replaced after each part, and of those that replace them."""
DRAWN_AGAIN = 0.25
"""Probability that a hyperparameter is drawn anew instead of being changed by one of ``FACTORS``."""
FACTORS = (0.8, 1.2)
PARTS = 8
"""Most parts in which the members are trained, if their number is not given."""


class ExtinctError(Exception):
    """No member has a state from which any could go on."""


@dataclass(frozen=True)
class Successor:
    """How a part goes on from the state that another has left."""

    parent: Trial
    """The trial that has left it."""
    step: int
    config: RunConfig[Any]
    params: dict[str, Any]
    """The parameters of the space that hold from here on."""


@dataclass(frozen=True)
class Part:
    """A part that is to be trained next."""

    member: int
    end: int
    """Step after which it ends."""
    successor: Successor | None = None
    """``None`` for the first part of a member, which is drawn."""


def part_steps(plan: Plan) -> int:
    """Return the steps of a part."""
    return next(iter(plan.bases.values())).steps // plan.parts


def find_parts(wanted: int | None, base: RunConfig[Any]) -> int:
    """Return the number of parts in which runs of ``base`` are trained: ``wanted``, or the most up to ``PARTS``.

    A part ends at an evaluation, so that a run in one piece is evaluated at the same steps.

    Raises:
        UserError: no part would, or those of ``wanted`` would not; the line says which do.
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
    """Refuse a population whose members have not the same steps, or in which nothing can change.

    Args:
        space: name of the search space.
        bases: the configs that its fields change, by model.
        points: configs that it draws.

    Raises:
        UserError: with the option or field.
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
    """Return a warm start as a member of a population: with the seed of the others.

    Raises:
        UserError: it is no point of the space, so that nothing of it could change.
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
    """Return the first part that has not begun and whose beginning is settled; ``None`` while there is none.

    A member that cannot be among the worst any more goes on while others are still at their parts.

    Raises:
        ExtinctError: no member has a result after a part.
        UserError: the record of a part is of another population.
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
    """Return whether no member of the search's population can go on; false without one.

    Raises:
        UserError: the record of a part is of another population.
    """
    if not plan.parts:
        return False
    try:
        next_part(plan, trials)
    except ExtinctError:
        return True
    return False


def _successor(plan: Plan, before: dict[int, Trial], member: int) -> Successor | None:
    """Return what follows the part ``before`` of a member, once that is settled."""
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
    assert trial.end is not None  # those of a population have one
    return trial.end


def _score(plan: Plan, trial: Trial) -> float:
    """Return the score of the state that a part has left, which is not its best one; infinite without a state."""
    if trial.status != "finished" or not trial.history or trial.history[-1]["step"] != trial.end:
        return math.inf
    return plan.search_objective.score(trial.history[-1])


def explored(plan: Plan, donor: Trial, chance: random.Random) -> tuple[RunConfig[Any], dict[str, Any]]:
    """Return the config with which a member goes on from the state of ``donor``, and the parameters that it has then.

    Parameters of the space that decide ``CHANGEABLE`` fields alone are changed, others are those of the weights.
    """
    params = dict(donor.params)
    for name, value in sorted(donor.params.items()):
        other = _near(value, json_to_distribution(donor.distributions[name]), chance)
        if _changed(plan, donor, {**params, name: other}) is not None:
            params[name] = other
    config = _changed(plan, donor, params)
    assert config is not None  # the last of them that was taken
    return config, params


def _changed(plan: Plan, donor: Trial, params: dict[str, Any]) -> RunConfig[Any] | None:
    """Return the config of ``donor`` with what ``params`` make of it from its end on; ``None`` where they cannot."""
    step = _end(donor)
    before = flatten(in_force(donor.config, step))
    try:
        config = plan.space.resolve(plan.bases, optuna.trial.FixedTrial(params), plan.budget)
        after = {name: value for name, value in flatten(config).items() if value != before[name]}
        if not after.keys() <= set(CHANGEABLE):
            return None
        made = tuple(Change(step, name, float(value)) for name, value in sorted(after.items()))
        return dataclasses.replace(donor.config, changes=(*donor.config.changes, *made))
    except (Exception, SystemExit):  # the file is the user's: where it has no such config, the parameter stays
        return None


def _near(value: Any, distribution: BaseDistribution, chance: random.Random) -> Any:
    """Return another value of a parameter: near ``value``, of choices one beside it, or sometimes any in its range."""
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
