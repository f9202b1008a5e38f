"""What a search is, written down before it starts and read back to go on with it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Any, get_args

from raytrain.config import LOCATION, MODEL_NAMES, ModelName, RunConfig, differences, from_dict, to_dict
from raytrain.errors import UserError
from raytrain.goal import Goal, Objective
from raytrain.json_text import parse_json
from raytrain.resources import Device
from raytrain.space import Algorithm, Space, read_space
from raytrain.storage import NotFoundError, Storage, StorageError

PLAN = "search.json"
FORMAT = 1


@dataclass(frozen=True)
class Start:
    """A config that the search begins with."""

    reference: str
    """What ``--start-from`` called it."""
    config: RunConfig[Any]


@dataclass(frozen=True)
class Plan:
    """All that decides which trials a search has and what comes of each."""

    space: Space
    bases: dict[ModelName, RunConfig[Any]]
    """Model name -> the config that the space's fields change."""
    budget: str | None
    algorithm: Algorithm
    corpus: str
    """Digest of the corpus."""
    num_samples: int
    """Trials; the one thing that may be raised when the search is resumed."""
    seed: int
    workers: dict[str, Any]
    """The options that say how a trial runs: what they were, for a resumption that does not give others."""
    experiment: str
    corpus_path: str
    """Where the corpus was on the machine that started the search."""
    objective: Objective = "bound"
    min_kl: float = 0.0
    starts: tuple[Start, ...] = ()
    """Its first trials."""

    @property
    def goal(self) -> Goal:
        """What the search looks for."""
        return Goal(self.objective, self.min_kl)

    @property
    def early_stopping(self) -> bool:
        """A grid is run in full: its points are to be compared, not to be won; so is a search for a front, where
        a trial that is behind in one of two figures may be ahead in the other."""
        return self.algorithm != "grid" and self.objective != "pareto"

    def to_json(self) -> bytes:
        values: dict[str, Any] = {
            "format": FORMAT,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "space": {"name": self.space.name, "source": self.space.source},
            "bases": {model: to_dict(config) for model, config in self.bases.items()},
            "starts": [{"reference": start.reference, "config": to_dict(start.config)} for start in self.starts],
        }
        return json.dumps(values, indent=1).encode()

    def differences(self, other: Plan) -> list[str]:
        """What makes this another search than ``other``, in words."""
        parts = [
            f"{name} was {getattr(other, name)}, is {getattr(self, name)}"
            for name in ("budget", "algorithm", "seed", "experiment", "objective", "min_kl")
            if getattr(self, name) != getattr(other, name)
        ]
        if self.space.source != other.space.source:
            parts.append("the search space is another")
        if self.corpus != other.corpus:
            parts.append("the corpus is another")
        if [_placeless(start.config) for start in self.starts] != [_placeless(start.config) for start in other.starts]:
            parts.append("it started from other configs")
        if self.bases.keys() != other.bases.keys():
            parts.append(f"the model was {', '.join(other.bases)}, is {', '.join(self.bases)}")
            return parts
        for model, config in self.bases.items():
            # where the text lies is not what it is: its digest was compared
            before, after = to_dict(other.bases[model]), to_dict(config)
            parts += differences({**before, **{name: after[name] for name in LOCATION}}, after)
        return parts


def _placeless(config: RunConfig[Any]) -> dict[str, Any]:
    return {name: value for name, value in to_dict(config).items() if name not in LOCATION}


def read_values(storage: Storage) -> dict[str, Any] | None:
    """The plan of the search under ``storage`` as JSON; ``None`` where there is no search.

    Raises:
        UserError: the plan cannot be read, or is of a newer version.
    """
    try:
        values = parse_json(storage.read(PLAN))
    except NotFoundError:
        return None
    except StorageError as error:
        raise UserError(f"storage: {error}") from None
    except ValueError as error:
        raise UserError(f"{storage.uri(PLAN)} is not a search's plan: {error}") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(f"{storage.uri(PLAN)} is of another version of raytrain than this one")
    return values


def goal_of(values: dict[str, Any]) -> Goal:
    """What the search of a plan's JSON looks for, or of its MLflow run's parameters; one of old the lowest bound.

    Raises:
        UserError: there is no such goal.
    """
    objective: Any = values.get("objective") or "bound"
    min_kl = values.get("min_kl") or 0.0
    try:
        if objective not in get_args(Objective) or not 0 <= float(min_kl) < math.inf:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"a search cannot look for objective {objective!r} with min_kl {min_kl!r}") from None
    return Goal(objective, float(min_kl))


def _check_values(values: dict[str, Any]) -> None:
    """That a plan's JSON has what all that read it take for granted.

    Raises:
        ValueError: a field is of another type, or has a value that cannot be.
    """
    goal_of(values)
    texts = {"corpus": values["corpus"], "corpus_path": values["corpus_path"], "experiment": values["experiment"]}
    texts |= {"budget": values["budget"] or "", "space.name": values["space"]["name"]}
    texts |= {"space.source": values["space"]["source"]}
    starts = values.get("starts", [])
    texts |= {f"starts.{number}.reference": start["reference"] for number, start in enumerate(starts)}
    for name, text in texts.items():
        if not isinstance(text, str) or "\0" in text:
            raise ValueError(f"{name} is not a text")
        text.encode()
    if not re.fullmatch("[0-9a-f]{1,64}", values["corpus"]):
        raise ValueError("corpus is not a digest")
    if values["algorithm"] not in get_args(Algorithm):
        raise ValueError(f"algorithm is {values['algorithm']!r}")
    if type(values["num_samples"]) is not int or values["num_samples"] < 1 or type(values["seed"]) is not int:
        raise ValueError("num_samples and seed must be numbers of trials and of a seed")
    if not values["bases"] or not values["bases"].keys() <= set(MODEL_NAMES):
        raise ValueError("bases must be configs of models")
    if any(values["bases"][model]["model"]["name"] != model for model in values["bases"]):
        raise ValueError("bases must be configs of the models that they are named by")
    for name, value in values["workers"].items():
        if name == "device" and value not in get_args(Device):
            raise ValueError(f"workers.device is {value!r}")
        if name != "device" and value is not None and type(value) not in (int, float):
            raise ValueError(f"workers.{name} is not a number")


def read_plan(storage: Storage) -> Plan | None:
    """The plan of the search under ``storage``; ``None`` where there is no search. Runs its space's file.

    Raises:
        UserError: the plan cannot be read, or is of a newer version.
    """
    values = read_values(storage)
    if values is None:
        return None
    try:
        _check_values(values)
        values["space"] = read_space(values["space"]["name"], values["space"]["source"])
        values["bases"] = {model: from_dict(config) for model, config in values["bases"].items()}
        values["starts"] = tuple(
            Start(start["reference"], from_dict(start["config"])) for start in values.get("starts", [])
        )
        plan = Plan(**values)
        plan.space.budget(plan.budget)
        return plan
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{storage.uri(PLAN)} is not a search's plan: {error}") from None
