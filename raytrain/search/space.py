"""Search spaces: found by name, loaded, and checked before anything runs.

A search space is a Python module with a function ``space(trial)`` that draws values from an Optuna trial
and returns fields of the config; field ``model`` chooses the model. It may also define

``MODELS``
    the models that it searches; without it, the model that the command names;
``PRESET``
    the preset that its trials change;
``BUDGETS``
    budget name -> fields of every config, the first budget being the default; the function is then
    ``space(trial, budget)`` and receives the name;
``ALGORITHM``
    its algorithm unless ``--algorithm`` names another: ``tpe``, ``gp``, ``random``, ``grid``, ``pbt`` or a
    registered one;
``START``
    values by parameter: the point of the first trial, unless the search is a grid or has warm starts. Give it if a
    good point is known, since an algorithm's first trials are drawn at random.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import raytrain
from raytrain.config.models import ModelName, known_models
from raytrain.config.presets import PRESET_NAMES, PresetName
from raytrain.config.schema import RunConfig, override
from raytrain.utils.errors import UserError
from raytrain.utils.files import expanded

GRID = "grid"
"""The algorithm that tries every point of a space once. ``search.algorithms.SAMPLERS`` holds the samplers."""
PBT = "pbt"
"""The algorithm that changes the points of a population during training: see ``search.population``."""
CHECKED_POINTS = 64
"""Random points at which a space is checked: enough to reach the branches of a conditional space."""
LARGEST_GRID = 10_000


@dataclass(frozen=True, kw_only=True)
class Space:
    """A loaded search space."""

    name: str
    """Stem of its file name, by which reports find its searches."""
    source: str
    """The text of the file."""
    draw: Callable[..., dict[str, Any]]
    models: tuple[ModelName, ...]
    """Empty if the command names the model."""
    preset: PresetName | None
    budgets: dict[str, dict[str, Any]]
    algorithm: str
    """Not checked: it may be registered later."""
    start: dict[str, Any]
    """Empty if no good starting point is known."""

    def budget(self, name: str | None) -> str | None:
        """Return the budget ``name``, or the default one; ``None`` for a space without budgets.

        Raises:
            UserError: there is no such budget.
        """
        if name is None:
            return next(iter(self.budgets), None)
        if name not in self.budgets:
            known = ", ".join(self.budgets) or "none"
            raise UserError(f"--budget {name}: search space {self.name} has no such budget; it has {known}")
        return name

    def resolve(self, bases: dict[str, RunConfig[Any]], trial: Any, budget: str | None) -> RunConfig[Any]:
        """Return the config of a trial: its model's config in ``bases``, with the fields that the space draws.

        Raises:
            UserError: a field or model is unknown, or a value is refused.
            Exception: anything that the file of the space raises.
        """
        fields = self.draw(trial, budget) if self.budgets else self.draw(trial)
        if not isinstance(fields, dict):
            raise UserError(f"space(trial) returned {type(fields).__name__}: must return a dict of config fields")
        model = fields.get("model", next(iter(bases)))
        if model not in bases:
            raise UserError(f"space(trial) chose model {model!r}: MODELS names {', '.join(bases)}")
        return override(bases[model], {name: value for name, value in fields.items() if name != "model"})


def find_space(name: str) -> Path:
    """Return the file of the space ``name``: in search_spaces/ of the working directory, or else as installed.

    Raises:
        UserError: there is none.
    """
    package = Path(raytrain.__file__).parent
    # an editable install has the spaces beside the package, a wheel has them inside it
    folders = [Path("search_spaces"), package / "search_spaces", package.parent / "search_spaces"]
    for folder in folders:
        if os.path.isfile(folder / f"{name}.py"):
            return folder / f"{name}.py"
    raise UserError(f"no search space {name!r}: looked for {name}.py in {', '.join(map(str, folders))}")


def load_space(name: str) -> Space:
    """Load the space in a Python file, or the one that ``find_space`` finds under a bare name.

    Raises:
        UserError: there is none, its file fails, or it defines something that a space must not define.
    """
    file = expanded(name)
    if file.suffix != ".py":
        file = find_space(name)
    try:
        return read_space(file.stem, file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"--space {file}: there is no such file") from None
    except OSError as error:
        raise UserError(f"--space {file}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise UserError(f"--space {file}: not a Python file") from None


def read_space(name: str, source: str) -> Space:
    """Load the space that ``source`` defines. This runs the source: pass only code that you trust.

    Raises:
        UserError: it fails, or defines something that a space must not define.
    """
    module = types.ModuleType(f"raytrain_space_{name}")
    sys.modules[module.__name__] = module  # dataclasses look up their module there
    try:
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # anything that a user's file raises is the user's mistake
        raise UserError(f"search space {name} cannot be loaded: {type(error).__name__}: {error}") from None
    values = vars(module)
    if not callable(values.get("space")):
        raise UserError(f"search space {name} has no function space(trial)")
    budgets = values.get("BUDGETS", {})
    if not isinstance(budgets, dict) or not all(isinstance(fields, dict) for fields in budgets.values()):
        raise UserError(f"search space {name}: BUDGETS must be a dict of budget names to dicts of config fields")
    models = values.get("MODELS", ())
    if not isinstance(models, (list, tuple)):
        raise UserError(f"search space {name}: MODELS must be a list of names of models")
    start = values.get("START", {})
    if not isinstance(start, dict):
        raise UserError(f"search space {name}: START must be a dict of the values of its parameters")
    preset = values.get("PRESET")
    return Space(
        name=name,
        source=source,
        draw=values["space"],
        models=tuple(_chosen(name, "MODELS", model, tuple(known_models())) for model in models),
        preset=None if preset is None else _chosen(name, "PRESET", preset, PRESET_NAMES),
        budgets=budgets,
        algorithm=_text(name, "ALGORITHM", values.get("ALGORITHM", "tpe")),
        start=start,
    )


def _chosen(space: str, name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise UserError(f"search space {space}: {name} has {value!r}: must be one of {', '.join(allowed)}")
    return value


def _text(space: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"search space {space}: {name} has {value!r}: must be a name")
    return value


def check_choices(distributions: Mapping[str, Any]) -> None:
    """Make sure that every choice of a categorical parameter survives a round trip through JSON.

    A tuple would become a list, for example, and the search could not be resumed.

    Raises:
        UserError: a choice does not; the message names the parameter.
    """
    for name, kind in distributions.items():
        for choice in getattr(kind, "choices", ()):
            plain = choice is None or isinstance(choice, (bool, int, float, str))
            if not plain or choice != choice:  # NaN is not equal to itself
                raise UserError(
                    f"{name!r} has the choice {choice!r}: give texts, numbers, True, False or None, which a record can "
                    "hold, and look the value up: {'small': (1, 8)}[trial.suggest_categorical(...)]"
                )


def check_space(
    space: Space, bases: dict[str, RunConfig[Any]], budget: str | None, algorithm: str, seed: int
) -> list[RunConfig[Any]]:
    """Return configs at points of the space, all of which can be run: every point of a grid, or else random ones.

    The first of the random ones is the space's start.

    Raises:
        UserError: a field is unknown, a value is refused, the start is not a point of the space, or a grid cannot be
            enumerated.
    """
    import optuna

    from raytrain.models import model_size

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    configs = []
    try:
        if algorithm == GRID:
            trials: Iterator[Any] = (optuna.trial.FixedTrial(point) for point in grid(space, budget))
        else:
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
            study.enqueue_trial(space.start)
            trials = (study.ask() for _ in range(CHECKED_POINTS))
        for trial in trials:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # Optuna's, about choices that are refused below
                configs.append(space.resolve(bases, trial, budget))
            check_choices(trial.distributions)
            if algorithm != GRID and len(configs) == 1:
                if strange := space.start.keys() - trial.params.keys():
                    raise UserError(f"START has {min(strange)!r}, for which space(trial) does not ask there")
                kinds = {name: trial.distributions[name] for name in space.start}
                try:
                    optuna.trial.create_trial(params=space.start, distributions=kinds, value=0.0)
                except (TypeError, ValueError) as error:
                    raise UserError(f"START: {error}") from None
            model_size(configs[-1])  # which builds it
    except UserError as error:
        raise UserError(f"search space {space.name}: {error}") from None
    except (Exception, SystemExit) as error:  # anything that a user's file raises is the user's mistake
        raise UserError(f"search space {space.name}: {type(error).__name__}: {error}") from None
    return configs


# ---------------------------------------------------------------------------------------------- grid


def check_length(name: str, count: int) -> None:
    """Refuse a parameter of a grid that has no values, or too many to try.

    Raises:
        UserError: the number of values is 0 or too large; the message names the parameter.
    """
    if count < 1:
        raise UserError(f"a grid needs a value for {name!r}: its range is empty")
    if count > LARGEST_GRID:
        raise UserError(f"the grid has more than {LARGEST_GRID:,} points: {name!r} alone has {count:,}")


class GridTrial:
    """Stand-in for an Optuna trial: answers from a list of choices, and extends the list at every new question.

    ``grid`` evaluates the space once for each point, and advances the list like an odometer.
    """

    def __init__(self, wheels: list[tuple[int, int]]) -> None:
        self.wheels = wheels
        """(index of the answer, number of answers) for each question so far."""
        self.point: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._answer(name, list(choices))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        if log:
            raise UserError(f"a grid cannot have {name!r} on a logarithmic scale: use suggest_categorical")
        return int(self._answer(name, range(low, high + 1, step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if step is None or log:
            raise UserError(f"a grid needs a step for {name!r}: use suggest_categorical, or suggest_float with step")
        # in decimals, like Optuna: as floats, three steps of 0.2 would exceed 0.6
        start, width = Decimal(str(low)), Decimal(str(step))
        count = int((Decimal(str(high)) - start) / width) + 1
        check_length(name, count)
        return float(self._answer(name, [float(start + index * width) for index in range(count)]))

    def _answer(self, name: str, choices: Sequence[Any]) -> Any:
        if name not in self.point:
            check_length(name, len(choices))
            position = len(self.point)
            if position == len(self.wheels):
                self.wheels.append((0, len(choices)))
            self.point[name] = choices[self.wheels[position][0]]
        return self.point[name]


def grid(space: Space, budget: str | None) -> list[dict[str, Any]]:
    """Return every point of a space, as the values of its parameters; the last parameter varies fastest.

    Raises:
        UserError: a parameter has no finite number of values, or there are too many points.
    """
    points = []
    wheels: list[tuple[int, int]] = []
    while True:
        trial = GridTrial(wheels)
        if space.budgets:
            space.draw(trial, budget)
        else:
            space.draw(trial)
        points.append(trial.point)
        if len(points) > LARGEST_GRID:
            raise UserError(f"the grid has more than {LARGEST_GRID:,} points")
        # the questions after the wheel that turns may differ now, so they are asked again
        while wheels and wheels[-1][0] + 1 == wheels[-1][1]:
            wheels.pop()
        if not wheels:
            return points
        answer, count = wheels[-1]
        wheels[-1] = (answer + 1, count)
