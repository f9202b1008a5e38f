"""Readers of plain text, JSON lines and Parquet, each as a stream of documents.

``.txt``: a document is a line, without its line end (LF or CR LF; CR alone where the text has no LF). ``.jsonl``: a
string field of each object. ``.parquet``: a column of text or bytes. A null is an empty document.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from raytrain.data.cutting import cut_position
from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json

TEXT_FIELDS = ("text", "bio", "tweet", "content")
"""Fields that hold the text when none is named; the first that is there."""
_CHECKED = 1 << 20
_CHUNK = 1 << 16
_INVALID_SHARE = 0.1
_LONGEST_LINE = 1 << 20
"""Bytes from which a line of plain text is handed out in parts, so that memory does not grow with it."""
_PARQUET_ROWS = 4096
_ESCAPED_BYTE = re.compile(rb"\xed[\xb2\xb3][\x80-\xbf]")
"""A surrogate that stands for an invalid byte, as ``surrogatepass`` encodes it."""
_OBJECTS_LOOKED_AT = 100
"""JSON objects that are looked at before their text field is chosen."""


class TextField:
    """The field or column that holds the text in all files of a source: one that is named, or the first file's."""

    def __init__(self, named: str | None = None) -> None:
        self.named = named
        self._first: tuple[str, str] | None = None
        """Field of the first file that has fields, and that file."""

    def agree(self, found: str, file: str) -> str:
        """Return the field that ``file`` must have its text in, if it is as in the files before.

        Raises:
            UserError: it is not: files whose texts are in different fields are rarely meant to be one corpus.
        """
        field, first = self._first = self._first or (found, file)
        if found != field:
            raise UserError(
                f"{file} has its text in the field {found!r}, but {first} in {field!r}: name the one that both have "
                "with --data-field, or prepare them apart"
            )
        return found


def read(path: Path, name: str, field: TextField) -> Iterator[bytes]:
    """Yield the documents of one file of a source, called ``name`` in messages.

    Raises:
        UserError: the file is empty, binary or damaged, or it has no such field, or none that must be the text, or
            another one than the files before.
    """
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{name} is empty")
        if kind == "parquet":
            yield from _parquet(path, name, field)
            return
        if kind == "txt" and field.named is not None:
            raise UserError(f"{name} is plain text and has no field {field.named!r}; leave the field out")
        line_end = _line_end(path, name)
        if kind == "jsonl":
            yield from _json_lines(_lines(path, name, line_end), name, field)
        else:
            yield from _lines(path, name, line_end, longest=_LONGEST_LINE)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return open(path, "rb")


def _line_end(path: Path, name: str) -> bytes:
    """Return LF, or CR for text with the line ends of old Macs.

    Raises:
        UserError: by its first MiB, unpacked, this is no UTF-8 text: it has a NUL byte, or more than a tenth of the
            bytes are invalid.
    """
    with _open(path) as file:
        try:
            head = file.read(_CHECKED)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return b"\n"  # _lines says where the file is damaged
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in head:
        raise UserError(f"{name} is UTF-16 text: convert it by iconv -f UTF-16 -t UTF-8")
    if b"\0" in head:
        raise UserError(f"{name} is not text: it contains NUL bytes")
    invalid = sum(map(len, re.findall("[\udc80-\udcff]+", head.decode("utf-8", "surrogateescape"))))
    if invalid > _INVALID_SHARE * len(head):
        raise UserError(f"{name} is not UTF-8 text: {invalid} of its first {len(head)} bytes are invalid")
    return b"\r" if b"\r" in head and b"\n" not in head else b"\n"


def _lines(path: Path, name: str, end: bytes, longest: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a file without their ends and without a byte order mark.

    A line of more than ``longest`` bytes comes in parts that end before a word.
    """
    number = 0
    pending = bytearray()
    try:
        with _open(path) as file:
            chunk = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8)
            while chunk:
                pending += chunk
                if end in chunk:
                    *lines, rest = bytes(pending).split(end)
                    for line in lines:
                        number += 1
                        yield line.removesuffix(b"\r")
                    pending = bytearray(rest)
                if longest is not None and len(pending) > longest:
                    size = cut_position(bytes(pending[: longest + 1]), longest)
                    yield bytes(pending[:size])
                    del pending[:size]
                chunk = file.read(_CHUNK)
        if pending:
            yield bytes(pending)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name} is damaged after line {number}: {error}") from None


# ---------------------------------------------------------------------------------- JSON lines, Parquet


def _json_lines(lines: Iterator[bytes], name: str, text_field: TextField) -> Iterator[bytes]:
    objects = _objects(lines, name)
    kinds: _JsonKinds | None = None
    field = text_field.named
    if field is None:
        head = list(itertools.islice(objects, _OBJECTS_LOOKED_AT))
        if not head:
            return
        kinds = _JsonKinds()
        for _, _, item in head:
            kinds.add(item)
        field = text_field.agree(_text_field(kinds.by_field, head[0][0]), name)
        objects = itertools.chain(head, objects)
    quoted = json.dumps(field, ensure_ascii=False).encode("utf-8", "surrogatepass")
    for location, line, item in objects:
        if kinds is not None and kinds.add(item) and (other := _text_field(kinds.by_field, location)) != field:
            raise UserError(
                f"{location} has a field {other!r}, but the lines before have {field!r}; "
                "name the one that holds the text with --data-field"
            )
        if field not in item:
            raise UserError(f"{location} has no field {field!r}; it has {_listed(list(item))}")
        value = item[field]
        if value is not None and not isinstance(value, str):
            raise UserError(f"{location}: field {field!r} is not a string")
        if line.count(quoted) > 1 and _is_twice(line, field):
            raise UserError(f"{location} has the field {field!r} twice; rename one")
        yield _text_bytes(value or "")


def _objects(lines: Iterator[bytes], name: str) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Yield the objects, each with its location and its line. An invalid byte becomes a surrogate of its own."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        location = f"{name} line {number}"
        try:
            # not refused: one bad byte in a text must not make the whole line unreadable
            item = parse_json(line.decode("utf-8", "surrogateescape"))
        except ValueError as error:
            raise UserError(f"{location} is not JSON: {error}") from None
        if not isinstance(item, dict):
            raise UserError(f"{location} is not a JSON object")
        yield location, line, item


class _JsonKinds:
    """The kinds of values that the fields of all objects so far have held."""

    _RANKS = ("null", "number", "object", "text")

    def __init__(self) -> None:
        self.by_field: dict[str, str] = {}

    def add(self, item: dict[str, Any]) -> bool:
        """Take note of an object; return whether a field is new, or holds more than it did."""
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


def _text_bytes(text: str) -> bytes:
    """Return the bytes of a string of JSON.

    An invalid byte is what it was in the file. A lone \\ud83d escape is a surrogate, which no UTF-8 text holds: it
    becomes an invalid sequence.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        encoded = text.encode("utf-8", "surrogatepass")
        return _ESCAPED_BYTE.sub(_unescaped, encoded)


def _unescaped(match: re.Match[bytes]) -> bytes:
    return match[0].decode("utf-8", "surrogatepass").encode("utf-8", "surrogateescape")


def _parquet(path: Path, name: str, text_field: TextField) -> Iterator[bytes]:
    import pyarrow
    from pyarrow import parquet

    try:
        with pyarrow.OSFile(os.fsencode(path)) as source, parquet.ParquetFile(source) as file:
            schema = file.schema_arrow
            field = text_field.named
            if field is None:
                kinds = {item.name: _column_kind(item.type) for item in schema}
                field = text_field.agree(_text_field(kinds, name), name)
            if field not in schema.names:
                raise UserError(f"{name} has no column {field!r}; it has {_listed(schema.names)}")
            if schema.names.count(field) > 1:
                raise UserError(f"{name} has the column {field!r} twice; rename one")
            if _column_kind(schema.field(field).type) not in ("text", "null"):
                raise UserError(f"{name}: column {field!r} is not text but {schema.field(field).type}")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                yield from _column_bytes(batch.column(field))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is damaged or not Parquet: {error}") from None


def _column_kind(kind: Any) -> str:
    """Return what a column of this Arrow type holds, in the words of ``_text_field``."""
    import pyarrow

    types = pyarrow.types

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _column_kind(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _column_kind(kind.value_type)
    if types.is_null(kind):
        return "null"
    texts = (
        *(types.is_string, types.is_large_string, types.is_string_view),
        *(types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary),
    )
    if any(check(kind) for check in texts):
        return "text"
    return "object" if types.is_nested(kind) else "number"


def _column_bytes(column: Any) -> Iterator[bytes]:
    """Yield the values of a column that holds text or nulls; a null is empty."""
    import pyarrow

    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    padded = pyarrow.types.is_fixed_size_binary(column.type)
    for value in column.to_pylist():
        text = value.encode() if isinstance(value, str) else value or b""
        yield text.rstrip(b"\0") if padded else text


def _text_field(kinds: dict[str, str], location: str) -> str:
    """Return the field that must be the text: the first of the usual names, or the only one that can hold text.

    Args:
        kinds: field -> ``text``, ``null`` (nothing so far), ``number`` (or a date: never text), or ``object`` (a list
            or object, which may have text in it).

    Raises:
        UserError: there is no such field, or another one may be meant.
    """
    for usual in TEXT_FIELDS:
        if usual in kinds:
            if kinds[usual] in ("text", "null"):
                return usual
            raise UserError(
                f"{location}: field {usual!r} holds no text; it has {_listed(kinds)}: "
                "name the one that holds the text with --data-field"
            )
    possible = [name for name, kind in kinds.items() if kind != "number"]
    if len(possible) == 1 and kinds[possible[0]] == "text":
        return possible[0]
    raise UserError(f"{location}: which field holds the text? It has {_listed(kinds)}; name one with --data-field")


def _listed(fields: Iterable[str]) -> str:
    return ", ".join(fields) or "none"
