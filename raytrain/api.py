"""Training and searching from Python: the library behind ``python -m raytrain.train`` and ``raytrain.tune``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.config.cli import Choice, default_config
from raytrain.config.presets import full_size
from raytrain.config.schema import RunConfig, override
from raytrain.runs.records import check_name
from raytrain.runs.repeats import winner
from raytrain.runs.trials import Trial
from raytrain.runs.workspace import open_workspace
from raytrain.search.options import SearchOptions, SearchRequest
from raytrain.search.runner import run_and_finish
from raytrain.search.setup import new_search
from raytrain.search.space import load_space
from raytrain.training import launch
from raytrain.training.launch import TrainedRun
from raytrain.training.options import TrainOptions
from raytrain.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A search that has reached its end."""

    name: str
    location: str
    """Folder or s3:// address of its trials and records."""
    trials: list[Trial]
    """Every trial, by number, with its config, status and metrics."""
    best: Trial | None
    """The winner, confirmed if that was asked for; ``None`` if none met the search objective's constraint."""


def train(config: RunConfig[Any] | str, **settings: Any) -> TrainedRun:
    """Train one run on a group of Ray Train workers, as ``python -m raytrain.train`` does.

    Args:
        config: a run's config, or the name of a model: its preset for this kind of machine.
        settings: fields of ``raytrain.training.options.TrainOptions`` (``name``, ``workers``, ``storage``, ...); all
            others are fields of the config, nested ones with two underscores: ``steps=500``, ``model__latent=16``.

    Returns:
        The run, with its outcome; a known name with the same config is resumed, or returned if it has ended.

    Raises:
        UserError: a setting that cannot be, or a run that failed, with its cause.
    """
    options, changes = _split(TrainOptions, settings)
    small, large = (override(each, changes) for each in _configs(config, changes.get("data")))
    if options.name is not None:
        check_name(options.name)
    return launch.train(small, large, options, open_workspace(small, options.storage))


def tune(config: RunConfig[Any] | str, *, space: str | Path | None = None, **settings: Any) -> SearchResult | None:
    """Search for the best settings of a model, as ``python -m raytrain.tune`` does.

    Args:
        config: the config that the space's fields change, or the name of a model: its preset for this kind of machine.
        space: a Python file, or a name in ``search_spaces/``; by default that of the model.
        settings: fields of ``raytrain.search.options.SearchOptions`` (``num_samples``, ``min_used``, ``storage``, ...);
            all others are fields of the config, nested ones with two underscores: ``optimizer__clip=5.0``.

    Returns:
        The search with every trial; ``None`` for a dry run.

    Raises:
        UserError: a setting, a space or a cluster that cannot be used.
    """
    options, changes = _split(SearchOptions, settings)
    small, large = (override(each, changes) for each in _configs(config, changes.get("data")))
    found = load_space(str(space or small.model_name))
    if found.models and found.models != (small.model_name,):
        raise UserError(
            f"search space {found.name} is for {', '.join(found.models)}, not for {small.model_name} alone: "
            "python -m raytrain.tune runs a space of several models"
        )
    size = f"config of {small.model_name}" if isinstance(config, RunConfig) else f"preset of {small.model_name}"
    search = new_search(
        *(
            SearchRequest(options=options, space=found, bases={each.model_name: each}, size=size)
            for each in (small, large)
        )
    )
    if search is None:
        return None
    trials = run_and_finish(search)
    best = winner(trials, search.plan.search_objective, search.plan.confirm)
    return SearchResult(name=search.name, location=search.location.uri(), trials=trials, best=best)


def _configs(config: RunConfig[Any] | str, source: str | None) -> tuple[RunConfig[Any], RunConfig[Any]]:
    """Return the config for machines without GPUs and the one for machines with GPUs."""
    if isinstance(config, RunConfig):
        return config, config
    choice = Choice(config, None, source, None)
    return default_config(choice, "laptop"), default_config(choice, full_size(config))


def _split(options: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Tell options of the command from fields of the config."""
    names = {field.name for field in dataclasses.fields(options)}
    chosen = {name: value for name, value in settings.items() if name in names}
    if {"resume", "best_of", "ablate"} & chosen.keys():
        raise UserError("resume, best_of and ablate are options of the command line; to resume, give a known name")
    changes = {name.replace("__", "."): value for name, value in settings.items() if name not in names}
    return options(**chosen), changes
