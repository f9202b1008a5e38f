"""Records of text tables: CSV and TSV, with or without a header row."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from raytrain.data.cleaning import unescape
from raytrain.data.fields import listed, settle_field
from raytrain.data.reading import BIO_FIELDS, Reading, Record, languages
from raytrain.data.unpacking import Content
from raytrain.utils.errors import UserError

_ROWS_LOOKED_AT = 100
_DELIMITERS = ",\t;|"
_DELIMITER_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_LONGEST_FIELD = 1 << 30
_NUMBER = re.compile(r"\s*[-+]?[\d.,:/ TZ-]*\d[\d.,:/ TZ-]*\s*")
"""A number or a date, which is never text."""
SENTIMENT140 = ("target", "ids", "date", "flag", "user", "text")
"""Columns of Sentiment140, whose file has no header."""
_SENTIMENT140_DATE = re.compile(r"[A-Z][a-z]{2} [A-Z][a-z]{2} \d\d \d\d:\d\d:\d\d [A-Z]+ \d{4}")
_SENTIMENT140_HUB = {"text", "date", "user", "sentiment", "query"}
_REPOSTED = "referenced_tweets.retweeted.id"


def table_records(lines: Iterator[bytes], content: Content, reading: Reading) -> Iterator[Record]:
    """Yield the records of a table, whose cell separator is inferred from its first rows.

    Raises:
        UserError: nothing indicates which column holds the text.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    text = (line.decode("utf-8", "surrogateescape") + "\n" for line in lines)
    head = list(itertools.islice(text, _ROWS_LOOKED_AT))
    if not head:
        return
    delimiter, quoted = _dialect(head, "\t" if content.kind == "tsv" else ",", content.name, reading)
    rows = csv.reader(
        itertools.chain(head, text), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    )
    try:
        yield from _records(rows, _rows(head, delimiter, quoted), content.name, reading)
    except csv.Error as error:
        raise UserError(f"{content.name} line {rows.line_num} is not CSV: {error}") from None


def _dialect(head: list[str], usual: str, name: str, reading: Reading) -> tuple[str, bool]:
    """Return the cell separator, and whether quotes enclose cells: those that give most rows the first row's width."""

    def fit(choice: tuple[str, bool]) -> tuple[bool, float, int]:
        rows = _rows(head, *choice)
        width = len(rows[0]) if rows else 0
        even = sum(len(row) == width for row in rows) / max(1, len(rows))
        return width > 1, even, -choices.index(choice)

    others = [delimiter for delimiter in _DELIMITERS if delimiter != usual]
    quotes = (False, True) if usual == "\t" else (True, False)
    choices = [(delimiter, quoted) for delimiter in (usual, *others) for quoted in quotes]
    best = max(choices, key=fit)
    if not fit(best)[0]:
        best = choices[0]
    if best != choices[0]:
        quotes_said = "" if best[1] == choices[0][1] else f", {'with' if best[1] else 'without'} quotes"
        reading.report.guess(f"{name}: cells are separated by {_DELIMITER_NAMES[best[0]]}{quotes_said}")
    return best


def _rows(head: list[str], delimiter: str, quoted: bool) -> list[list[str]]:
    reader = csv.reader(head, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    try:
        return [row for row in reader if row]
    except csv.Error:
        return []


class _Layout(NamedTuple):
    """Positions of the columns in a table's rows."""

    names: list[str]
    """Names of the columns; for Sentiment140 those that its file leaves out; empty if nothing names them."""
    text: int
    """Column of the text."""
    has_header: bool

    def column(self, *names: str) -> int | None:
        """Return the first column with one of ``names``; None if there is none."""
        return next((self.names.index(name) for name in names if name in self.names), None)

    @property
    def format(self) -> str:
        if set(self.names) in (set(SENTIMENT140), _SENTIMENT140_HUB):
            return "Sentiment140"
        return "twarc CSV" if "text" in self.names and self.column("tweet_type", _REPOSTED) is not None else "CSV"


def _records(rows: Iterable[list[str]], head: list[list[str]], name: str, reading: Reading) -> Iterator[Record]:
    layout = _layout(head[0], head[1:], name, reading)
    reading.report.formats[layout.format] += 1
    of_posts, is_latin = layout.format != "CSV", layout.format == "Sentiment140"
    language = reading.needs_language(name, layout.names)
    language_column = None if language is None else layout.column(language)
    kind, reposted = layout.column("tweet_type"), layout.column(_REPOSTED)
    account = layout.column("user_id", "author_id", "author.id") if reading.bios else None
    for row in itertools.islice(rows, int(layout.has_header), None):
        if not row:
            continue
        if len(row) != len(head[0]):
            yield Record(None, "rows with another number of cells than the first")
            continue
        text = _latin(row[layout.text]) if is_latin else row[layout.text]
        yield Record(
            unescape(text) if of_posts else text,
            languages=() if language_column is None else languages(row[language_column]),
            repost=(kind is not None and row[kind] == "retweet") or bool(reposted is not None and row[reposted]),
            author="" if account is None else row[account],
        )


def _layout(first: list[str], others: list[list[str]], name: str, reading: Reading) -> _Layout:
    """Return the layout, from the name or number of the text column, or from the first row.

    Raises:
        UserError: nothing indicates which column holds the text.
    """
    field = reading.selection.field
    names = [cell.strip() for cell in first]
    if field is None:
        if not reading.bios and _is_sentiment140(first):
            reading.report.guess(f"{name}: Sentiment140, column 6 of 6 holds the text")
            return _Layout(list(SENTIMENT140), len(SENTIMENT140) - 1, has_header=False)
        kinds = {cell: _kind([row[number] for row in others if len(row) > number]) for number, cell in enumerate(names)}
        field = next((item for item in _usual(reading) if item in names), None)
        if field is None:
            raise UserError(
                f"{name}: which column holds the {'bio' if reading.bios else 'text'}? Its first line has "
                f"{listed(names)}; name one with --data-field, by its number if that line is no line of names"
            )
        settle_field(reading, name, field, kinds)
    if names.count(field) > 1:
        raise UserError(f"{name} has the column {field!r} twice; rename one")
    if field in names:
        return _Layout(names, names.index(field), has_header=True)
    if field.isdecimal() and 1 <= int(field) <= len(names):
        reading.report.guess(f"{name}: no line of names; column {field} of {len(names)} holds the text")
        return _Layout([], int(field) - 1, has_header=False)
    raise UserError(
        f"{name} has no column {field!r}; its first line has {listed(names)}; without a line of names "
        f"give a number from 1 to {len(names)}"
    )


def _usual(reading: Reading) -> tuple[str, ...]:
    """Return the usual names of the text column: those of bios first if the source is bios."""
    return (*BIO_FIELDS[:3], *reading.selection.fields) if reading.bios else reading.selection.fields


def _kind(cells: list[str]) -> str:
    return "number" if cells and all(not cell or _NUMBER.fullmatch(cell) for cell in cells) else "text"


def _is_sentiment140(row: list[str]) -> bool:
    return (
        len(row) == len(SENTIMENT140)
        and row[0] in ("0", "2", "4")
        and row[1].isdecimal()
        and _SENTIMENT140_DATE.fullmatch(row[2]) is not None
    )


def _latin(text: str) -> str:
    """Return a cell, decoded as Latin-1 if its bytes are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape").decode("latin-1")
    return text
