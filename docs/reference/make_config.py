"""Write docs/reference/config.md from the dataclasses of the config.

    python docs/reference/make_config.py            # writes config.md
    python docs/reference/make_config.py --check    # exits 1 if config.md is stale

The string under each field comes from the source of its class (read with ``ast``), all else from the classes and the
presets themselves.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
import typing
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

# these lines and MODELS are all that knows where the config lives
from raytrain.config import models, presets, schema
from raytrain.utils.errors import UserError

MODELS = {name: spec.config for name, spec in models.MODELS.items()}
"""Model name -> the dataclass of its sizes."""

SECTIONS = {"objective": schema.ObjectiveConfig, "optimizer": schema.OptimizerConfig}
OUTPUT = Path(__file__).with_name("config.md")
COMMAND = "python docs/reference/make_config.py"


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config, as its source has it."""

    name: str
    type: str
    default: str
    meaning: str


def main() -> int:
    """Write the page, or compare it; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/reference/config.md from the dataclasses.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    options = parser.parse_args()
    page = make_page()
    if options.check:
        if OUTPUT.is_file() and OUTPUT.read_text(encoding="utf-8") == page:
            return 0
        print(f"{OUTPUT} is stale: run {COMMAND}", file=sys.stderr)
        return 1
    OUTPUT.write_text(page, encoding="utf-8")
    print(f"written: {OUTPUT}")
    return 0


# ----------------------------------------------------------------------------------------- the source


def read_fields(kind: type) -> list[Field]:
    """The fields of a dataclass in the order of its source; those that hold another section are left out."""
    strings, hints = _strings(_class_body(kind)), typing.get_type_hints(kind)
    fields = []
    for field in dataclasses.fields(kind):
        if field.name in ("model", *SECTIONS):
            continue
        default = "required" if field.default is dataclasses.MISSING else value_text(field.default)
        fields.append(Field(field.name, _type_text(hints[field.name]), default, strings.get(field.name, "")))
    undocumented = [field.name for field in fields if not field.meaning]
    if undocumented:
        raise SystemExit(f"{kind.__name__}: no string under {', '.join(undocumented)}")
    return fields


def read_variable(module: ModuleType, name: str) -> str:
    """The string under a variable of a module."""
    return _strings(ast.parse(inspect.getsource(module)).body)[name]


def _class_body(kind: type) -> list[ast.stmt]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return definition.body


def _strings(body: list[ast.stmt]) -> dict[str, str]:
    """Name -> the string that stands under its assignment, on one line."""
    found = {}
    for node, below in pairwise(body):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            text = " ".join(below.value.value.split())
            found.update({target.id: text for target in targets if isinstance(target, ast.Name)})
    return found


def _type_text(hint: Any) -> str:
    """A type as a user writes values of it."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        one = _type_text(typing.get_args(hint)[0])
        return one.replace("object", "objects", 1) if one.startswith("object") else f"{one}s"
    if dataclasses.is_dataclass(hint):
        return f"object ({', '.join(field.name for field in dataclasses.fields(hint))})"
    choices = [_type_text(arm) for arm in typing.get_args(hint) if arm is not type(None)]
    return " or ".join(choices) or {int: "integer", float: "number", str: "text", bool: "flag"}[hint]


# ---------------------------------------------------------------------------------------- the presets


def read_presets() -> dict[str, dict[str, Any]]:
    """Preset -> model -> its config, for every pair that there is."""
    found: dict[str, dict[str, Any]] = {}
    for name in presets.PRESET_NAMES:
        for model in MODELS:
            try:
                found.setdefault(name, {})[model] = presets.preset(name, model)
            except UserError:
                continue
    return found


def preset_cell(configs: dict[str, Any], section: str, field: Field) -> str:
    """What the models of a preset have in a field, where that is not the default."""
    texts = {}
    for model, config in configs.items():
        part = config if section == "run" else getattr(config, section)
        texts[model] = value_text(getattr(part, field.name))
    # the default where a model has it, otherwise what most models have
    usual = field.default if field.default in texts.values() else Counter(texts.values()).most_common(1)[0][0]
    parts = [] if usual == field.default else [usual]
    return ", ".join([*parts, *(f"{model}: {text}" for model, text in texts.items() if text != usual)])


# ------------------------------------------------------------------------------------------- the page


def make_page() -> str:
    """The whole page, in Markdown."""
    known = read_presets()
    parts = [
        f"<!-- generated by {COMMAND}: change the dataclasses or the presets, not this page -->",
        "# Config",
        "Every field of a run's config, with its type, its default and its value in each preset. An empty preset cell "
        "means the default; `model: value` is the value of that model alone.",
        "\n".join(f"- `{name}`: for {', '.join(configs)}" for name, configs in known.items()),
        "On the command line a field is an option with `-` for `_`: `--steps 1000`, `--objective.free-bits 2`, "
        "`--model.feature-maps 64 128`. In `config.json` and in search spaces it has the name shown here; sections are "
        'objects in `config.json` (`{"objective": {"alpha": 0.3}}`) and dotted names in search spaces '
        '(`"objective.alpha"`).',
        "## Run",
        _docstring(schema.RunConfig),
        section_table("run", "", read_fields(schema.RunConfig), known),
    ]
    for section, kind in SECTIONS.items():
        parts += [
            f"## {section.capitalize()}",
            _docstring(kind),
            section_table(section, f"{section}.", read_fields(kind), known),
        ]
    for model, kind in MODELS.items():
        own = {name: {model: configs[model]} for name, configs in known.items() if model in configs}
        parts += [
            f"## Model: {model}",
            _docstring(kind),
            section_table("model", "model.", read_fields(kind), own),
        ]
    budget = [[f"`{name}`", value_text(value)] for name, value in presets.SMALL_BUDGET.items()]
    parts += [
        "## Small budget",
        _escape(read_variable(presets, "SMALL_BUDGET")),
        markdown_table(["field", "value"], budget),
    ]
    return "\n\n".join(parts) + "\n"


def section_table(section: str, prefix: str, fields: list[Field], known: dict[str, dict[str, Any]]) -> str:
    """One row a field, one column a preset."""
    head = ["field", "type", "default", "meaning", *(f"`{name}`" for name in known)]
    rows = [
        [
            f"`{prefix}{field.name}`",
            field.type,
            field.default,
            _escape(field.meaning),
            *(preset_cell(configs, section, field) for configs in known.values()),
        ]
        for field in fields
    ]
    return markdown_table(head, rows)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def value_text(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return str(value) if isinstance(value, str) else json.dumps(value)


def _docstring(kind: type) -> str:
    return _escape(" ".join(inspect.cleandoc(kind.__doc__ or "").split()))


def _escape(text: str) -> str:
    """Text of a docstring as Markdown in a table: code in single quotes, no bars."""
    return re.sub("``([^`]+)``", r"`\1`", text).replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main())
