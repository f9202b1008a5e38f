"""Cutting of a source into read tasks: the units that one process reads at a time, in the order of the source."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raytrain.data import readers
from raytrain.data.corpus import SplitName
from raytrain.data.documents import Source
from raytrain.data.files import Input, is_s3
from raytrain.data.reading import Reading
from raytrain.data.sources import File
from raytrain.utils.errors import UserError

SIZE = 32 * 2**20
"""Approximate bytes of a task's files; a file that cannot be cut may be larger."""


@dataclass(frozen=True)
class ReadTask:
    """Files that are read one after the other, or a part of one file."""

    files: tuple[File, ...]
    span: tuple[int, int] | None = None
    """Bytes [first, last) of the only file; the lines that start there are read; None: all."""

    @property
    def continues(self) -> bool:
        """Whether another task reads the start of the file."""
        return self.span is not None and self.span[0] > 0

    def documents(self, source: Source, reading: Reading) -> Iterator[tuple[SplitName | None, bytes]]:
        """Yield the documents, each with its split if the source assigns one.

        Raises:
            UserError: see ``readers.read``. The message gives line numbers in the whole file.
        """
        for split, item in self.files:
            with item.local() as local:
                try:
                    for text in readers.read(local, item.name, reading, item.found, self.span):
                        yield split, text
                except UserError:
                    if self.continues:
                        self._raise_with_line(local, item, source.reading())
                    raise

    def _raise_with_line(self, local: Path, item: Input, reading: Reading) -> None:
        assert self.span is not None
        before = readers.count_lines(local, item.name, self.span[0])
        for _ in readers.read(local, item.name, reading, item.found, self.span, before):
            pass


def read_tasks(files: list[File], size: int = SIZE) -> list[ReadTask]:
    """Return the tasks that together read ``files`` in their order.

    Large local files of lines are cut, others stay whole: quotes in CSV may enclose line ends, and a compressed file
    cannot be read from the middle. The scripts of an X archive in one folder belong to one task, since posts take their
    full texts from an earlier script.
    """
    tasks: list[ReadTask] = []
    pending: list[File] = []
    archive_ends = _archive_ends(files)
    held_until = -1
    for number, (split, item) in enumerate(files):
        held_until = max(held_until, archive_ends.get(number, -1))
        if number > held_until and item.size > 2 * size and can_be_cut(item):
            tasks += [ReadTask(tuple(pending))] if pending else []
            pending = []
            step = -(-size // readers.CHUNK) * readers.CHUNK
            tasks += [ReadTask(((split, item),), (start, start + step)) for start in range(0, item.size, step)]
            continue
        pending.append((split, item))
        if number >= held_until and sum(file.size for _, file in pending) >= size:
            tasks.append(ReadTask(tuple(pending)))
            pending = []
    return tasks + ([ReadTask(tuple(pending))] if pending else [])


def can_be_cut(item: Input) -> bool:
    """Return whether several tasks can read a file: a local file of lines, not compressed."""
    if is_s3(item.name):  # fetched as a whole
        return False
    with contextlib.suppress(OSError, UserError):  # reading it later reports the error
        return readers.has_lines(Path(item.name), item.name)
    return False


def _archive_ends(files: list[File]) -> dict[int, int]:
    """Return, by the number of the first script of each folder's X archive, that of its last script."""
    first: dict[str, int] = {}
    ends: dict[int, int] = {}
    for number, (_, item) in enumerate(files):
        if item.found and _is_script(item):
            folder = os.path.dirname(item.name)
            ends[first.setdefault(folder, number)] = number
    return ends


def _is_script(item: Input) -> bool:
    names = item.basename.lower().split(".")
    if "js" in names[1:]:
        return True
    if is_s3(item.name) or not {"json", "jsonl", "ndjson"} & set(names[1:]):
        return False
    return readers.is_script(Path(item.name), item.name)
