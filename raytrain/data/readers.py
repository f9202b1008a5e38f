"""Readers of files, each yielding a stream of documents; a file's content determines its format.

Plain text: a document is a line, without its line end (LF or CR LF; CR alone if the text has no LF). JSON and Parquet:
a post, a bio, or a field of each object or row. A table: a cell of each row. A null is an empty document.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytrain.data.cutting import cut_position
from raytrain.data.json_records import (
    ARCHIVE,
    NoPostsError,
    archive_script,
    json_document,
    json_lines,
)
from raytrain.data.reading import REPOST, Reading
from raytrain.data.tables import table_records
from raytrain.data.unpacking import CODECS, Content, DamagedError, contents
from raytrain.utils.errors import UserError

VERSION = 3
"""Part of the key of a prepared corpus: raise it when a reader extracts different text from the same file."""
KINDS = ("txt", "jsonl", "ndjson", "json", "js", "csv", "tsv", "parquet")
"""Endings of the files that are used in folders and archives."""
_CHECKED = 1 << 20
_SCRIPT_HEAD = 1 << 12
CHUNK = 1 << 16
"""Bytes read at a time; spans start at multiples of it, so that their chunks equal those of the whole file."""
_INVALID_SHARE = 0.1
_LONGEST_LINE = 1 << 20
"""Bytes above which a line of plain text is yielded in parts, so that memory does not grow with it."""


def readable(name: str) -> bool:
    """Return whether a file in a folder or archive counts as text, by its name."""
    parts = name.rpartition("/")[2].lower().split(".")[1:]
    if parts and parts[-1] in CODECS:
        parts.pop()
    return bool(parts) and parts[-1] in KINDS


def read(
    path: Path,
    name: str,
    reading: Reading,
    found: bool = False,
    span: tuple[int, int] | None = None,
    lines_before: int = 0,
) -> Iterator[bytes]:
    """Yield the documents of one file, called ``name`` in messages; for a zip archive, those of its members.

    Args:
        path: the file.
        name: its name in messages.
        reading: what is taken, and its report.
        found: whether it was found in a folder; scripts and JSON without posts are then skipped and reported.
        span: bytes [first, last) of a file that ``has_lines``, to read the lines that start there; multiples of
            ``CHUNK``.
        lines_before: number of lines before ``span``, for messages.

    Raises:
        UserError: the file is empty, binary or damaged; or it lacks the field, or none of its fields must be the text.
    """
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{name} is empty")
        for content in contents(path, name, found, readable):
            if span is not None:
                content = replace(content, span=span, lines_before=lines_before)
            try:
                yield from _documents(content, reading)
            except NoPostsError as error:
                if not content.found:
                    raise UserError(f"{content.name}: {error}") from None
                reading.report.skipped[content.name] = str(error)
    except DamagedError as error:
        raise UserError(f"{name} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None


def has_lines(path: Path, name: str) -> bool:
    """Return whether a file is read line by line, each by itself: plain text or JSON lines, not compressed."""
    for content in contents(path, name, False, readable):
        if content.plain is None or content.kind == "parquet" or _head(content).startswith(b"PAR1"):
            return False
        return _kind(content, content.kind) in ("lines", "text")
    return False


def count_lines(path: Path, name: str, first: int) -> int:
    """Return how many lines of a file that ``has_lines`` start before the byte ``first``."""
    (content,) = contents(path, name, False, readable)
    end, number, left = _line_end(content), 1, max(0, first - 1)
    with content.open() as file:
        while chunk := file.read(min(_CHECKED, left)):
            number += chunk.count(end)
            left -= len(chunk)
    return number if first else 0


def is_script(path: Path, name: str) -> bool:
    """Return whether a file, not a zip archive, is a script of an X archive."""
    with contextlib.suppress(DamagedError, OSError, UserError):
        for content in contents(path, name, True, readable):
            with content.open() as file:
                return ARCHIVE.match(file.read(_SCRIPT_HEAD).removeprefix(codecs.BOM_UTF8)) is not None
    return False


def _documents(content: Content, reading: Reading) -> Iterator[bytes]:
    kind, name = content.kind, content.name
    if kind == "parquet" or (kind not in KINDS and _head(content).startswith(b"PAR1")):
        from raytrain.data.parquet import parquet_records

        with content.seekable() as path:
            yield from reading.selected(parquet_records(path, name, reading))
        return
    line_end = _line_end(content)
    kind = _kind(content, kind)
    if kind == "script":
        yield from archive_script(content, reading)
    elif kind == "document":
        yield from json_document(content, reading)
    elif kind == "lines":
        # for the first span too: it may hold fewer objects than are inspected
        first_lines = _lines(replace(content, span=None), line_end) if content.span else None
        yield from json_lines(_lines(content, line_end), content, reading, first_lines)
    elif kind == "table":
        yield from reading.selected(table_records(_lines(content, line_end), content, reading))
    else:
        yield from _plain(content, line_end, reading)


def _kind(content: Content, ending: str) -> str:
    """Return the kind of a text file: ``script``, ``document``, ``lines`` (of JSON), ``table`` or ``text``."""
    if ending in ("csv", "tsv"):
        return "table"
    if ending == "txt":
        return "text"
    head = _head(content)
    first_line, _, rest = head.partition(b"\n" if b"\n" in head else b"\r")
    if ARCHIVE.match(head) or ending == "js":
        return "script"
    if re.match(rb'\[\s*[{"\]]', head):
        return "document"
    if ending in ("jsonl", "ndjson"):
        return "lines"
    if head.startswith(b"{") and (_is_object(first_line) or (not rest and len(head) >= _CHECKED)):
        return "lines"
    if ending == "json":
        return "document"
    return "text"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8", "surrogateescape")), dict)
    except (ValueError, RecursionError):
        return False


def _head(content: Content) -> bytes:
    """Return the start of a file, without a byte order mark and leading white space."""
    with content.open() as file:
        try:
            return file.read(_CHECKED).removeprefix(codecs.BOM_UTF8).lstrip()
        except DamagedError:
            return b""  # reading further reports where the file is damaged


def _plain(content: Content, line_end: bytes, reading: Reading) -> Iterator[bytes]:
    """Yield the lines of plain text."""
    selection, name = reading.selection, content.name
    if selection.field is not None:
        raise UserError(f"{name} is plain text and has no field {selection.field!r}; leave the field out")
    if selection.take == "bio":
        raise UserError(f"{name} is plain text, in which nothing says what is a bio; leave --take out")
    reading.needs_language(name, ())
    reading.report.formats["plain text"] += 1
    if content.kind not in KINDS:
        reading.report.guess(f"{name}: plain text, a document a line")
    elif (head := _head(content)).startswith(b"{") and _is_object(head.partition(b"\n")[0]):
        reading.report.guess(f"{name}: plain text, though its lines look like JSON; as JSON it would end in .jsonl")
    lines = _lines(content, line_end, longest=_LONGEST_LINE)
    if selection.reposts:
        yield from lines
        return
    for line in lines:
        if line.startswith(REPOST.encode()):
            reading.report.dropped["reposts"] += 1
        else:
            yield line


def _line_end(content: Content) -> bytes:
    """Return LF, or CR for text with the line ends of old Macs.

    Raises:
        UserError: judging by its first MiB, uncompressed, it is not UTF-8 text: it has a NUL byte, or more than a tenth
            of the bytes are invalid.
    """
    name = content.name
    with content.open() as file:
        try:
            head = file.read(_CHECKED)
        except DamagedError:
            return b"\n"  # _lines reports where the file is damaged
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in head:
        raise UserError(f"{name} is UTF-16 text: convert it by iconv -f UTF-16 -t UTF-8")
    if b"\0" in head:
        raise UserError(f"{name} is not text: it contains NUL bytes")
    invalid = sum(map(len, re.findall("[\udc80-\udcff]+", head.decode("utf-8", "surrogateescape"))))
    if invalid > _INVALID_SHARE * len(head):
        raise UserError(f"{name} is not UTF-8 text: {invalid} of its first {len(head)} bytes are invalid")
    return b"\r" if b"\r" in head and b"\n" not in head else b"\n"


def _lines(content: Content, end: bytes, longest: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a file, or those that start in its span, without line ends and byte order mark.

    A line of more than ``longest`` bytes is yielded in parts that end before a word.
    """
    number = content.lines_before
    pending = bytearray()
    last = None if content.span is None else content.span[1]
    try:
        with content.open() as file:
            for start, chunk in _chunks(file, end, content.span):
                is_beyond = last is not None and start >= last
                if is_beyond and not pending:
                    return
                pending += chunk
                if end in chunk:
                    *lines, rest = bytes(pending).split(end)
                    for line in lines[:1] if is_beyond else lines:
                        number += 1
                        yield line.removesuffix(b"\r")
                    if is_beyond:
                        return
                    pending = bytearray(rest)
                if longest is not None and len(pending) > longest:
                    size = cut_position(bytes(pending[: longest + 1]), longest)
                    yield bytes(pending[:size])
                    del pending[:size]
        if pending:
            yield bytes(pending)
    except DamagedError as error:
        raise UserError(f"{content.name} is damaged after line {number}: {error}") from None


def _chunks(file: Any, end: bytes, span: tuple[int, int] | None) -> Iterator[tuple[int, bytes]]:
    """Yield the chunks of a file from the first line that starts in ``span``, each with the byte it starts at."""
    start, last = span or (0, 0)
    in_line = False  # whether in a line that starts before the span
    if start:
        file.seek(start - 1)
        in_line = file.read(1) != end
    while chunk := file.read(CHUNK):
        if start == 0:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
        if in_line:
            if start >= last:
                return
            _, found, chunk = chunk.partition(end)
            in_line = not found
        if chunk and not in_line:
            yield start, chunk
        start += CHUNK
