"""Parts of a corpus: the files that each read task makes, joined to the same corpus that a single process writes.

A part is a folder, named by the number of its task, below a scratch folder that all processes can reach:

``SPLIT.bin``, ``SPLIT.lengths``
    the documents of a split, each followed by a separator, and their lengths (uint32).
``texts``
    int64[texts, 3]: two halves of the digest of each non-empty text, and its position; if texts are deduplicated, or
    may be those of bios that are.
``bios``
    int64[bios, 8], see ``_Bio``: what is taken back if an earlier part has the same bio of the same account.
``own_texts``, ``own_bios``
    int64: positions of texts, and rows of ``bios``, that occur earlier in the same part.
``lost_texts``, ``lost_bios``
    the same for those that an earlier part has.
``summary.json``
    counts and the report.

A part appears complete or not at all, and is the same whoever writes it, since a task may be rerun.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raytrain.data import cleaning
from raytrain.data.corpus import SEPARATOR, SPLITS, CorpusWriter, SplitName
from raytrain.data.documents import Source, Taken, cleaned, rules_of
from raytrain.data.read_tasks import ReadTask
from raytrain.data.reading import SAME_BIO, Reading, Report

Kind = Literal["bios", "texts"]
"""The items that are deduplicated."""
Rows = NDArray[np.int64]
_NUMBER_BITS = 40
"""A position is the number of a split, shifted left by this many bits, plus the text's number in the part's split."""
_ROWS_AT_ONCE = 1 << 18
_DOCUMENTS_AT_ONCE = 1 << 14
_BUFFER = 1 << 20


class _Bio(NamedTuple):
    """A row of ``bios``."""

    high: int
    low: int
    first: int
    """First row of ``texts`` that belongs to it."""
    last: int
    """The row after its last one."""
    cut: int
    invalid: int
    empty: int
    reason: int
    """Index in the summary's list of the reason for leaving it out; -1: it was taken."""


@dataclass(frozen=True)
class Parts:
    """The parts of a source's corpus. ``write`` and the deduplication run in any process that reaches the folder."""

    folder: Path
    """Scratch folder."""
    source: Source
    tasks: list[ReadTask]
    working_folder: Path = field(default_factory=Path.cwd)
    """Folder relative to which the names of the source's files are resolved."""

    def write(self, number: int) -> None:
        """Write the part of a task, unless it exists already.

        Raises:
            UserError: see ``readers.read``.
            OSError: the part cannot be written.
        """
        target, partial = self.part(number), self.folder / f".{number}-{secrets.token_hex(4)}"
        if target.is_dir():
            return
        partial.mkdir()
        try:
            with self._names_found(number), _PartWriter(partial, self.source) as writer:
                writer.add_all(self.tasks[number])
            try:
                os.rename(partial, target)
            except OSError:
                if not target.is_dir():  # a task that was presumed dead has written it meanwhile
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def rows(self, number: int, kind: Kind) -> Iterator[Rows]:
        """Yield the items of a part to deduplicate, in blocks: int64[n, 3] of digest, digest, value.

        The value is a row of bios, or the position of a text, as ``note_repeated`` takes it. Repeats within a block are
        noted in the part and yielded once. So however often a text occurs, few of its rows meet in one process.

        Raises:
            OSError: the part is not found here, or nothing can be written to it.
        """
        part = self.part(number)
        if not part.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(part))
        rows = _mapped(part / kind, len(_Bio._fields) if kind == "bios" else 3)
        keep = np.ones(len(rows), dtype=bool)
        if kind == "texts":
            for bio in _lost_bios(part):
                keep[bio.first : bio.last] = False
        own = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = np.array(rows[start : start + _ROWS_AT_ONCE, :3])
            if kind == "bios":
                block[:, 2] = np.arange(start, start + len(block))
            block = block[keep[start : start + _ROWS_AT_ONCE]]
            again = repeated(np.insert(block, 2, number, axis=1))[:, 3]
            own.append(again)
            yield block[~np.isin(block[:, 2], again)]
        _keep(part / f"own_{kind}", np.concatenate(own))

    def note_repeated(self, number: int, kind: Kind, values: Rows) -> None:
        """Note in a part which values of ``rows`` an earlier part or block already has."""
        _keep(self.part(number) / f"lost_{kind}", values)

    def summary(self, number: int) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.part(number) / "summary.json").read_bytes())
        return summary

    def join(self, writer: CorpusWriter) -> Taken:
        """Add the parts to a corpus in their order, remove them, and return the counts.

        Raises:
            UserError: files have their texts in different fields.
        """
        reading = self.source.reading()
        taken, empty = Taken(reading.report), 0
        for number, task in enumerate(self.tasks):
            part, summary = self.part(number), self.summary(number)
            self.check(number, reading)
            lost = _lost(part, "texts")
            taken.duplicates += len(lost)
            bios = list(_lost_bios(part))
            lost = np.concatenate([lost, *_texts_of(part, bios)])
            for name in ("read", "cut", "invalid"):
                setattr(taken, name, getattr(taken, name) + summary[name])
            empty += summary["empty"]
            _merge(taken.report, summary["report"], continues=task.continues)
            for bio in bios:
                empty -= bio.empty
                _take_back(taken, bio, summary["reasons"])
            for split in SPLITS:
                for stream, lengths in _documents(part, split, lost):
                    writer.extend(split, stream, lengths)
            shutil.rmtree(part)
        writer.annotate({"empty_dropped": empty})
        return taken

    def check(self, number: int, reading: Reading) -> None:
        """Check that the field with a part's texts is that of the earlier parts; see ``Reading.agree``."""
        if (agreed := self.summary(number)["agreed"]) is not None:
            reading.agree(*agreed)

    def unfinished(self, number: int) -> int:
        """Return how often the part was begun but not ended, by processes that died or are still working on it."""
        return sum(1 for _ in self.folder.glob(f".{number}-*"))

    def part(self, number: int) -> Path:
        return self.folder / str(number)

    def _names_found(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Enter the folder in which the names of the task's files are found; workers are started elsewhere."""
        if all(os.path.isabs(item.name) or "://" in item.name for _, item in self.tasks[number].files):
            return contextlib.nullcontext()
        return contextlib.chdir(self.working_folder)


def repeated(rows: Rows) -> Rows:
    """Return the rows whose digest occurs in an earlier row.

    Args:
        rows: int64[n, 4] of digest, digest, task, value. Earlier means a smaller task or, within a task, a smaller
            value.
    """
    order = np.lexsort((rows[:, 3], rows[:, 2], rows[:, 1], rows[:, 0]))
    digests = rows[order, :2]
    again = np.zeros(len(rows), dtype=bool)
    again[1:] = (digests[1:] == digests[:-1]).all(axis=1)
    return rows[order[again]]


class _PartWriter:
    """Writes the files of a part, as a context manager, in memory that does not grow with the part."""

    def __init__(self, folder: Path, source: Source) -> None:
        self._folder = folder
        self._source = source
        self._reading = source.reading()
        self._taken = Taken(self._reading.report)
        self._empty = 0
        self._open: dict[str, BinaryIO] = {}
        self._lengths = {split: array("I") for split in SPLITS}
        self._numbers: dict[SplitName, int] = dict.fromkeys(SPLITS, 0)
        self._texts = array("q")
        self._num_texts = 0
        self._new_bio: bytes | None = None
        self._reasons: dict[str, int] = {}

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            with contextlib.suppress(OSError):
                file.close()

    def add_all(self, task: ReadTask) -> None:
        reading, taken = self._reading, self._taken
        clean = rules_of(self._source.name)[1]
        documents: Iterable[tuple[SplitName | None, bytes]] = task.documents(self._source, reading)
        if reading.bios:
            reading.note_bio = self._note_bio
            documents = self._with_bios(documents)
        keeps_texts = reading.bios or self._source.is_cleaned
        for split, text in cleaned(documents, clean, taken):
            if not text:
                self._empty += 1
                continue
            self._add(split, text)
            if keeps_texts:
                self._add_text(split, text)
        self._finish()

    def _add(self, split: SplitName, text: bytes) -> None:
        file = self._file(f"{split}.bin")
        file.write(text)
        file.write(SEPARATOR)
        self._numbers[split] += 1
        self._lengths[split].append(len(text))
        if len(self._lengths[split]) >= _ROWS_AT_ONCE:
            self._flush(f"{split}.lengths", self._lengths[split], "<u4")

    def _add_text(self, split: SplitName, text: bytes) -> None:
        position = (SPLITS.index(split) << _NUMBER_BITS) + self._numbers[split] - 1
        # a text that is not cleaned is never compared
        self._texts.extend((*(_halves(cleaning.digest(text)) if self._source.is_cleaned else (0, 0)), position))
        self._num_texts += 1
        if len(self._texts) >= 3 * _ROWS_AT_ONCE:
            self._flush("texts", self._texts, "<i8")

    # ------------------------------------------------------------------------------------------- bios

    def _note_bio(self, digest: bytes, reason: str) -> None:
        if not reason:
            self._new_bio = digest  # its document follows
            return
        number = self._reasons.setdefault(reason, len(self._reasons))
        self._add_bio(digest, self._counts(), number)

    def _with_bios(
        self, documents: Iterable[tuple[SplitName | None, bytes]]
    ) -> Iterator[tuple[SplitName | None, bytes]]:
        for document in documents:
            digest, before = self._new_bio, self._counts()
            self._new_bio = None
            yield document
            if digest is not None:  # and its pieces have been added
                self._add_bio(digest, before, -1)

    def _counts(self) -> tuple[int, int, int, int]:
        return self._num_texts, self._taken.cut, self._taken.invalid, self._empty

    def _add_bio(self, digest: bytes, before: tuple[int, int, int, int], reason: int) -> None:
        texts, cut, invalid, empty = before
        now = self._counts()
        row = _Bio(*_halves(digest), texts, now[0], now[1] - cut, now[2] - invalid, now[3] - empty, reason)
        self._file("bios").write(np.asarray(row, dtype="<i8").tobytes())

    # ------------------------------------------------------------------------------------------ files

    def _finish(self) -> None:
        for split in SPLITS:
            self._flush(f"{split}.lengths", self._lengths[split], "<u4")
        self._flush("texts", self._texts, "<i8")
        for file in self._open.values():
            file.close()
        report = self._taken.report
        summary = {
            **{name: getattr(self._taken, name) for name in ("read", "cut", "invalid")},
            "empty": self._empty,
            "agreed": self._reading.agreed,
            "reasons": list(self._reasons),
            "report": {name: getattr(report, name) for name in _MERGED},
        }
        (self._folder / "summary.json").write_text(json.dumps(summary))

    def _flush(self, name: str, values: array[int], kind: str) -> None:
        if values:
            self._file(name).write(np.asarray(values).astype(kind).tobytes())
            del values[:]

    def _file(self, name: str) -> BinaryIO:
        if name not in self._open:
            self._open[name] = open(self._folder / name, "wb", buffering=_BUFFER)  # noqa: SIM115 (closed at the end)
        return self._open[name]


_MERGED = ("formats", "dropped", "remarks", "guesses", "skipped")


def _merge(report: Report, values: dict[str, Any], *, continues: bool) -> None:
    """Add a part's report of its reading; a file that starts in another part is counted there."""
    report.dropped.update(values["dropped"])
    report.remarks.update(values["remarks"])
    if not continues:
        report.formats.update(values["formats"])
        report.skipped.update(values["skipped"])
        for line in values["guesses"]:
            report.guess(line)


def _take_back(taken: Taken, bio: _Bio, reasons: list[str]) -> None:
    """Recount a bio as one that its account has had before."""
    dropped: Counter[str] = taken.report.dropped
    if bio.reason < 0:
        taken.read -= 1
    else:
        dropped.subtract({reasons[bio.reason]: 1})
        taken.report.dropped = dropped = +dropped
    taken.cut -= bio.cut
    taken.invalid -= bio.invalid
    dropped[SAME_BIO] += 1


def _documents(part: Path, split: SplitName, lost: Rows) -> Iterator[tuple[NDArray[np.uint8], Rows]]:
    """Yield the documents of a split in a part, except the lost ones, block by block: the stream and the lengths."""
    if not (part / f"{split}.lengths").is_file():
        return
    first = SPLITS.index(split) << _NUMBER_BITS
    numbers = np.sort(lost) - first
    with open(part / f"{split}.lengths", "rb") as lengths_file, open(part / f"{split}.bin", "rb") as file:
        start = 0
        while block := lengths_file.read(4 * _DOCUMENTS_AT_ONCE):
            lengths = np.frombuffer(block, dtype="<u4").astype(np.int64)
            stream = np.frombuffer(file.read(int(lengths.sum()) + len(lengths)), dtype=np.uint8)
            inside = numbers[slice(*np.searchsorted(numbers, (start, start + len(lengths))))] - start
            start += len(lengths)
            if len(inside):
                keep = np.ones(len(lengths), dtype=bool)
                keep[inside] = False
                stream, lengths = stream[np.repeat(keep, lengths + 1)], lengths[keep]
            yield stream, lengths


def _lost_bios(part: Path) -> Iterator[_Bio]:
    lost = _lost(part, "bios")
    if len(lost):
        bios = _mapped(part / "bios", len(_Bio._fields))
        for row in lost:
            yield _Bio(*bios[row].tolist())


def _texts_of(part: Path, bios: list[_Bio]) -> Iterator[Rows]:
    """Yield the positions of each bio's texts, as copies: a mapped file would keep its folder on NFS alive."""
    if bios:
        texts = _mapped(part / "texts", 3)
        for bio in bios:
            yield np.array(texts[bio.first : bio.last, 2])


def _lost(part: Path, kind: Kind) -> Rows:
    """Return the items of a part that occur earlier, in the same or in an earlier part."""
    paths = [part / f"{name}_{kind}" for name in ("own", "lost")]
    found = [np.fromfile(path, dtype="<i8") for path in paths if path.is_file()]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *found]))


def _keep(target: Path, values: Rows) -> None:
    """Write numbers to a file that is complete or missing, since a task may run twice at once."""
    if not len(values):
        return
    partial = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    np.sort(values).astype("<i8").tofile(partial)
    os.replace(partial, target)


def _mapped(path: Path, width: int) -> Rows:
    """Return the numbers in a file in rows of ``width``, memory-mapped; empty if the file is missing."""
    if not path.is_file():
        return np.empty((0, width), dtype=np.int64)
    values: Rows = np.memmap(path, dtype="<i8", mode="r")
    return values.reshape(-1, width)


def _halves(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)
