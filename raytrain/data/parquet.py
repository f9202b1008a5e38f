"""A column of a Parquet file, of any type that holds text."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
from pyarrow import parquet, types

from raytrain.data.fields import listed, settle_field, text_field
from raytrain.data.reading import Reading, Record, languages
from raytrain.utils.errors import UserError

_ROWS = 4096


def parquet_records(path: Path, name: str, reading: Reading) -> Iterator[Record | bytes]:
    """Yield the values of the column that was named, or that must be the text; a null is an empty text.

    Raises:
        UserError: the file is damaged, or has no such column.
    """
    try:
        with pyarrow.OSFile(os.fsencode(path)) as source, parquet.ParquetFile(source) as file:
            schema = file.schema_arrow
            field = reading.selection.field
            if field is None:
                kinds = {item.name: _column_kind(item.type) for item in schema}
                field = text_field(kinds, name, reading)
                settle_field(reading, name, field, kinds)
            way = _way(schema, field, name)
            tongue = reading.needs_language(name, schema.names)
            reading.report.formats["Parquet"] += 1
            columns = list(dict.fromkeys([".".join(way), *([] if tongue is None else [tongue])]))
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                values = _column_bytes(_column(batch, way))
                if reading.takes_all:
                    yield from values
                else:
                    tags = itertools.repeat(()) if tongue is None else batch.column(tongue).to_pylist()
                    yield from (
                        Record(value, languages=languages(tag)) for value, tag in zip(values, tags, strict=False)
                    )
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is damaged or not Parquet: {error}") from None


def _way(schema: Any, field: str, name: str) -> list[str]:
    """Return the path to the column ``field`` through columns of objects; it must hold text.

    Raises:
        UserError: it is missing, exists twice, or holds no text.
    """
    names = [field] if field in schema.names else field.split(".")
    known, kind = list(schema.names), None
    for depth, part in enumerate(names):
        if known.count(part) > 1:
            raise UserError(f"{name} has the column {'.'.join(names[: depth + 1])!r} twice; rename one")
        if part not in known:
            inside = "" if depth == 0 else f" in {'.'.join(names[:depth])!r}"
            raise UserError(f"{name} has no column {field!r}; it has {listed(known)}{inside}")
        kind = schema.field(part).type if kind is None else kind.field(part).type
        known = [kind.field(number).name for number in range(kind.num_fields)] if types.is_struct(kind) else []
    if _column_kind(kind) not in ("text", "null"):
        raise UserError(f"{name}: column {field!r} is not text but {kind}")
    return names


def _column(batch: Any, way: list[str]) -> Any:
    """Return a column; a nested value is null if an object around it is null."""
    column = batch.column(way[0])
    return pyarrow.compute.struct_field(column, way[1:]) if len(way) > 1 else column


def _column_kind(kind: Any) -> str:
    """Return what a column of this Arrow type holds, in the terms of ``text_field``."""
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
    """Yield the values of a column that holds text or nulls; a null becomes an empty text."""
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    padded = types.is_fixed_size_binary(column.type)
    for value in column.to_pylist():
        text = value.encode() if isinstance(value, str) else value or b""
        yield text.rstrip(b"\0") if padded else text
