"""The field of a file that holds the text: the named one, or the only candidate; otherwise the user is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from raytrain.data.reading import Reading
from raytrain.utils.errors import UserError


class _Missing:
    """Value of a field that is missing."""


MISSING = _Missing()


def value_at(item: dict[str, Any], field: str) -> Any:
    """Return a field of an object, or ``MISSING``. A dotted name is a field's full name, or a path through objects."""
    if field in item:
        return item[field]
    value: Any = item
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


def text_field(kinds: Mapping[str, str], location: str, reading: Reading) -> str:
    """Return the field that must hold the text: the first of the usual names, or the only one that can hold text.

    Args:
        kinds: field -> ``text``, ``null`` (nothing so far), ``number`` (or a date: never text), or ``object`` (a list
            or object, which may contain text).
        location: the place in the source, for messages.
        reading: what is taken, and its report.

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
    """Fix ``field`` as the one that holds the text in a file, and report it if other fields may hold text.

    Raises:
        UserError: an earlier file has its text in another field.
    """
    reading.agree(field, name)
    others = [other for other, kind in kinds.items() if other != field and kind != "number"]
    if others:
        reading.report.guess(f"{name}: field {field!r} holds the text, not {listed(others)}")


def listed(fields: Iterable[str]) -> str:
    """Return field names as a list for a message."""
    return ", ".join(fields) or "none"
