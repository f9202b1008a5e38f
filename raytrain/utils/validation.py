"""JSON from untrusted sources: parsed, and checked against the types that its readers expect."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

T = TypeVar("T")
DEEPEST = 100
"""Deepest nesting allowed: JSON nested more deeply might be read, but then neither copied nor written."""


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_nesting(value)
    return value


def check_nesting(value: Any, most: float = math.inf) -> None:
    """Make sure that ``value`` is nested at most ``DEEPEST`` deep and holds at most ``most`` values.

    Raises:
        ValueError: it is nested more deeply or holds more; that includes a value that refers to itself.
    """
    level, count = [value], 1
    for _ in range(DEEPEST):
        level = [item for holder in level if isinstance(holder, (dict, list)) for item in _members(holder)]
        count += len(level)
        if count > most:
            raise ValueError(f"it holds more than {most:,} values")
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _members(holder: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return holder.values() if isinstance(holder, dict) else holder


def validate_fields(kind: type[Any], values: Any, prefix: str = "") -> dict[str, Any]:
    """Return the members of the object ``values``, converted to the field types of the dataclass ``kind``.

    Raises:
        ValueError: it is not an object, or a member is unknown or of another type; the message names it.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'it'} must be an object, got {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    known = [item.name for item in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise ValueError(f"unknown field {prefix}{name}; known: {', '.join(known)}")
    return {name: validate_type(value, hints[name], prefix + name) for name, value in values.items()}


def validate_object(kind: type[T], values: Any, prefix: str = "") -> T:
    """Return a dataclass ``kind`` built from the object ``values``.

    Raises:
        ValueError: as for ``validate_fields``, or a field without a default is missing; the message names it.
    """
    fields = validate_fields(kind, values, prefix)
    check_complete(kind, fields, prefix)
    return kind(**fields)


def check_complete(kind: type[Any], fields: dict[str, Any], prefix: str = "") -> None:
    """Make sure that ``fields`` has every field of the dataclass ``kind`` that has no default.

    Raises:
        ValueError: one is missing; the message names it.
    """
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in fields:
            raise ValueError(f"{prefix.rstrip('.') or 'it'} has no {item.name}")


def validate_type(value: Any, hint: Any, name: str) -> Any:
    """Return ``value`` as the type ``hint``: JSON has no tuples, no separate integers, and no Literals.

    A value for a dataclass field must have been converted to the dataclass already.

    Raises:
        ValueError: it is of another type; the message calls it ``name``.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{name} is {value!r}: must be one of {', '.join(map(str, inner))}")
        return value
    if origin is types.UnionType:
        return (
            None if value is None else validate_type(value, next(arm for arm in inner if arm is not type(None)), name)
        )
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} is {value!r}: must be a list")
        return origin(validate_type(item, inner[0], name) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}: must be an object")
        return {
            validate_type(key, inner[0], name): validate_type(item, inner[1], f"{name}.{key}")
            for key, item in value.items()
        }
    if hint not in (bool, int, float, str):
        return value
    if hint is float and type(value) is int:
        return float(str(value))  # an integer too large for a float becomes infinity, as it does with an exponent
    if type(value) is not hint:
        raise ValueError(f"{name} is {value!r}: must be {'a number' if hint is float else hint.__name__}")
    if hint is int and abs(value) >= 2**63:
        raise ValueError(f"{name} is a number of {value.bit_length()} bits: must fit in 63")
    return value
