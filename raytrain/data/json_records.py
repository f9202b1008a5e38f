"""JSON records: an object per line, an array of objects, a single object, or the scripts of an X archive."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from raytrain.data import posts
from raytrain.data.fields import MISSING, listed, settle_field, text_field, value_at
from raytrain.data.reading import Reading, Record, languages, text_bytes
from raytrain.data.unpacking import Content
from raytrain.utils.errors import UserError
from raytrain.utils.validation import check_nesting, parse_json

ARCHIVE = re.compile(rb"\s*(?:window\.YTD\.(\w+?)\.part\d+|Grailbird\.data\.(tweets)\w*)\s*=\s*")
"""Start of a script of an X archive, with the name of its content."""
LARGEST = 1 << 30
"""Most bytes of an object that makes up a whole file."""
_OBJECTS_LOOKED_AT = 100
"""Objects that are inspected before their form, or their text field, is chosen."""
_CHUNK = 1 << 20
Located = tuple[str, bytes, dict[str, Any]]
"""Location, line and object; the line is empty if the object has no line of its own."""


class NoPostsError(Exception):
    """A file that was found, rather than named, contains no posts."""


def json_lines(
    lines: Iterator[bytes], content: Content, reading: Reading, first_lines: Iterator[bytes] | None = None
) -> Iterator[bytes]:
    """Yield the texts of the objects in ``lines``.

    Args:
        lines: the lines.
        content: the file they are from.
        reading: what is taken, and its report.
        first_lines: lines from the start of the file, if ``lines`` are from a later part of it: they determine the form
            of the objects, and the field that holds the text.
    """
    objects = _objects(lines, content.name, content.lines_before)
    return _texts(objects, content, reading, None if first_lines is None else _objects(first_lines, content.name))


def json_document(content: Content, reading: Reading) -> Iterator[bytes]:
    """Yield the texts of a file that is one array or one object.

    Raises:
        UserError: it is neither, or too large for a single object.
    """
    return _texts(_document_objects(content), content, reading)


def archive_script(content: Content, reading: Reading) -> Iterator[bytes]:
    """Yield the posts, or the bio, of a script of an X archive.

    Raises:
        NoPostsError: it holds something else.
    """
    part = archive_part(content)
    reading.enter_archive(content.name.rpartition("/")[0])
    records = None if part is None else posts.archive_records(array_items(content), part, reading)
    if records is None:
        what = "bio" if reading.bios else "posts"
        raise NoPostsError(f"no {what} in it" if part is None else f"{part} of an X archive, no {what}")
    reading.report.formats["X archive"] += 1
    reading.report.guess(f"{content.name}: {part} of an X archive")
    return reading.selected(records)


def archive_part(content: Content) -> str | None:
    """Return what a script of an X archive holds, such as ``tweets``; None if it is not such a script."""
    with content.open() as file:
        match = ARCHIVE.match(file.read(_CHUNK).removeprefix(codecs.BOM_UTF8))
    return None if match is None else (match[1] or match[2]).decode()


def array_items(content: Content) -> Iterator[Any]:
    """Yield the items of the first array in a file one by one, so that memory does not grow with the array.

    Raises:
        UserError: the file is not JSON.
    """
    decoder = json.JSONDecoder()
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    with content.open() as file:
        buffer = decode(file.read(_CHUNK))
        position, number, complete = buffer.find("[") + 1, 0, not buffer
        while True:
            position = _next_item(buffer, position)
            if buffer.startswith("]", position):
                return
            try:
                item, position = decoder.raw_decode(buffer, position)
            except (ValueError, RecursionError) as error:
                if complete or isinstance(error, RecursionError):
                    raise UserError(f"{content.name} item {number + 1} is not JSON: {error}") from None
                chunk = file.read(max(_CHUNK, len(buffer) - position))
                complete = not chunk
                buffer, position = buffer[position:] + decode(chunk, complete), 0
                continue
            number += 1
            try:
                check_nesting(item)
            except ValueError as error:
                raise UserError(f"{content.name} item {number}: {error}") from None
            yield item


_BETWEEN = re.compile(r"[\s,]*")


def _next_item(buffer: str, position: int) -> int:
    match = _BETWEEN.match(buffer, position)
    return match.end() if match else position


def _document_objects(content: Content) -> Iterator[Located]:
    with content.open() as file:
        head = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
        if not head.startswith(b"["):
            rest = file.read(LARGEST)
            if len(rest) == LARGEST:
                raise UserError(f"{content.name} is one object of more than {LARGEST:,} bytes: write an object a line")
            try:
                item = parse_json((head + rest).decode("utf-8", "surrogateescape"))
            except ValueError as error:
                raise UserError(f"{content.name} is not JSON: {error}") from None
            if not isinstance(item, dict):
                raise UserError(f"{content.name} is not a JSON object or an array of objects")
            yield content.name, b"", item
            return
    for number, item in enumerate(array_items(content), start=1):
        if not isinstance(item, dict):
            raise UserError(f"{content.name} item {number} is not a JSON object")
        yield f"{content.name} item {number}", b"", item


def _objects(lines: Iterator[bytes], name: str, lines_before: int = 0) -> Iterator[Located]:
    """Yield the objects, each with its location and its line. Each invalid byte becomes a surrogate."""
    for number, line in enumerate(lines, start=lines_before + 1):
        if not line.strip():
            continue
        location = f"{name} line {number}"
        try:
            # not refused, because one bad byte in a text must not make the whole line unreadable
            item = parse_json(line.decode("utf-8", "surrogateescape"))
        except ValueError as error:
            raise UserError(f"{location} is not JSON: {error}") from None
        if not isinstance(item, dict):
            raise UserError(f"{location} is not a JSON object")
        yield location, line, item


def _texts(
    objects: Iterator[Located], content: Content, reading: Reading, first_objects: Iterator[Located] | None = None
) -> Iterator[bytes]:
    """Yield the texts of objects: of posts if their form is known, otherwise of a field of each object.

    ``first_objects``: the objects at the start of the file, if ``objects`` do not start there.
    """
    is_named = reading.selection.field is not None
    looked_at = 0 if is_named and reading.selection.language is None else _OBJECTS_LOOKED_AT
    head = list(itertools.islice(objects if first_objects is None else first_objects, looked_at))
    if first_objects is None:
        objects = itertools.chain(head, objects)
    form = None if is_named else posts.recognised(item for _, _, item in head)
    if form is not None:
        reading.report.formats[form.name] += 1
        reading.report.guess(f"{content.name}: {form.name}, {'bios' if reading.bios else 'posts'}")
        yield from reading.selected(_posts(objects, form, reading))
        return
    try:
        yield from reading.selected(_fields(objects, head, content.name, reading))
    except _NoFieldError as error:
        if content.found and content.kind == "json":
            raise NoPostsError("JSON without posts") from None
        raise UserError(str(error)) from None


def _posts(objects: Iterable[Located], form: posts.Form, reading: Reading) -> Iterator[Record]:
    for _, _, item in objects:
        other = form if form.matches(item) else posts.recognised([item])
        if other is not None:
            yield from other.records(item, reading)
        elif len(item) == 1 and next(iter(item)) in posts.NOTICES:
            yield Record(None, f"notices of the stream: {next(iter(item))}")
        else:
            yield Record(None, f"objects that are not of the form {form.name}")


# ---------------------------------------------------------------------------------------- a field of each


class _NoFieldError(UserError):
    """No field must be the text, and nothing was read yet."""


def _fields(objects: Iterable[Located], head: list[Located], name: str, reading: Reading) -> Iterator[Record | bytes]:
    """Yield the records of objects of any form: the values of the field that was named, or that must be the text."""
    field, kinds = reading.selection.field, None
    if field is None:
        if not head:
            return
        kinds = JsonKinds()
        for _, _, item in head:
            kinds.add(item)
        try:
            field = text_field(kinds.by_field, head[0][0], reading)
        except UserError as error:
            raise _NoFieldError(str(error)) from None
        settle_field(reading, name, field, kinds.by_field)
    reading.report.formats["JSON"] += 1
    tongue = reading.needs_language(name, {key for _, _, item in head for key in item})
    takes_all = reading.takes_all
    quoted = json.dumps(field, ensure_ascii=False).encode("utf-8", "surrogatepass")
    for location, line, item in objects:
        if kinds is not None and kinds.add(item) and (other := text_field(kinds.by_field, location, reading)) != field:
            raise UserError(
                f"{location} has a field {other!r}, but the lines before have {field!r}; "
                "name the one that holds the text with --data-field"
            )
        value = value_at(item, field)
        if value is MISSING:
            if "." in field:
                yield Record(None, f"without the field {field}")
                continue
            raise UserError(f"{location} has no field {field!r}; it has {listed(list(item))}")
        if value is not None and not isinstance(value, str):
            raise UserError(f"{location}: field {field!r} is not a string")
        if line.count(quoted) > 1 and _is_twice(line, field):
            raise UserError(f"{location} has the field {field!r} twice; rename one")
        text = text_bytes(value or "")
        yield text if takes_all else Record(text, languages=languages(item.get(tongue)) if tongue else ())


class JsonKinds:
    """The kinds of values in each field, over all objects so far."""

    _RANKS = ("null", "number", "object", "text")

    def __init__(self) -> None:
        self.by_field: dict[str, str] = {}

    def add(self, item: dict[str, Any]) -> bool:
        """Take note of an object; return whether a field is new, or holds a higher-ranking kind of value."""
        changed = False
        for name, value in item.items():
            if isinstance(value, str):
                kind = "text"
            elif value is None:
                kind = "null"
            else:
                kind = "number" if isinstance(value, (int, float)) else "object"
            known = self.by_field.get(name)
            if known is None or self._RANKS.index(kind) > self._RANKS.index(known):
                self.by_field[name] = kind
                changed = True
        return changed


def _is_twice(line: bytes, field: str) -> bool:
    pairs = json.loads(line.decode("utf-8", "surrogateescape"), object_pairs_hook=list)
    return sum(name == field for name, _ in pairs) > 1
