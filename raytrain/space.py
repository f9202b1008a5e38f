"""Search spaces: found by name, and checked before anything runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.config import RunConfig, override
from raytrain.errors import UserError

if TYPE_CHECKING:
    import optuna

Space = Callable[["optuna.Trial"], dict[str, Any]]
"""Draws values from an Optuna trial and returns the fields of the config that they set."""

CHECKED_POINTS = 64
"""Random points that a space is tried on: enough to enter the branches of a conditional space."""


def find_space(name: str) -> Path:
    """The file of the space ``name``: in search_spaces/ of the working directory, or as installed.

    Raises:
        UserError: there is none.
    """
    package = Path(__file__).parent
    # an editable install leaves the spaces beside the package, a wheel carries them inside
    folders = [Path("search_spaces"), package / "search_spaces", package.parent / "search_spaces"]
    for folder in folders:
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    raise UserError(f"no search space {name!r}: looked for {name}.py in {', '.join(map(str, folders))}")


def load_space(file: Path) -> Space:
    """The ``space`` function of a Python file.

    Raises:
        UserError: the file is missing, fails, or has no such function.
    """
    if not file.is_file():
        raise UserError(f"--space {file}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"raytrain_space_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--space {file}: not a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises is the user's mistake
        raise UserError(f"--space {file} cannot be loaded: {type(error).__name__}: {error}") from None
    space = getattr(module, "space", None)
    if not callable(space):
        raise UserError(f"--space {file} has no function space(trial)")
    checked: Space = space
    return checked


def check_space(space: Space, config: RunConfig[Any], file: Path, seed: int) -> list[RunConfig[Any]]:
    """Configs at random points of the space, each of which could be run.

    Raises:
        UserError: a field that the config does not have, or a value that it refuses.
    """
    import optuna

    from raytrain.models import build_empty

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    configs = []
    for _ in range(CHECKED_POINTS):
        try:
            configs.append(resolve(space, config, study.ask()))
            build_empty(configs[-1])
        except UserError as error:
            raise UserError(f"search space {file}: {error}") from None
        except Exception as error:  # whatever a user's file raises is the user's mistake
            raise UserError(f"search space {file}: {type(error).__name__}: {error}") from None
    return configs


def resolve(space: Space, config: RunConfig[Any], trial: optuna.Trial) -> RunConfig[Any]:
    """``config`` with the fields that ``space`` draws."""
    fields = space(trial)
    if not isinstance(fields, dict):
        raise UserError(f"space(trial) returned {type(fields).__name__}: must return a dict of config fields")
    return override(config, fields)
