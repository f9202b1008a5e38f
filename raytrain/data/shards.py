"""Shards of a split: consecutive whole documents of about 8 MiB, which can be read on their own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytrain.data.corpus import Corpus, Split
from raytrain.utils.validation import validate_type

SHARD_BYTES = 8 * 2**20
FILE = "shards.json"
"""File beside a published corpus: where its shards start, and their checksums."""


@dataclass(frozen=True)
class Shards:
    """Where the shards of a split begin and end."""

    documents: NDArray[np.int64]
    """[shards + 1]: the first document of each, and the number of documents."""
    starts: NDArray[np.int64]
    """[shards + 1]: where each starts in ``SPLIT.bin``, and the size of that file."""
    sums: list[str]
    """The SHA-256 checksum of each shard's bytes and offsets; empty for files of this machine."""

    def __len__(self) -> int:
        return len(self.documents) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[shards]: the bytes that each takes in a copy, with its offsets and its order by length."""
        return np.diff(self.starts) + 16 * np.diff(self.documents)


def cut(split: Split) -> Shards:
    """Return the shards of a split: the documents that start in the same ``SHARD_BYTES`` bytes form one.

    A last one of less than half as many bytes belongs to the one before it.
    """
    offsets = split.offsets
    size = int(offsets[-1])
    bounds = np.arange(0, max(1, size - SHARD_BYTES // 2), SHARD_BYTES)
    firsts = np.unique(np.searchsorted(offsets[:-1], bounds))
    documents = np.append(firsts[firsts < split.num_documents], split.num_documents).astype(np.int64)
    return Shards(documents, np.asarray(offsets[documents]), [])


def checksum(text: bytes, offsets: bytes) -> str:
    """Return the checksum of a shard: of its part of ``SPLIT.bin`` and then that of ``SPLIT.offsets``."""
    digest = hashlib.sha256(text)
    digest.update(offsets)
    return digest.hexdigest()


def table(corpus: Corpus) -> bytes:
    """Return the content of the file ``shards.json`` of a corpus on this machine, with checksums."""
    values = {}
    for name in corpus.splits:
        split = corpus.split(name)
        shards = cut(split)
        sums = [
            checksum(
                split.stream[shards.starts[number] : shards.starts[number + 1]].tobytes(),
                split.offsets[shards.documents[number] : shards.documents[number + 1] + 1].tobytes(),
            )
            for number in range(len(shards))
        ]
        values[name] = {"documents": shards.documents.tolist(), "starts": shards.starts.tolist(), "sha256": sums}
    return json.dumps(values).encode()


def from_table(values: Any, name: str) -> Shards:
    """Return the shards of a split from the values in ``shards.json``.

    Raises:
        ValueError, KeyError: they are not those of shards; the message names the field.
    """
    entry = validate_type(values, dict[str, dict[str, Any]], "shards")[name]
    documents = np.array(validate_type(entry["documents"], list[int], "documents"), dtype=np.int64)
    starts = np.array(validate_type(entry["starts"], list[int], "starts"), dtype=np.int64)
    sums = validate_type(entry["sha256"], list[str], "sha256")
    if not len(documents) == len(starts) == len(sums) + 1 > 1:
        raise ValueError("the numbers of documents, starts and sums do not fit each other")
    if documents[0] or starts[0] or (np.diff(documents) < 1).any() or (np.diff(starts) < 1).any():
        raise ValueError("documents and starts must grow from 0")
    return Shards(documents, starts, sums)
