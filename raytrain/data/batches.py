"""Batches: the samples of a step follow from (seed, step) alone, then are cut by rank into slices of whole groups."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrain.config.schema import RunConfig
from raytrain.data.corpus import Corpus, Split
from raytrain.data.vocabulary import PAD, STOP
from raytrain.utils.errors import UserError

BUCKET_WIDTH = 16
"""Documents whose numbers of symbols round up to the same multiple of this share batches."""
EVALUATION_GROUPS = 8
"""Groups of samples that are evaluated at once."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch."""

    tokens: Tensor
    """[samples, length] int64: bytes; a document then has STOP, then PAD up to the batch's length."""
    groups: range
    """The numbers of the sample groups in it, in order: they seed the noise."""
    text_bytes: int
    """Bytes of text in it, STOP and PAD not counted."""

    def numbers(self, group_size: int) -> Tensor:
        """Return the numbers [samples] of its samples; only the last group of all may have fewer than the others."""
        starts = torch.tensor([*self.groups])[:, None] * group_size
        return (starts + torch.arange(group_size)).flatten()[: len(self.tokens)]


class Samples:
    """The samples of a split that a run can draw: windows of its stream, or its documents that fit."""

    def __init__(self, split: Split, config: RunConfig[Any]) -> None:
        self.split = split
        self.length = config.length
        self.windows = config.sampling == "windows"
        if self.windows:
            self.count = len(split.stream) - config.length + 1
            shortage = f"{len(split.stream)} bytes"
        else:
            # a document takes its bytes and a STOP; longer ones are left out, here as in evaluation
            self.count = split.length_range(0, config.length)[1]
            shortage = f"no document of at most {config.length - 1} bytes"
        if self.count < 1:
            raise UserError(
                f"the {split.name} split has {shortage}, less than one sample of length {config.length}: "
                "give more text or another --length"
            )

    @property
    def too_long(self) -> int:
        """Documents that are left out because they do not fit."""
        return 0 if self.windows else self.split.num_documents - self.count

    def tokens(self, positions: np.ndarray, length: int) -> tuple[Tensor, int]:
        """Tokens [len(positions), length] of the samples at ``positions``, and their bytes of text."""
        if self.windows:
            tokens = self.split.stream[positions[:, None] + np.arange(length)].astype(np.int64)
            return torch.from_numpy(tokens), tokens.size
        tokens = np.full((len(positions), length), PAD, dtype=np.int64)
        text_bytes = 0
        for row, number in zip(tokens, self.split.by_length[positions], strict=True):
            start, end = self.split.offsets[number], self.split.offsets[number + 1] - 1
            row[: end - start] = self.split.stream[start:end]
            row[end - start] = STOP
            text_bytes += int(end - start)
        return torch.from_numpy(tokens), text_bytes


class TrainingBatches:
    """The batch of every step, a pure function of (seed, step).

    Windows start anywhere with equal probability. For documents a bucket of similar lengths is drawn
    by the number of documents in it, then documents of it with replacement: every document is as
    likely as any other, and no permutation of the corpus is kept in memory.
    """

    def __init__(self, corpus: Corpus, config: RunConfig[Any]) -> None:
        self.samples = Samples(corpus.split("train"), config)
        self.config = config
        self.buckets = [(0, self.samples.count)]
        self.lengths = [config.length]
        if not self.samples.windows:
            split = self.samples.split
            longest = int(split.lengths(split.by_length[-1:])[0])  # beyond it there are no buckets to fill
            edges = [*range(BUCKET_WIDTH, min(config.length, longest + BUCKET_WIDTH + 1), BUCKET_WIDTH), config.length]
            ranges = [split.length_range(low, high) for low, high in zip([0, *edges], edges, strict=False)]
            filled = [(part, edge) for part, edge in zip(ranges, edges, strict=True) if part[1] > part[0]]
            self.buckets, self.lengths = [part for part, _ in filled], [edge for _, edge in filled]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the slice of step ``step``'s batch that ``rank`` of ``world_size`` computes.

        Raises:
            UserError: the corpus was altered since it was opened.
        """
        self.samples.split.check()
        positions, length = self._draw(step)
        groups = rank_groups(self.config, rank, world_size)
        size = self.config.group_size
        tokens, text_bytes = self.samples.tokens(positions[groups.start * size : groups.stop * size], length)
        return Batch(tokens, groups, text_bytes)

    def _draw(self, step: int) -> tuple[np.ndarray, int]:
        key = hashlib.blake2b(f"{self.config.seed}/{step}".encode(), digest_size=16).digest()
        # only random() is used: its stream is stable over NumPy versions
        draws = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(
            self.config.batch_size + 1
        )
        bounds = np.array([stop for _, stop in self.buckets])
        bucket = int(np.searchsorted(bounds, draws[0] * self.samples.count, side="right"))
        start, stop = self.buckets[bucket]
        return start + (draws[1:] * (stop - start)).astype(np.int64), self.lengths[bucket]


def rank_groups(config: RunConfig[Any], rank: int, world_size: int) -> range:
    """Return the groups of a batch that ``rank`` computes: whole groups, as even as they can be.

    Raises:
        UserError: more workers than groups.
    """
    num_groups = config.batch_size // config.group_size
    if world_size > num_groups:
        raise UserError(
            f"{world_size} workers cannot share a batch of {config.batch_size} samples "
            f"in groups of {config.group_size}: use at most {num_groups} workers or a larger --batch-size"
        )
    return range(num_groups * rank // world_size, num_groups * (rank + 1) // world_size)


class EvaluationBatches:
    """A fixed set of samples of a split, the same for every run with the same sampling and length.

    Evenly spaced windows; or documents evenly spaced in the order of length, so that batches have
    little padding and the set has the split's distribution of lengths.
    """

    def __init__(self, split: Split, config: RunConfig[Any], num_samples: int | None = None) -> None:
        """``num_samples``: how many at most; all that there are (windows: without overlap) if None."""
        self.samples = Samples(split, config)
        self.config = config
        available = len(split.stream) // config.length if self.samples.windows else self.samples.count
        self.num_samples = min(available, num_samples or available)
        self.positions = np.linspace(0, self.samples.count - 1, self.num_samples).astype(np.int64)

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield the batches that ``rank`` evaluates; every sample is in exactly one rank's share.

        Raises:
            UserError: the corpus was altered since it was opened.
        """
        self.samples.split.check()
        size = self.config.group_size
        groups = range(rank, -(-self.num_samples // size), world_size)
        for first in range(0, len(groups), EVALUATION_GROUPS):
            chosen = groups[first : first + EVALUATION_GROUPS]
            positions = np.concatenate([self.positions[group * size : (group + 1) * size] for group in chosen])
            tokens, text_bytes = self.samples.tokens(positions, self._length(positions))
            yield Batch(tokens, chosen, text_bytes)

    def _length(self, positions: np.ndarray) -> int:
        if self.samples.windows:
            return self.config.length
        split = self.samples.split
        return int(split.lengths(split.by_length[positions]).max()) + 1
