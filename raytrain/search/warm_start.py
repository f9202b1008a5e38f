"""Configs that a search starts from: read from what a user calls them, and looked for in the search space."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytrain.config.cli import read_config
from raytrain.config.models import ModelName
from raytrain.config.schema import LOCATION, RunConfig, flatten, from_dict
from raytrain.runs.references import resolve
from raytrain.search.plan import WarmStart
from raytrain.search.space import Space
from raytrain.utils.errors import UserError

FROM_THE_SEARCH = (
    *LOCATION,
    "sampling",
    "length",
    "steps",
    "log_every",
    "evaluate_every",
    "evaluate_samples",
    "checkpoint_every",
)
"""Fields that a config takes over from the search that it joins: its text, its length and its validation samples.
Schedules are fractions of the steps and follow by themselves."""
ROUNDS = 3
"""Times that every parameter of a space is tried anew while a config is looked for in it."""


def read_warm_starts(references: Sequence[str], bases: dict[ModelName, RunConfig[Any]]) -> tuple[WarmStart, ...]:
    """The configs that ``--warm-start`` names, each made to fit the search: see ``FROM_THE_SEARCH``.

    Raises:
        UserError: there is no such thing, it is of a model that is not searched, or it cannot be trained so.
    """
    return tuple(WarmStart(reference, _fitted(reference, bases)) for reference in references)


def _fitted(reference: str, bases: dict[ModelName, RunConfig[Any]]) -> RunConfig[Any]:
    found = read_config(Path(reference)) if reference.endswith(".json") else _config_of(reference)
    base = bases.get(found.model_name)
    if base is None:
        raise UserError(f"--warm-start {reference} is a config of {found.model_name}; searched: {', '.join(bases)}")
    try:
        return dataclasses.replace(found, **{name: getattr(base, name) for name in FROM_THE_SEARCH})
    except ValueError as error:
        raise UserError(f"--warm-start {reference}: {error}") from None


def _config_of(reference: str) -> RunConfig[Any]:
    try:
        return from_dict(resolve(reference).stored.config)
    except UserError as error:
        raise UserError(f"--warm-start: {error}") from None


def express(
    space: Space, bases: dict[ModelName, RunConfig[Any]], budget: str | None, target: RunConfig[Any]
) -> dict[str, Any] | None:
    """The values of a space's parameters that give exactly the config ``target``; ``None`` if none are found.

    A space is a function that can be asked but not inverted. So its parameters are changed one after the other: to
    each of a categorical's choices, or to each number in the target that a range allows, and the value is kept that
    gives most of the target's fields. That finds whatever sets fields to values and chooses between branches; a space
    that computes its fields from its parameters may be missed, which costs the algorithm one known point.
    """
    wanted = {name: json.dumps(value) for name, value in flatten(target).items()}
    numbers = sorted({number for value in flatten(target).values() for number in _numbers(value)})

    def ask(values: dict[str, Any]) -> tuple[int, _Probe]:
        probe = _Probe(values, numbers)
        try:
            found = flatten(space.resolve(bases, probe, budget))
        except Exception:  # whatever a user's file raises: this point is not the one
            return -1, probe
        return sum(json.dumps(found.get(name)) == value for name, value in wanted.items()), probe

    def settle(fit: int, probe: _Probe, names: list[str]) -> tuple[int, _Probe]:
        for name in names:
            for value in probe.candidates.get(name, []):
                fits, other = ask({**probe.values, name: value})
                # a branch is as good as the best that can be answered in it
                fits, other = settle(fits, other, [name for name in other.candidates if name not in probe.candidates])
                if fits > fit:
                    fit, probe = fits, other
        return fit, probe

    fit, probe = ask({})
    for _ in range(ROUNDS):
        fit, probe = settle(fit, probe, list(probe.candidates))
        if fit == len(wanted):
            return probe.answers
    return None


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


class _Probe:
    """Stands for an Optuna trial: answers what it was told to, otherwise with the first that may be; keeps both."""

    number = 0

    def __init__(self, values: dict[str, Any], numbers: list[int | float]) -> None:
        self.values = values
        """What it was told, of other branches too."""
        self.answers: dict[str, Any] = {}
        self.candidates: dict[str, list[Any]] = {}
        self._numbers = numbers

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._answer(name, list(choices), choices[0])

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        usable = [int(value) for value in self._numbers if low <= value <= high and (value - low) % step == 0]
        return int(self._answer(name, usable, low))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        usable = [float(value) for value in self._numbers if low <= value <= high]
        if step is not None:  # off the grid by no more than rounding
            usable = [value for value in usable if abs((value - low) / step - round((value - low) / step)) < 1e-6]
        return float(self._answer(name, usable, low))

    def _answer(self, name: str, candidates: list[Any], otherwise: Any) -> Any:
        if name not in self.answers:
            self.candidates[name] = candidates
            told = self.values.get(name, otherwise)
            self.answers[name] = told if told in (*candidates, otherwise) else otherwise
        return self.answers[name]
