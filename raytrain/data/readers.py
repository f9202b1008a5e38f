"""Readers of plain text, JSON lines and Parquet, each as a stream of documents.

``.txt``: a document is a line, without its line end (LF or CR LF). ``.jsonl``: a string field of each
object. ``.parquet``: a string or binary column. A null is an empty document.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from raytrain.data.cleaning import valid_utf8
from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json

TEXT_FIELDS = ("text", "bio", "tweet", "content")
"""Fields that hold the text when none is named and there are several."""
_CHECKED = 1 << 20
_INVALID_SHARE = 0.1
_PARQUET_ROWS = 4096


def read(path: Path, name: str, field: str | None) -> Iterator[bytes]:
    """Yield the documents of one file, called ``name`` in messages.

    Raises:
        UserError: the file is empty, binary or damaged, or has no such field.
    """
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{name} is empty")
        if kind == "parquet":
            yield from _parquet(path, name, field)
            return
        if kind == "txt" and field is not None:
            raise UserError(f"{name} is plain text and has no field {field!r}; leave the field out")
        _refuse_binary(path, name)
        lines = _lines(path, name)
        yield from (_json_lines(lines, name, field) if kind == "jsonl" else lines)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return open(path, "rb")


def _refuse_binary(path: Path, name: str) -> None:
    """By its first MiB, unpacked: a NUL byte, or more than a tenth of the bytes not valid UTF-8."""
    with _open(path) as file:
        try:
            head = file.read(_CHECKED)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return  # _lines says where the file is damaged
    if b"\0" in head:
        raise UserError(f"{name} is not text: it contains NUL bytes")
    invalid = sum(map(len, re.findall("[\udc80-\udcff]+", head.decode("utf-8", "surrogateescape"))))
    if invalid > _INVALID_SHARE * len(head):
        raise UserError(f"{name} is not UTF-8 text: {invalid} of its first {len(head)} bytes are invalid")


def _lines(path: Path, name: str) -> Iterator[bytes]:
    number = 0
    try:
        with _open(path) as file:
            for line in file:
                number += 1
                yield line[:-2] if line.endswith(b"\r\n") else line.removesuffix(b"\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name} is damaged after line {number}: {error}") from None


# ---------------------------------------------------------------------------------- JSON lines, Parquet


def _json_lines(lines: Iterator[bytes], name: str, field: str | None) -> Iterator[bytes]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        location = f"{name} line {number}"
        try:
            # Valid UTF-8 first: one bad byte in a text must not make the whole line unreadable.
            item = parse_json(valid_utf8(line))
        except ValueError as error:
            raise UserError(f"{location} is not JSON: {error}") from None
        if not isinstance(item, dict):
            raise UserError(f"{location} is not a JSON object")
        if field is None:
            field = _text_field([key for key, value in item.items() if isinstance(value, str)], list(item), location)
        if field not in item:
            raise UserError(f"{location} has no field {field!r}; it has {_listed(list(item))}")
        value = item[field]
        if value is not None and not isinstance(value, str):
            raise UserError(f"{location}: field {field!r} is not a string")
        # A lone \ud83d escape is a surrogate, which no UTF-8 text holds: it becomes an invalid sequence.
        yield (value or "").encode("utf-8", "surrogatepass")


def _parquet(path: Path, name: str, field: str | None) -> Iterator[bytes]:
    import pyarrow
    from pyarrow import parquet

    try:
        with pyarrow.OSFile(os.fsencode(path)) as source, parquet.ParquetFile(source) as file:
            schema = file.schema_arrow
            if field is None:
                field = _text_field([item.name for item in schema if _is_text(item.type)], schema.names, name)
            if field not in schema.names:
                raise UserError(f"{name} has no column {field!r}; it has {_listed(schema.names)}")
            if not _is_text(schema.field(field).type):
                raise UserError(f"{name}: column {field!r} is not text but {schema.field(field).type}")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                yield from (_encoded(value) for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is damaged or not Parquet: {error}") from None


def _encoded(value: bytes | None) -> bytes:
    return value or b""


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return any(
        check(kind) for check in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )


def _text_field(candidates: list[str], fields: list[str], location: str) -> str:
    """Return the only string field, or the first of the usual names."""
    if len(candidates) == 1:
        return candidates[0]
    for usual in TEXT_FIELDS:
        if usual in candidates:
            return usual
    raise UserError(f"{location}: which field holds the text? It has {_listed(fields)}; name one with --data-field")


def _listed(fields: list[str]) -> str:
    return ", ".join(fields) if fields else "none"
