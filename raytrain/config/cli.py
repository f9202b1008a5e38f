"""Command lines made from dataclasses: model, preset and config file come first, then every field."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from raytrain.config.changes import Change
from raytrain.config.models import ModelName, find_model, known_models
from raytrain.config.plugins import load_plugins
from raytrain.config.presets import PRESET_NAMES, PresetName, for_source, preset
from raytrain.config.schedules import KL_SCHEDULES, LEARNING_RATE_SCHEDULES, ObjectiveConfig, OptimizerConfig
from raytrain.config.schema import RunConfig, flatten, from_dict, to_dict, with_steps
from raytrain.utils.errors import UserError
from raytrain.utils.files import expanded
from raytrain.utils.output import coloured
from raytrain.utils.validation import parse_json

OptionsT = TypeVar("OptionsT")


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that raises a UserError instead of printing a usage message."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The arguments that determine the defaults of all others."""

    model: ModelName
    preset: PresetName | None
    source: str | None
    file: Path | None


def parse_choice(command: str, arguments: list[str], implied: ModelName | None = None) -> tuple[Choice, list[str]]:
    """Read model, preset, source and config file from the command line; return them and the remaining arguments.

    ``implied`` is the model if the command line names none.

    Raises:
        UserError: there is no such model or preset, or both a preset and a config file are given.
    """
    parser = OneLineParser(prog=f"python -m {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config", type=Path)
    known, rest = parser.parse_known_args(arguments)
    models = ", ".join(known_models())
    if implied is not None and (not rest or rest[0].startswith("-")):
        rest = [implied, *rest]
    if not rest or rest[0].startswith("-"):
        if "-h" in rest or "--help" in rest:
            print(
                f"usage: python -m {command} MODEL [--preset NAME | --config FILE] [options]\n\n"
                f"models: {models}\npresets: {', '.join(PRESET_NAMES)}\n\n"
                f"python -m {command} MODEL --help lists the options of a model."
            )
            raise SystemExit(0)
        raise UserError(f"name the model first: python -m {command} MODEL, one of {models}")
    model, rest = rest[0], rest[1:]
    find_model(model)
    if known.preset is not None and known.preset not in PRESET_NAMES:
        raise UserError(f"unknown preset {known.preset!r}: --preset takes {', '.join(PRESET_NAMES)}")
    if known.preset is not None and known.config is not None:
        raise UserError("--preset and --config both choose the config to start from: give one of them")
    sources = OneLineParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    sources.add_argument("--data")
    source = sources.parse_known_args(rest)[0].data
    return Choice(model, known.preset, source, known.config), rest


def default_config(choice: Choice, fallback: PresetName) -> RunConfig[Any]:
    """Return the config that the command line's fields change: from a file, from a preset, or from ``fallback``.

    ``fallback`` only gives the sizes: the text is then the embedded corpus unless ``--data`` names another.

    Raises:
        UserError: the file cannot be read, is not a config, or is for another model.
    """
    if choice.file is not None:
        config = read_config(choice.file)
        if config.model_name != choice.model:
            raise UserError(f"{choice.file} is a config of {config.model_name}, not of {choice.model}")
        return config
    config = preset(choice.preset or fallback, choice.model)
    if choice.preset is None and config.data != "synthetic":
        config = dataclasses.replace(config, data="synthetic")
    return for_source(config, choice.source) if choice.source else config


def read_config(file: Path) -> RunConfig[Any]:
    """Read a run's ``config.json``.

    Raises:
        UserError: the file cannot be read or is not a config.
    """
    try:
        values = parse_json(expanded(file).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config {file}: {error}") from None
    return from_dict(values)


def parse_fields(
    command: str, options: OptionsT, config: RunConfig[Any], arguments: list[str]
) -> tuple[OptionsT, RunConfig[Any]]:
    """Return the command's options and the config, both changed by the rest of the command line.

    Raises:
        UserError: an option is unknown or a value is bad.
    """
    import tyro

    for owner in (type(options), RunConfig):
        show_plainly(owner)
    names = tyro.conf.arg(metavar=f"{{{','.join(KL_SCHEDULES)}}}")
    ObjectiveConfig.__annotations__["annealing"] = Annotated[str, names]
    names = tyro.conf.arg(metavar=f"{{{','.join(LEARNING_RATE_SCHEDULES)}}}")
    OptimizerConfig.__annotations__["schedule"] = Annotated[str, names]
    RunConfig.__annotations__["changes"] = Annotated[tuple[Change, ...], tyro.conf.Fixed, tyro.conf.Suppress]
    kind: Any = RunConfig[type(config.model)]  # type: ignore[misc]
    bare = tyro.conf.arg(name="", prefix_name=False)
    fields: list[Any] = [
        ("options", Annotated[type(options), bare], dataclasses.field(default_factory=lambda: options)),
        ("config", Annotated[kind, bare], dataclasses.field(default=dataclasses.replace(config, changes=()))),
    ]
    parsed: Any = parse_options(
        f"{command} {config.model_name}", dataclasses.make_dataclass("Command", fields), arguments
    )
    checked = from_dict(to_dict(parsed.config))  # from_dict also refuses non-finite numbers
    return parsed.options, _with_changes(checked, config)


def _with_changes(parsed: RunConfig[Any], config: RunConfig[Any]) -> RunConfig[Any]:
    """Return the command line's config with the changes of ``config``, its base, at the same fractions of its steps.

    Raises:
        UserError: the command line sets a field that these changes set.
    """
    before, after = flatten(config), flatten(parsed)
    for name in {change.field for change in config.changes}:
        if before[name] != after[name]:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option}: the config changes {name} during the run; edit its changes in a config file")
    changing = dataclasses.replace(parsed, steps=config.steps, changes=config.changes)
    return with_steps(changing, parsed.steps)


METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
"""Type of an option -> its metavar in the help."""


def show_plainly(options: type) -> None:
    """Let the help show ``INT`` for an optional field, not ``{None}|INT ... (default: None)``.

    The field's docstring states the default.
    """
    import tyro

    for owner in (get_origin(options) or options).__mro__:
        if not dataclasses.is_dataclass(owner):
            continue
        hints = get_type_hints(owner, include_extras=True)
        for name in inspect.get_annotations(owner):
            kinds = [kind for kind in get_args(hints[name]) if kind not in (type(None), ...)]
            optional, several = type(None) in get_args(hints[name]), ... in get_args(hints[name])
            if len(kinds) != 1 or not (optional or (several and getattr(owner, name, None) == ())):
                continue
            metavar = " ".join(METAVARS.get(part, name.upper()) for part in get_args(kinds[0]) or kinds)
            metavar += " ..." if several else ""
            owner.__annotations__[name] = Annotated[hints[name], tyro.conf.arg(metavar=metavar, help_behavior_hint="")]


def parse_options(
    command: str, options: type[OptionsT], arguments: list[str], default: OptionsT | None = None
) -> OptionsT:
    """Read the dataclass ``options`` from a command line; its ``tyro.conf.Positional`` fields are positional arguments.

    Raises:
        UserError: an option is unknown or a value is bad.
    """
    import tyro
    from tyro import _errors

    load_plugins()  # a mistake in one ends every command, --help included
    show_plainly(options)

    def refuse(event: _errors.ParseErrorEvent) -> None:
        raise UserError(_one_line(event))

    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with _errors.on_parse_error(refuse), coloured():
            parsed: Any = tyro.cli(
                options,
                prog=f"python -m {command}",
                args=arguments,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
                **given,
            )
    except ValueError as error:
        raise UserError(str(error)) from None
    checked: OptionsT = parsed
    return checked


def _one_line(event: Any) -> str:
    """Return one line for a tyro event. An event that only a later version of tyro has is given by its class name."""
    argument = getattr(event, "argument", None)
    name = ""
    if argument is not None:
        prefix = argument.extern_prefix
        name = "--" + f"{prefix}.{argument.field.extern_name}".lstrip(".").replace("_", "-")
    match type(event).__name__:
        case "UnrecognizedArgs":
            return f"unknown option {event.tokens[0]!r}: {event.prog} --help lists them"
        case "InvalidChoice":
            return f"{name} is {event.value!r}: must be one of {', '.join(event.choices)}"
        case "BadValue":
            return f"{name} needs a value" if event.offending_value is None else f"{name} takes no value"
        case "InstantiationFailure":
            return f"{name}: {event.message}".lstrip(": ")
        case "MissingArgs":
            missing = [context.arg.field.extern_name for context in event.missing_arguments]
            return f"missing: {', '.join(missing)}; {event.prog} --help lists the options"
        case kind:
            return f"{kind} in the options of {event.prog}; --help lists them"
