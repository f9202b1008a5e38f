"""Plan of a search: recorded before it starts, and read back to resume it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import optuna

from raytrain.config.schema import LOCATION, RunConfig, differences, from_dict, to_dict
from raytrain.metrics import Objective, SearchObjective
from raytrain.models import num_parameters
from raytrain.runs.records import FORMAT, PLAN, read_values, search_objective_of
from raytrain.runs.repeats import Confirm, confirm_of
from raytrain.runs.trials import Trial
from raytrain.search.space import PBT, Space, grid, read_space
from raytrain.storage.base import Storage
from raytrain.utils.errors import UserError, check_text
from raytrain.utils.validation import validate_fields, validate_type

SETTLED = (
    "budget",
    "algorithm",
    "parts",
    "scheduler",
    "seed",
    "experiment",
    "objective",
    "min_used",
    "max_parameters",
    "ablates",
)
"""Fields in which two plans of one search do not differ."""


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """A config that the search starts with."""

    reference: str
    """The argument of ``--warm-start`` that names it."""
    config: RunConfig[Any]
    params: dict[str, Any] | None = None
    """The parameters with which an earlier search drew it; ``None`` if they are not recorded."""


@dataclass(frozen=True, kw_only=True)
class EarlierSearch:
    """An earlier search, and what the sampler knows about it."""

    reference: str
    """The argument of ``--warm-start`` that names it, or its MLflow experiment."""
    name: str
    note: str
    """Note printed about it: how many trials are known, and why others are left out."""
    trials: tuple[Trial, ...]
    """Its trials that the sampler knows, as recorded then, each at its point of this search's space."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that determines which trials a search has, and their results."""

    identity: str
    """The result of ``new_identity`` when the search was begun; unique, whatever the search's name."""
    space: Space
    bases: dict[str, RunConfig[Any]]
    """Model name -> the config that the space's fields change."""
    budget: str | None
    algorithm: str
    corpus: str
    """Digest of the corpus."""
    num_samples: int
    """Number of trials, excluding those that confirm. It may be raised on resuming, unless the trials are parts of a
    population."""
    seed: int
    workers: dict[str, Any]
    """The options that affect how trials run, as they were given: the defaults for resuming."""
    experiment: str
    corpus_path: str
    """Where the corpus was on the machine that started the search."""
    scheduler: str = "asha"
    objective: Objective = "bound"
    min_used: float = 0.0
    warm_starts: tuple[WarmStart, ...] = ()
    """The configs of its first trials."""
    earlier: tuple[EarlierSearch, ...] = ()
    """The searches whose results its sampler starts with; they are not trials of its own."""
    max_parameters: int | None = None
    """Most parameters that a model may have to be trained; ``None`` without a limit."""
    parts: int = 0
    """Parts in which each member of a population is trained, each part being a trial; 0 without a population."""
    ablates: str = ""
    """Name of the search whose winner it ablates; empty if it is not an ablation."""
    confirm: Confirm | None = None
    """How its winner is confirmed, if at all; may be given or changed when the search is resumed."""

    @property
    def members(self) -> int:
        """Most of its own trials that can run at once: the members of a population, or else all trials."""
        return self.num_samples // max(1, self.parts)

    @property
    def search_objective(self) -> SearchObjective:
        """Return the objective, with its constraint."""
        return SearchObjective(self.objective, self.min_used)

    @property
    def references(self) -> tuple[str, ...]:
        """Return the arguments of ``--warm-start``, those that name searches first."""
        found = [*(each.reference for each in self.earlier), *(start.reference for start in self.warm_starts)]
        return tuple(dict.fromkeys(found))

    def fits(self, config: RunConfig[Any]) -> bool:
        """Return whether a model of this config may be trained."""
        return self.max_parameters is None or num_parameters(config) <= self.max_parameters

    def to_json(self) -> bytes:
        values: dict[str, Any] = {
            "format": FORMAT,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "space": {"name": self.space.name, "source": self.space.source},
            "bases": {model: to_dict(config) for model, config in self.bases.items()},
            "warm_starts": [
                {"reference": start.reference, "config": to_dict(start.config), "params": start.params}
                for start in self.warm_starts
            ],
            "earlier": [
                {
                    "reference": each.reference,
                    "name": each.name,
                    "note": each.note,
                    "trials": [json.loads(trial.to_json()) for trial in each.trials],
                }
                for each in self.earlier
            ],
            "confirm": None if self.confirm is None else dataclasses.asdict(self.confirm),
        }
        return json.dumps(values, indent=1).encode()

    def differences(self, other: Plan) -> list[str]:
        """Return the differences between this search and ``other``, as text."""
        parts = [
            f"{name} was {getattr(other, name)}, is {getattr(self, name)}"
            for name in SETTLED
            if getattr(self, name) != getattr(other, name)
        ]
        if self.parts and self.members != other.members:
            parts.append(f"the population had {other.members} members, has {self.members}")
        if self.space.source != other.space.source:
            parts.append("the search space is another")
        if self.corpus != other.corpus:
            parts.append("the corpus is another")
        if [_without_location(start.config) for start in self.warm_starts] != [
            _without_location(start.config) for start in other.warm_starts
        ]:
            parts.append("it started from other configs")
        # how those searches have changed since does not matter: this one keeps the results that it started with
        if {each.reference for each in self.earlier} != {each.reference for each in other.earlier}:
            parts.append("it knows other searches")
        if self.bases.keys() != other.bases.keys():
            parts.append(f"the model was {', '.join(other.bases)}, is {', '.join(self.bases)}")
            return parts
        for model, config in self.bases.items():
            # the location of the text does not matter: its digest was compared
            before, after = to_dict(other.bases[model]), to_dict(config)
            parts += differences({**before, **{name: after[name] for name in LOCATION}}, after)
        return parts


def _without_location(config: RunConfig[Any]) -> dict[str, Any]:
    return {name: value for name, value in to_dict(config).items() if name not in LOCATION}


def grid_points(
    space: Space, bases: dict[str, RunConfig[Any]], budget: str | None, max_parameters: int | None
) -> list[dict[str, Any]]:
    """Return the points of a grid whose models have at most ``max_parameters``, as the values of its parameters.

    Points from which the space cannot make a config are kept: their trials report the reason.
    """
    points = grid(space, budget)
    if max_parameters is None:
        return points

    def larger(point: dict[str, Any]) -> bool:
        with contextlib.suppress(Exception, SystemExit):  # whatever a user's file raises
            return num_parameters(space.resolve(bases, optuna.trial.FixedTrial(point), budget)) > max_parameters
        return False

    return [point for point in points if not larger(point)]


def _check(plan: Plan) -> None:
    """Check the values of a plan on which its readers rely.

    Raises:
        ValueError, UserError: a value is invalid; the message names it.
    """
    texts = {"experiment": plan.experiment, "space.name": plan.space.name, "ablates": plan.ablates}
    texts |= {f"warm_starts.{number}.reference": start.reference for number, start in enumerate(plan.warm_starts)}
    for number, each in enumerate(plan.earlier):
        texts |= {f"earlier.{number}.{name}": getattr(each, name) for name in ("reference", "name", "note")}
        if not all(trial.ended for trial in each.trials):
            raise ValueError(f"earlier.{number}.trials has one that has not ended")
    for name, text in texts.items():
        check_text(text, name)
    if plan.num_samples < 1:
        raise ValueError(f"num_samples is {plan.num_samples}")
    if plan.parts < 0 or (plan.algorithm == PBT) != (plan.parts > 0) or (plan.parts and plan.num_samples % plan.parts):
        raise ValueError(f"parts is {plan.parts}, with {plan.num_samples} trials of {plan.algorithm}")
    if plan.parts and any(config.steps % plan.parts for config in plan.bases.values()):
        raise ValueError(f"parts is {plan.parts}, of other than equally many steps")
    if plan.max_parameters is not None and plan.max_parameters < 1:
        raise ValueError(f"max_parameters is {plan.max_parameters}")
    if not plan.bases or any(config.model_name != model for model, config in plan.bases.items()):
        raise ValueError("bases must be configs of the models that they are named by")
    plan.space.budget(plan.budget)


def read_plan(storage: Storage, compared_with: Space | None = None) -> Plan | None:
    """Return the plan of the search under ``storage``; ``None`` if there is no search.

    Without ``compared_with``, this runs the space file in the storage. Do so only if the user has asked to resume that
    search. To compare plans, pass the user's space. The plan gets that space if the stored file is the same, and
    otherwise a space that draws nothing.

    Raises:
        UserError: the plan cannot be read, or has a newer version.
    """
    values = read_values(storage)
    if values is None:
        return None
    try:
        search_objective_of(values)
        space = {name: validate_type(values["space"][name], str, f"space.{name}") for name in ("name", "source")}
        made = {
            "space": read_space(**space) if compared_with is None else _unread(compared_with, values, **space),
            "bases": {model: from_dict(config) for model, config in values["bases"].items()},
            "warm_starts": [
                WarmStart(**validate_fields(WarmStart, {**start, "config": from_dict(start["config"])}))
                for start in values.get("warm_starts", [])
            ],
            "earlier": [_earlier(each) for each in values.get("earlier", [])],
            "confirm": confirm_of(values),
        }
        plan = Plan(**validate_fields(Plan, {**values, **made}))
        _check(plan)
        return plan
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{storage.uri(PLAN)} is not a search's plan: {error}") from None


def _earlier(values: dict[str, Any]) -> EarlierSearch:
    """Return an earlier search from a plan's JSON.

    Raises:
        ValueError, TypeError, KeyError: the JSON is something else.
    """
    trials = [Trial.from_json(json.dumps(trial).encode()) for trial in values["trials"]]
    return EarlierSearch(**validate_fields(EarlierSearch, {**values, "trials": trials}))


def _unread(own: Space, values: dict[str, Any], name: str, source: str) -> Space:
    """Return the space of a stored plan without running its file: ``own`` if its source is the same."""
    if source == own.source:
        return own
    budgets: dict[str, dict[str, Any]] = {} if values.get("budget") is None else {str(values["budget"]): {}}
    return Space(
        name=name,
        source=source,
        draw=lambda trial: {},
        models=(),
        preset=None,
        budgets=budgets,
        algorithm="random",
        start={},
    )
