"""Metrics of generated texts: valid UTF-8, diversity, and copies from the corpus.

Distinct n-grams and self-BLEU are over words, as in the literature. Words are separated by white space, and invalid
bytes count as white space. Copies are runs of bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytrain.utils.text import readable

MAX_ORDER = 4
"""Length in words of the longest n-grams that are counted."""
BLEU_EPSILON = 0.1
"""Matches that count where a sample shares no n-gram of some order with the others (method 1 of Chen & Cherry 2014)."""
BLOCK_BYTES = 1 << 26
"""Bytes of the corpus that are indexed at once. The index takes five times as much memory."""
SEARCHED_BYTES = 1 << 29
"""Maximum number of bytes of the corpus that are searched: in a larger corpus, evenly spaced blocks of it."""
QUERIES_AT_ONCE = 1 << 16
STRIDE = 16
"""Bytes that are compared at once."""
Integers = NDArray[np.int64]


def text_metrics(groups: Mapping[str, Sequence[bytes]], corpus: NDArray[np.uint8]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each group of at least one text, ready for JSON; they may copy from ``corpus``."""
    copies = find_copies([text for texts in groups.values() for text in texts], corpus)
    metrics = {}
    first = 0
    for name, texts in groups.items():
        runs = copies.runs[first : first + len(texts)]
        first += len(texts)
        words = [readable(text).split() for text in texts]
        metrics[name] = {
            "texts": len(texts),
            "mean_bytes": sum(map(len, texts)) / len(texts),
            "valid_utf8": valid_utf8(texts),
            **{f"distinct_{order}": distinct(words, order) for order in range(1, MAX_ORDER + 1)},
            "self_bleu": self_bleu(words),
            "copied_mean_bytes": sum(map(len, runs)) / len(texts),
            "copied_max_bytes": max(map(len, runs)),
            "copied_whole": sum(run == text != b"" for run, text in zip(runs, texts, strict=True)) / len(texts),
            "longest_copy": readable(max(runs, key=len)),
            "searched_bytes": copies.searched_bytes,
            "corpus_bytes": len(corpus),
        }
    return metrics


def valid_utf8(texts: Sequence[bytes]) -> float:
    """Return the share of texts that are valid UTF-8."""
    return sum(text.decode("utf-8", errors="ignore").encode() == text for text in texts) / len(texts)


def distinct(texts: Sequence[list[str]], order: int) -> float:
    """Return the share of distinct n-grams among all word n-grams of the texts (Li et al. 2016); 0 without any."""
    counts = Counter(gram for words in texts for gram in _ngrams(words, order))
    return len(counts) / max(1, counts.total())


def self_bleu(texts: Sequence[list[str]]) -> float:
    """Return the mean BLEU-4 of every text against all others (Zhu et al. 2018); 1 if all texts are the same.

    This is sentence BLEU with uniform weights and the closest reference length. Method 1 of Chen & Cherry (2014)
    smooths precisions of 0. The highest counts are stored once for all texts, so the time grows with the length of the
    texts and not with the square of their number.
    """
    orders = range(1, MAX_ORDER + 1)
    grams = [[Counter(_ngrams(words, order)) for order in orders] for words in texts]
    # n-gram -> its highest count in a text, the index of that text, and the highest count in any other text
    highest: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for owner, counters in enumerate(grams):
        for counter in counters:
            for gram, count in counter.items():
                first, first_owner, second = highest.get(gram, (0, -1, 0))
                if count > first:
                    highest[gram] = (count, owner, first)
                elif count > second:
                    highest[gram] = (first, first_owner, count)
    lengths = Counter(map(len, texts))
    total = 0.0
    for owner, (words, counters) in enumerate(zip(texts, grams, strict=True)):
        logs = 0.0
        for order, counter in zip(orders, counters, strict=True):
            matches: float = sum(
                min(count, second if first_owner == owner else first)
                for gram, count in counter.items()
                for first, first_owner, second in (highest[gram],)
            )
            if order == 1 and matches == 0:
                logs = -math.inf
                break
            logs += math.log((matches or BLEU_EPSILON) / max(1, counter.total())) / MAX_ORDER
        lengths[len(words)] -= 1
        others = (length for length, count in lengths.items() if count)
        closest = min(others, key=lambda length: (abs(length - len(words)), length), default=len(words))
        lengths[len(words)] += 1
        penalty = min(0.0, 1 - closest / len(words)) if words else 0.0
        total += math.exp(logs + penalty)
    return total / len(texts)


def _ngrams(words: list[str], order: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(order)), strict=False))


# --------------------------------------------------------------------------------------------- copies


@dataclass(frozen=True)
class Copies:
    """The longest copies of texts from a corpus."""

    runs: list[bytes]
    """The longest run of each text that also occurs in the corpus; the first one if several are equally long."""
    searched_bytes: int
    """Bytes of the corpus that were searched: all of them, unless it is larger than the limit."""


def find_copies(
    texts: Sequence[bytes],
    corpus: NDArray[np.uint8],
    *,
    block_bytes: int = BLOCK_BYTES,
    searched_bytes: int = SEARCHED_BYTES,
) -> Copies:
    """Find the longest run of bytes that each text has in common with ``corpus`` [bytes], uint8, maybe memory-mapped.

    The corpus is indexed in blocks. All positions of all texts are looked up at once in the suffix array of each block.
    The time grows linearly with the corpus, and the memory with ``block_bytes`` alone. If the corpus is larger than
    ``searched_bytes``, only evenly spaced blocks are searched.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    joined = np.frombuffer(b"".join(texts) + bytes(STRIDE), dtype=np.uint8)
    ends = lengths.cumsum()
    room = np.repeat(ends, lengths) - np.arange(lengths.sum())
    common = np.zeros(len(room), dtype=np.int64)
    # a run that crosses the end of a block is whole in this block or in the next
    overlap = int(lengths.max(initial=1)) - 1
    starts = np.arange(0, len(corpus), block_bytes)
    if len(corpus) > searched_bytes:
        number = max(1, searched_bytes // block_bytes)
        starts = np.linspace(0, len(corpus) - block_bytes, number).astype(np.int64)
    for start in starts.tolist():
        # a copy in memory: the library refuses a read-only array
        index = _Index(np.array(corpus[start : start + block_bytes + overlap]))
        for locations in np.array_split(np.arange(len(room)), len(room) // QUERIES_AT_ONCE + 1):
            found = index.longest_matches(joined, locations, room[locations])
            common[locations] = np.maximum(common[locations], found)
    runs = []
    for text, parts in zip(texts, np.split(common, ends[:-1]), strict=True):
        start = int(parts.argmax()) if text else 0
        runs.append(text[start : start + int(parts.max(initial=0))])
    return Copies(runs, searched_bytes=min(len(corpus), len(starts) * block_bytes))


class _Index:
    """A suffix array over a block of the corpus, and the look-up of many positions in it."""

    def __init__(self, block: NDArray[np.uint8]) -> None:
        from pydivsufsort import divsufsort  # type: ignore[import-untyped]

        self.size = len(block)
        self.suffixes: NDArray[np.int32] = divsufsort(block)
        self.text = np.pad(block, (0, STRIDE))

    def longest_matches(self, joined: NDArray[np.uint8], locations: Integers, room: Integers) -> Integers:
        """Return the longest match of each of ``locations`` in ``joined`` (padded by STRIDE), at most ``room`` bytes.

        This is a binary search for all locations at once. It ends between the two suffixes next to the location's own
        and has compared it with both, so the longest of all comparisons is the longest match.
        """
        low, high = np.zeros_like(locations), np.full_like(locations, self.size)
        longest = np.zeros_like(locations)
        while (low < high).any():
            open_ = np.flatnonzero(low < high)
            middle = (low[open_] + high[open_]) // 2
            positions = self.suffixes[middle].astype(np.int64)
            common = self._common(positions, joined, locations[open_], room[open_])
            longest[open_] = np.maximum(longest[open_], common)
            # a suffix that ends while the two still agree sorts first; a text that ends there does not
            ends = positions + common == self.size
            smaller = self.text[positions + common] < joined[locations[open_] + common]
            before = (common < room[open_]) & (ends | smaller)
            low[open_[before]] = middle[before] + 1
            high[open_[~before]] = middle[~before]
        return longest

    def _common(self, positions: Integers, joined: NDArray[np.uint8], locations: Integers, room: Integers) -> Integers:
        """Return how many bytes match from each position of the block and its location onwards."""
        limit = np.minimum(room, self.size - positions)
        common = np.zeros_like(positions)
        active = np.arange(len(positions))
        steps = np.arange(STRIDE)
        while len(active):
            at = common[active, None] + steps
            same = self.text[positions[active, None] + at] == joined[locations[active, None] + at]
            run = np.where(same.all(1), STRIDE, same.argmin(1))
            common[active] += run
            active = active[(run == STRIDE) & (common[active] < limit[active])]
        return np.minimum(common, limit)
