"""From the documents of a source to those of a corpus: cut, cleaned, and assigned to splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from raytrain.data import cleaning, sources
from raytrain.data.corpus import CorpusWriter, SplitName
from raytrain.data.cutting import pieces
from raytrain.data.reading import Reading, Report, Selection

TRAIN_SHARE = 0.9
VALID_SHARE = 0.05


class Source(NamedTuple):
    """A source from which a corpus is prepared."""

    name: str
    """One of ``sources.NAMES``, a file, a folder or s3://..."""
    path: str | None
    """Location of a named source."""
    selection: Selection
    cache: Path
    """Folder for downloads."""

    @property
    def described(self) -> str:
        return self.name if self.path is None else f"{self.name} from {self.path}"

    @property
    def is_cleaned(self) -> bool:
        """Whether its texts are cleaned and deduplicated."""
        return self.name in sources.CLEANED

    def reading(self) -> Reading:
        return sources.reading(self.name, self.selection)

    def files(self) -> list[sources.File]:
        return sources.files(self.name, self.path, self.cache)


@dataclass
class Taken:
    """Counts of what was taken from a source."""

    report: Report = field(default_factory=Report)
    read: int = 0
    """Documents."""
    cut: int = 0
    """Pieces of longer documents."""
    invalid: int = 0
    """Runs of bytes that were not valid UTF-8."""
    duplicates: int = 0
    """Texts dropped as duplicates."""


Fill = Callable[[Source, CorpusWriter], Taken]
"""Adds the documents of a source to a corpus."""


def rules_of(source: str) -> tuple[tuple[str, ...], Callable[[bytes], bytes]]:
    """Return the rules for cleaning the text of a source, and the function that applies them."""
    if source == "synthetic":
        return (), bytes
    if source == "ptb_characters":
        return cleaning.CHARACTER_RULES, cleaning.without_outer_spaces
    if source in sources.CLEANED:
        return cleaning.CLEAN_RULES, cleaning.clean
    return (cleaning.VALID_RULE,), cleaning.valid_utf8


def split_of(text: bytes) -> SplitName:
    """Return the split of a text, by its hash: 90% train, 5% valid, 5% test. Equal texts are in the same split."""
    share = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
    if share < TRAIN_SHARE:
        return "train"
    return "valid" if share < TRAIN_SHARE + VALID_SHARE else "test"


def cleaned(
    documents: Iterable[tuple[SplitName | None, bytes]], clean: Callable[[bytes], bytes], taken: Taken
) -> Iterator[tuple[SplitName, bytes]]:
    """Yield the pieces of documents, cleaned, each with its split; some may be empty. ``taken`` is updated."""
    for split, document in documents:
        taken.read += 1
        for piece in pieces(document):
            taken.cut += len(piece) < len(document)
            text, runs = cleaning.replace_invalid(piece)
            taken.invalid += runs
            text = clean(text)
            yield split or split_of(text), text


def fill(source: Source, writer: CorpusWriter) -> Taken:
    """Add the documents of a source to a corpus, one by one."""
    reading, seen = source.reading(), cleaning.Seen()
    taken = Taken(reading.report)
    documents = sources.documents(source.name, source.path, reading, source.cache)
    for split, text in cleaned(documents, rules_of(source.name)[1], taken):
        if source.is_cleaned and text and not seen.add(text):
            taken.duplicates += 1
        else:
            writer.add(split, text)
    return taken
