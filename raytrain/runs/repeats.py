"""Repeats of a search's best configs with new seeds: which trials they are, and which config they make the winner."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytrain.config.schema import RunConfig, to_dict, with_steps
from raytrain.metrics import SearchObjective
from raytrain.runs.trials import Trial, rank
from raytrain.utils.errors import UserError
from raytrain.utils.validation import validate_object

MOST_SEEDS = 1000
"""Also the offset of the first new seed from the search's own: spaces that vary the seed stay below it."""


@dataclass(frozen=True, kw_only=True)
class Confirm:
    """How a search confirms its winner: ``--confirm``, ``--confirm-steps`` and ``--confirm-share``."""

    configs: int
    """Best configs that are trained again."""
    seeds: int
    """New seeds of each."""
    first_seed: int
    """First of the new seeds; the others follow it."""
    steps: int | None = None
    """Steps of a repeat; those of the search's trials if ``None``."""
    share: float = 1.0
    """Share of its seeds in which a config must keep the constraint to win."""

    def __post_init__(self) -> None:
        if self.configs < 1 or not 1 <= self.seeds <= MOST_SEEDS:
            raise ValueError(f"confirm is {self.option}: give at least 1 config and 1 to {MOST_SEEDS} new seeds")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"confirm_steps is {self.steps}: must be positive")
        if not 0 < self.share <= 1:
            raise ValueError(f"confirm_share is {self.share:g}: must be in (0, 1]")

    @classmethod
    def parse(cls, text: str, seed: int, steps: int | None, share: float) -> Confirm:
        """Return the rule that ``--confirm K:S`` and its companion options define for a search with this ``seed``.

        Raises:
            UserError: a number is invalid.
        """
        match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
        if match is None:
            raise UserError(f"--confirm is {text!r}: give K:S, the number of configs and of new seeds for each")
        first = (seed + MOST_SEEDS) % 2**31
        try:
            return cls(configs=int(match[1]), seeds=int(match[2]), first_seed=first, steps=steps, share=share)
        except ValueError as error:
            raise UserError("--" + str(error).replace("confirm_", "confirm-")) from None

    @property
    def option(self) -> str:
        """Return the value of ``--confirm`` that gives this rule."""
        return f"{self.configs}:{self.seeds}"

    @property
    def num_trials(self) -> int:
        """Most repeats; there are fewer if fewer configs can win."""
        return self.configs * self.seeds

    def __str__(self) -> str:
        steps = "" if self.steps is None else f" of {self.steps} steps"
        share = "" if self.share == 1 else f", the constraint in {self.share:.0%} of the seeds"
        return (
            f"the best {self.configs} configs again with {self.seeds} new seed{'s' * (self.seeds > 1)} each, at most "
            f"{self.num_trials} trials{steps}{share}"
        )

    def repeat(self, config: RunConfig[Any], seed: int) -> RunConfig[Any]:
        """Return the config of a repeat with this seed."""
        return dataclasses.replace(with_steps(config, self.steps or config.steps), seed=seed)


def confirm_of(values: dict[str, Any]) -> Confirm | None:
    """Return the confirmation rule in a plan's JSON; ``None`` if its search confirms nothing.

    Raises:
        UserError: it holds something else.
    """
    found = values.get("confirm")
    try:
        return None if found is None else validate_object(Confirm, found, "confirm.")
    except ValueError as error:
        raise UserError(str(error)) from None


@dataclass(frozen=True)
class Repeated:
    """A config of a search, and its repeats recorded so far."""

    trial: Trial
    """The trial of the search that has the config; the best one if there are several."""
    configs: tuple[RunConfig[Any], ...]
    """The configs of its repeats, by seed."""
    repeats: tuple[Trial, ...]
    """The repeats that have been begun, by seed."""

    @property
    def ended(self) -> bool:
        """True once every repeat has ended."""
        return len(self.repeats) == len(self.configs) and all(repeat.ended for repeat in self.repeats)

    def values(self, metric: str) -> list[float]:
        """Return the metric of each repeat's best evaluation, by seed; NaN if it has none."""
        return [repeat.best.get(metric, math.nan) for repeat in self.repeats]

    def mean(self, metric: str) -> float:
        """Return the mean of the metric over the seeds that have one; NaN if none has."""
        found = list(filter(math.isfinite, self.values(metric)))
        return statistics.fmean(found) if found else math.nan

    def spread(self, metric: str) -> float:
        """Return the standard deviation of the metric over the seeds that have one; NaN with fewer than two."""
        found = list(filter(math.isfinite, self.values(metric)))
        return statistics.stdev(found) if len(found) > 1 else math.nan

    def held(self, search_objective: SearchObjective) -> int:
        """Return in how many seeds the constraint held; a seed that ended without a result does not count."""
        return sum(search_objective.may_win(repeat.best) for repeat in self.repeats)


def searched(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials without the repeats."""
    return [trial for trial in trials if trial.confirms is None]


def repeated(trials: Sequence[Trial], search_objective: SearchObjective, confirm: Confirm) -> list[Repeated]:
    """Return the configs to confirm, best of the search first: at most ``confirm.configs`` that may win.

    They follow from the search's own trials alone. Trials that differ only in the seed share one config.
    """
    own = searched(trials)
    used = {trial.config.seed for trial in own}
    seeds = list(
        itertools.islice((seed for seed in itertools.count(confirm.first_seed) if seed not in used), confirm.seeds)
    )
    best: dict[str, Trial] = {}
    for trial in rank(own, search_objective):
        if len(best) < confirm.configs and search_objective.may_win(trial.best):
            best.setdefault(_key(dataclasses.replace(trial.config, seed=0)), trial)
    known = {_key(trial.config): trial for trial in trials if trial.confirms is not None}
    found = []
    for trial in best.values():
        configs = tuple(confirm.repeat(trial.config, seed % 2**31) for seed in seeds)
        keys = map(_key, configs)
        found.append(Repeated(trial, configs, tuple(known[key] for key in keys if key in known)))
    return found


def _key(config: RunConfig[Any]) -> str:
    """Return a key that is the same for equal configs; the config of a registered model need not be hashable."""
    return json.dumps(to_dict(config), sort_keys=True)


def confirmed(found: Sequence[Repeated], search_objective: SearchObjective, confirm: Confirm) -> list[Repeated]:
    """Return the configs that kept the constraint in enough seeds, best mean first; empty until all have ended."""
    if not all(each.ended for each in found):
        return []
    # allow for rounding: 0.28 x 25 is more than 7
    enough = [each for each in found if each.held(search_objective) >= confirm.share * len(each.configs) - 1e-9]
    return sorted(enough, key=lambda each: each.mean(search_objective.metric))


def best_first(trials: Sequence[Trial], search_objective: SearchObjective, confirm: Confirm | None) -> list[Trial]:
    """Return the trials among which a search has its best model, best first.

    They are the repeats of the confirmed winner, or all trials of a search that has confirmed none.
    """
    if confirm is not None:
        found = repeated(trials, search_objective, confirm)
        if order := confirmed(found, search_objective, confirm):
            return rank(list(order[0].repeats), search_objective)
    return rank(searched(trials), search_objective)


def winner(trials: Sequence[Trial], search_objective: SearchObjective, confirm: Confirm | None = None) -> Trial | None:
    """Return the winning trial: the best seed of the confirmed winner, or else the best trial that may win.

    The latter also wins while the confirmation has not ended. Return ``None`` if no trial may win, or if the
    confirmation has ended and no config kept the constraint in enough seeds.
    """
    if confirm is not None:
        found = repeated(trials, search_objective, confirm)
        if found and all(each.ended for each in found) and not confirmed(found, search_objective, confirm):
            return None
    best = best_first(trials, search_objective, confirm)
    return next((trial for trial in best if search_objective.may_win(trial.best)), None)
