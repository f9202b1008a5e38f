"""Warm start of a search: configs that are tried first, from files, runs, earlier searches and the registry."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import optuna

from raytrain.config.cli import read_config
from raytrain.config.schema import LOCATION, RunConfig, from_dict, with_steps
from raytrain.runs.references import resolve
from raytrain.runs.trials import trial_of
from raytrain.search.plan import WarmStart
from raytrain.search.space import Space
from raytrain.storage.base import StorageError
from raytrain.utils.errors import UserError

FROM_THE_SEARCH = (
    *LOCATION,
    "encoder_from",
    "sampling",
    "pool_bytes",
    "length",
    "steps",
    "log_every",
    "evaluate_every",
    "evaluate_samples",
    "checkpoint_every",
)
"""Fields that a config takes over from the search that it joins: its text, the encoder that its trials start from, its
length and its validation samples. Schedules are fractions of the steps and adapt by themselves."""


def read_warm_start(reference: str, model: str, bases: dict[str, RunConfig[Any]]) -> WarmStart:
    """Return the config of ``model``, made to fit the search: see ``FROM_THE_SEARCH``.

    Args:
        reference: the value given to ``--warm-start``.
        model: a ``config.json``, or anything that ``runs.references`` resolves.
        bases: the configs of the search, by model.

    Raises:
        UserError: it names nothing, a config of a model that is not searched, or a config that does not fit.
    """
    params = None
    if model.endswith(".json"):
        found = read_config(Path(model))
    else:
        try:
            stored = resolve(model).stored
            found = from_dict(stored.config)
            trial = trial_of(stored.uri)
        except (UserError, StorageError) as error:
            raise UserError(f"--warm-start: {error}") from None
        if trial is not None and trial.on_the_space and all(map(_is_plain, trial.params.values())):
            params = trial.params
    base = bases.get(found.model_name)
    if base is None:
        raise UserError(f"--warm-start {reference} is a config of {found.model_name}; searched: {', '.join(bases)}")
    try:
        fitted = dataclasses.replace(
            with_steps(found, base.steps), **{name: getattr(base, name) for name in FROM_THE_SEARCH}
        )
    except ValueError as error:
        raise UserError(f"--warm-start {reference}: {error}") from None
    return WarmStart(reference=reference, config=fitted, params=params)


def _is_plain(value: Any) -> bool:
    """Return whether JSON can hold the value."""
    return not isinstance(value, float) or math.isfinite(value)


def point_of(
    start: WarmStart, space: Space, bases: dict[str, RunConfig[Any]], budget: str | None
) -> dict[str, Any] | None:
    """Return the parameters of the space that give exactly the config of a warm start; ``None`` if there are none.

    A space is a function: it can be evaluated, but not inverted. So only a config with recorded parameters, one of an
    earlier search's trial, can be a point of the space. Even then the result is ``None`` if this space lacks the
    recorded parameters, does not allow their values, or makes another config from them.
    """
    if start.params is None:
        return None
    trial = optuna.trial.FixedTrial(start.params)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about values out of range
            found = space.resolve(bases, trial, budget)
        # this refuses values that the distributions of this space do not allow
        optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=0.0)
    except Exception:  # anything that a user's file raises: this is not a point of its space
        return None
    return dict(trial.params) if found == start.config else None
