"""Which field of a file holds the text: the one that was named, the only possible one, or a question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from raytrain.data.reading import Reading
from raytrain.utils.errors import UserError


class _Missing:
    """What a field is that is not there."""


MISSING = _Missing()


def value_at(item: dict[str, Any], field: str) -> Any:
    """Return a field of an object, or ``MISSING``. A dotted name is a field's own name, or the way through objects."""
    if field in item:
        return item[field]
    value: Any = item
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


def text_field(kinds: Mapping[str, str], location: str, reading: Reading) -> str:
    """Return the field that must be the text: the first of the usual names, or the only one that can hold text.

    Args:
        kinds: field -> ``text``, ``null`` (nothing so far), ``number`` (or a date: never text), or ``object`` (a list
            or object, which may have text in it).

    Raises:
        UserError: there is no such field, or another one may be meant.
    """
    usual_names = reading.selection.fields
    for usual in usual_names:
        if usual in kinds:
            if kinds[usual] in ("text", "null"):
                return usual
            raise UserError(
                f"{location}: field {usual!r} holds no text; it has {listed(kinds)}: "
                "name the one that holds the text with --data-field"
            )
    possible = [name for name, kind in kinds.items() if kind != "number"]
    if reading.selection.take is None and len(possible) == 1 and kinds[possible[0]] == "text":
        return possible[0]
    what = "bio" if reading.selection.take == "bio" else "text"
    raise UserError(f"{location}: which field holds the {what}? It has {listed(kinds)}; name one with --data-field")


def settle_field(reading: Reading, name: str, field: str, kinds: Mapping[str, str]) -> None:
    """Make ``field`` the one that holds the text in a file, and say so if there are others that may.

    Raises:
        UserError: a file before has its text in another field.
    """
    reading.agree(field, name)
    others = [other for other, kind in kinds.items() if other != field and kind != "number"]
    if others:
        reading.report.guess(f"{name}: field {field!r} holds the text, not {listed(others)}")


def listed(fields: Iterable[str]) -> str:
    """Return names of fields for a message."""
    return ", ".join(fields) or "none"
