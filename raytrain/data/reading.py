"""What to take from a source, and the report of what was kept, dropped and guessed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from raytrain.data.cleaning import Seen, digest
from raytrain.utils.errors import UserError

Take = Literal["text", "bio"]
TEXT_FIELDS = ("text", "bio", "tweet", "content")
"""Names of the text field if neither a field nor what to take is given; the first one present is used."""
POST_FIELDS = ("text", "full_text", "tweet", "content")
"""Names of the text field if posts are asked for."""
BIO_FIELDS = ("bio", "user_description", "author.description", "user.description", "description")
"""Names of the text field if bios are asked for."""
LANGUAGE_FIELDS = ("lang", "language", "langs")
"""Names of the field with a text's language."""
SAME_BIO = "the same bio of the same account"
"""Reason for leaving out a bio that an account has had before."""
REPOST = "RT @"
"""Start of a text that repeats another one."""
_ESCAPED_BYTE = re.compile(rb"\xed[\xb2\xb3][\x80-\xbf]")
"""A surrogate that stands for an invalid byte, as ``surrogatepass`` encodes it."""


@dataclass(frozen=True)
class Selection:
    """Which texts of a source are taken."""

    field: str | None = None
    """Field or column that holds the text, dotted for one within others; None finds it."""
    take: Take | None = None
    """Posts, or the descriptions that their authors give of themselves; None: bios of the source bios, else posts."""
    language: str | None = None
    """Language tag, as ``en``: other texts are dropped; None takes all."""
    reposts: bool = True
    """Whether texts that repeat another one are taken."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The usual names of the field, most likely first."""
        return {None: TEXT_FIELDS, "text": POST_FIELDS, "bio": BIO_FIELDS}[self.take]


class Record(NamedTuple):
    """One text of a source and what is known about it; or, without a text, why there is none."""

    text: str | bytes | None
    dropped: str = ""
    """Why there is no text."""
    languages: tuple[str, ...] = ()
    repost: bool = False
    author: str = ""
    """Whose bio the text is; empty if it is not a bio."""


@dataclass
class Report:
    """Report on what became of a source, for a person to check."""

    formats: Counter[str] = field(default_factory=Counter)
    """Format -> number of files."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of records left out for it."""
    remarks: Counter[str] = field(default_factory=Counter)
    """What was done to records that were kept -> number of records."""
    guesses: list[str] = field(default_factory=list)
    """Decisions made without being told, in order."""
    skipped: dict[str, str] = field(default_factory=dict)
    """File of a folder or archive that was not read -> reason."""

    def guess(self, line: str) -> None:
        """Take note of a decision, once."""
        if line not in self.guesses:
            self.guesses.append(line)

    def values(self) -> dict[str, Any]:
        """Return the report for corpus.json, without empty entries, and with text that is not UTF-8 escaped."""
        values: dict[str, Any] = {
            "formats": dict(self.formats),
            "dropped": _most_common(self.dropped),
            "remarks": _most_common(self.remarks),
            "guesses": [_writable(line) for line in self.guesses],
            "skipped": {_writable(name): reason for name, reason in self.skipped.items()},
        }
        return {name: value for name, value in values.items() if value}


class Reading:
    """One pass over the files of a source: what is asked for, the report, and information shared between files."""

    def __init__(self, selection: Selection | None = None, bios: bool = False) -> None:
        """``bios``: whether to take bios where there are posts and bios, and the selection does not say."""
        self.selection = selection or Selection()
        self.bios = bios if self.selection.take is None else self.selection.take == "bio"
        self.report = Report()
        self.notes_by_post: dict[str, str] = {}
        """Post -> its full text, in the current X archive."""
        self.notes: list[str] = []
        """Full texts in the current X archive that name no post."""
        self.note_bio: Callable[[bytes, str], None] | None = None
        """Called for each bio that is new here: digest of the account and the bio, and why it is left out, or ''."""
        self._notes: dict[str, tuple[dict[str, str], list[str]]] = {}
        """The full texts of each folder that holds an archive."""
        self._bios = Seen()
        self._field: tuple[str, str] | None = None
        """Text field of the first file that has fields but no known form, and that file."""

    def enter_archive(self, folder: str) -> None:
        """Use the full texts from the files of this folder: they belong to its posts alone."""
        self.notes_by_post, self.notes = self._notes.setdefault(folder, ({}, []))

    @property
    def agreed(self) -> tuple[str, str] | None:
        """The text field of files without a known form, and the first such file; None until there is one."""
        return self._field

    def agree(self, field: str, file: str) -> None:
        """Check that ``file`` has its text in the same field as the files before it.

        Raises:
            UserError: it does not: files with their texts in different fields are rarely meant to be one corpus.
        """
        known, first = self._field = self._field or (field, file)
        if field != known:
            raise UserError(
                f"{file} has its text in the field {field!r}, but {first} in {known!r}: name the one that both have "
                "with --data-field, or prepare them apart"
            )

    @property
    def takes_all(self) -> bool:
        """Whether every text is taken, whatever is known about it."""
        return self.selection.language is None and self.selection.reposts

    def selected(self, records: Iterable[Record | bytes]) -> Iterator[bytes]:
        """Yield the texts of the records that were asked for, and count the others.

        Bytes stand for a text that is taken in any case: readers of large files make no record of it.
        """
        wanted, report = self.selection, self.report
        language = None if wanted.language is None else _primary(wanted.language)
        for record in records:
            if isinstance(record, bytes):
                yield record
                continue
            text = record.text
            if text is None:
                report.dropped[record.dropped] += 1
                continue
            known = digest(_of_account(record.author, text)) if record.author else None
            if known is not None and not self._bios.add_digest(known):
                report.dropped[SAME_BIO] += 1
                continue
            reason = ""
            if not self.bios and not wanted.reposts and (record.repost or _repeats(text)):
                reason = "reposts"
            elif language is not None and not record.languages:
                reason = "of no stated language"
            elif language is not None and language not in map(_primary, record.languages):
                reason = f"of another language than {wanted.language}"
            if known is not None and self.note_bio is not None:
                self.note_bio(known, reason)
            if reason:
                report.dropped[reason] += 1
            else:
                yield text if isinstance(text, bytes) else text_bytes(text)

    def needs_language(self, name: str, fields: Iterable[str]) -> str | None:
        """Return which of ``fields`` names the language of a text; None if no language was asked for.

        Raises:
            UserError: none of them does.
        """
        if self.selection.language is None:
            return None
        known = [item for item in LANGUAGE_FIELDS if item in fields]
        if not known:
            raise UserError(
                f"{name}: nothing says the language of a text; it needs a field {', '.join(LANGUAGE_FIELDS[:-1])} or "
                f"{LANGUAGE_FIELDS[-1]}, or leave --language out"
            )
        return known[0]


def _of_account(author: str, text: str | bytes) -> bytes:
    return text_bytes(author) + b"\0" + (text if isinstance(text, bytes) else text_bytes(text))


def _most_common(counts: Counter[str]) -> dict[str, int]:
    """Return the counts, largest first; the order of equal counts does not depend on which came first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def languages(value: Any) -> tuple[str, ...]:
    """Return the language tags in a field: a tag or a list of tags."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(item for item in values if isinstance(item, str) and item)


def text_bytes(text: str) -> bytes:
    """Return the bytes of a string that was decoded with ``surrogateescape``, or is from JSON.

    An invalid byte becomes what it was in the file. A lone \\ud83d escape in JSON is a surrogate, which UTF-8 text
    cannot hold: it becomes an invalid sequence.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _ESCAPED_BYTE.sub(_unescaped, text.encode("utf-8", "surrogatepass"))


def _unescaped(match: re.Match[bytes]) -> bytes:
    return match[0].decode("utf-8", "surrogatepass").encode("utf-8", "surrogateescape")


def _writable(text: str) -> str:
    """Return ``text`` with everything that UTF-8 cannot hold escaped: names of files and fields may contain it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _primary(tag: str) -> str:
    """Return the language of a tag without its region: en for en-GB."""
    return tag.replace("_", "-").partition("-")[0].lower()


def _repeats(text: str | bytes) -> bool:
    return text.startswith(REPOST) if isinstance(text, str) else text.startswith(REPOST.encode())
