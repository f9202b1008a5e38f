"""Batches: the samples of a step depend on (seed, step) alone, and are then sliced by rank into whole groups.

The samples of a stream are chunks of contiguous text. Each row of a batch is a lane, which continues where it ended in
the previous batch. The model carries its state over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytrain.config.schema import RunConfig
from raytrain.data.corpus import Corpus, Split
from raytrain.data.pieces import Vocabulary
from raytrain.data.pools import pools_of, room_of
from raytrain.data.vocabulary import PAD, STOP
from raytrain.utils.errors import UserError

BUCKET_WIDTH = 16
"""Documents share batches if their numbers of symbols round up to the same multiple of this."""
ROWS = 256
"""Documents that are gathered at once: the intermediate arrays then fit the processor's cache."""
EVALUATION_GROUPS = 8
"""Groups of samples per evaluation batch on a CPU."""
GPU_EVALUATION_GROUPS = 64
"""Groups of samples per evaluation batch on a GPU, which takes hardly longer for them."""
EVALUATION_LANES = 16
"""Lanes in which a stream is evaluated, for any number of workers; each lane costs a start without context."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch."""

    tokens: Tensor
    """[samples, length] int64: bytes or pieces; for documents followed by STOP, then PAD up to the batch's length."""
    groups: range
    """The numbers of its sample groups, in order: they seed the noise."""
    text_bytes: int
    """Bytes of text in it, excluding STOP and PAD."""
    previous: Tensor | None = None
    """[samples] int64, only for a stream: the symbol before each chunk; STOP at the start of a lane."""

    def numbers(self, group_size: int) -> Tensor:
        """Return the numbers [samples] of its samples; only the last group of all may be smaller than the others."""
        starts = torch.tensor([*self.groups])[:, None] * group_size
        return (starts + torch.arange(group_size)).flatten()[: len(self.tokens)]


class Samples:
    """The samples of a split that a run can draw: windows of its stream, chunks of it, or documents that fit."""

    def __init__(self, split: Split, config: RunConfig[Any], vocabulary: Vocabulary | None = None) -> None:
        """If ``vocabulary`` is ``None``, use the config's vocabulary from the split's corpus."""
        self.split = split
        self.vocabulary = vocabulary or split.vocabulary(config.vocabulary)
        self.length = config.length
        self.documents = config.sampling == "documents"
        self.stream = config.sampling == "stream"
        self.text: NDArray[np.unsignedinteger[Any]] = split.stream if self.stream else split.scattered
        """The text that samples are cut from, in its best form for reading: bytes, or the pieces of a stream."""
        self.chunk = config.length
        """Symbols per chunk: as many as ``length`` bytes hold on average."""
        if self.stream and not self.vocabulary.is_bytes:
            self.text = split.in_pieces(self.vocabulary)
            self.chunk = max(1, round(config.length * len(self.text) / len(split.stream)))
        if self.documents:
            # a document takes its bytes and a STOP; longer ones are left out here and in evaluation
            self.count = split.length_range(0, config.length)[1]
            shortage = f"no document of at most {config.length - 1} bytes"
        else:
            # windows start anywhere; chunks are consecutive, and the last may be shorter
            size = len(self.text)
            self.count = -(-size // self.chunk) if self.stream else size - config.length + 1
            shortage = f"{len(split.stream)} bytes"
        if self.count < 1:
            raise UserError(
                f"the {split.name} split has {shortage}, less than one sample of length {config.length}: "
                "give more text or another --length"
            )

    @property
    def too_long(self) -> int:
        """Number of documents left out because they do not fit."""
        return self.split.num_documents - self.count if self.documents else 0

    def tokens(self, positions: np.ndarray, length: int) -> tuple[Tensor, int]:
        """Return the tokens [len(positions), length] of the samples at ``positions``, and their bytes of text.

        A stream wraps around at its end; no window reaches beyond the end. There are fewer longer pieces than bytes, so
        with these the tokens are only as wide as the longest sample. Chunks of a stream have ``length`` pieces each.
        """
        tokens, text_bytes = self._uncut_tokens(positions, length)
        if self.vocabulary.is_bytes:
            return tokens, text_bytes
        if self.stream:
            return tokens, int(self.vocabulary.lengths[tokens].sum())
        rows = self.vocabulary.encode([bytes(row[row < STOP].tolist()) for row in tokens])
        pieces = np.full((len(rows), max(map(len, rows)) + self.documents), PAD, dtype=np.int64)
        for row, symbols in zip(pieces, rows, strict=True):
            row[: len(symbols)] = symbols
            if self.documents:
                row[len(symbols)] = STOP
        return torch.from_numpy(pieces), text_bytes

    def _uncut_tokens(self, positions: np.ndarray, length: int) -> tuple[Tensor, int]:
        if not self.documents:
            places = (positions[:, None] + np.arange(length)) % len(self.text)
            tokens = self.text[places].astype(np.int64)
            return torch.from_numpy(tokens), tokens.size
        numbers = self.split.by_length[positions]
        starts, sizes = self.split.offsets[numbers], self.split.lengths(numbers)
        tokens = np.empty((len(positions), length), dtype=np.int64)
        columns, last = np.arange(length), len(self.text) - 1
        for first in range(0, len(tokens), ROWS):
            rows = slice(first, first + ROWS)
            # symbols read beyond a document's end are dropped; beyond the last document there is nothing to read
            text = self.text[np.minimum(starts[rows, None] + columns, last)]
            tokens[rows] = np.where(columns < sizes[rows, None], text, np.int64(PAD))
        tokens[np.arange(len(tokens)), sizes] = STOP
        return torch.from_numpy(tokens), int(sizes.sum())

    def previous(self, positions: np.ndarray, begins: bool) -> Tensor:
        """Return the symbols [len(positions)] before the chunks at ``positions``: STOP if the lanes start there."""
        before = np.full(len(positions), STOP) if begins else self.text[positions - 1].astype(np.int64)
        return torch.from_numpy(before)


class TrainingBatches:
    """The batch of every step, a pure function of (seed, step).

    Windows start anywhere with equal probability. For documents, a bucket of similar lengths is drawn with probability
    proportional to its number of documents; then documents are drawn from it with replacement. Every document is
    equally likely, and no permutation of the corpus is kept in memory. With ``pool_bytes``, all of this holds within a
    pool, from which as many samples are drawn as it has; then comes the next one.

    A stream is a ring of ``batch_size`` lanes with equally many symbols each. Each step reads the next chunk of every
    lane. At its end, a lane continues in the text of the next lane, so that nothing restarts. The order does not depend
    on the seed.
    """

    def __init__(self, corpus: Corpus, config: RunConfig[Any], vocabulary: Vocabulary | None = None) -> None:
        """If ``vocabulary``, a model's, is ``None``, use the config's vocabulary from the corpus."""
        self.config = config
        self._pools = pools_of(corpus, "train", config)
        self._pool = self._fetched = 0
        self._steps_of_pool = config.steps
        if self._pools is None:
            self._use(Samples(corpus.split("train"), config, vocabulary))
            return
        self._pools.require_room(room_of(corpus, "valid", config))
        self._steps_of_pool = self._pools.steps(config)
        self._use(Samples(self._pools.open(0), config, vocabulary))

    def _use(self, samples: Samples) -> None:
        """Draw from ``samples`` from now on."""
        config = self.config
        self.samples = samples
        self.buckets = [(0, samples.count)]
        self.lengths = [config.length]
        if samples.stream and len(samples.text) < config.batch_size * samples.chunk:
            size = len(samples.split.stream)
            raise UserError(
                f"the train split has {size} bytes, less than one chunk of {config.length} for each of "
                f"{config.batch_size} lanes: give more text, or a smaller --batch-size or --length"
            )
        if samples.documents:
            split = samples.split
            longest = int(split.lengths(split.by_length[-1:])[0])  # there are no buckets beyond it to fill
            edges = [*range(BUCKET_WIDTH, min(config.length, longest + BUCKET_WIDTH + 1), BUCKET_WIDTH), config.length]
            ranges = [split.length_range(low, high) for low, high in zip([0, *edges], edges, strict=False)]
            filled = [(part, edge) for part, edge in zip(ranges, edges, strict=True) if part[1] > part[0]]
            self.buckets, self.lengths = [part for part, _ in filled], [edge for _, edge in filled]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the slice of step ``step``'s batch for ``rank`` of ``world_size`` to compute.

        Raises:
            UserError: the corpus was altered since it was opened, or the next pool cannot be copied.
        """
        self._turn_to(step)
        self.samples.split.check()
        positions, length = self._draw(step)
        groups = rank_groups(self.config, rank, world_size)
        rows = group_rows(self.config, groups)
        own = positions[rows]
        tokens, text_bytes = self.samples.tokens(own, length)
        if world_size > 1 and not self.samples.vocabulary.is_bytes and not self.samples.stream:
            # as wide as the whole batch: the noise of a sample must not depend on its distribution over workers
            tokens = self.samples.tokens(positions, length)[0][rows]
        return Batch(tokens, groups, text_bytes, self.samples.previous(own, step == 0) if self.samples.stream else None)

    def _turn_to(self, step: int) -> None:
        """Open the pool of ``step``, and copy the one after it while this one is used."""
        if self._pools is None:
            return
        number = step // self._steps_of_pool
        if number != self._pool:
            self._use(Samples(self._pools.open(number), self.config, self.samples.vocabulary))
            self._pool = number
        # step 0 is also rehearsed by a run that goes on in another pool
        if step > 0 and self._fetched <= number and (number + 1) * self._steps_of_pool < self.config.steps:
            self._pools.fetch_ahead(number + 1)
            self._fetched = number + 1

    def _draw(self, step: int) -> tuple[np.ndarray, int]:
        if self.samples.stream:
            size, lanes, chunk = len(self.samples.text), self.config.batch_size, self.samples.chunk
            return (np.arange(lanes) * (size // lanes) + step * chunk) % size, chunk
        key = hashlib.blake2b(f"{self.config.seed}/{step}".encode(), digest_size=16).digest()
        # only random() is used, because its stream is stable across NumPy versions
        draws = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(
            self.config.batch_size + 1
        )
        bounds = np.array([stop for _, stop in self.buckets])
        bucket = int(np.searchsorted(bounds, draws[0] * self.samples.count, side="right"))
        start, stop = self.buckets[bucket]
        return start + (draws[1:] * (stop - start)).astype(np.int64), self.lengths[bucket]


def rank_groups(config: RunConfig[Any], rank: int, world_size: int) -> range:
    """Return the groups of a batch for ``rank`` to compute: whole groups, distributed as evenly as possible.

    Raises:
        UserError: there are more workers than groups.
    """
    num_groups = config.batch_size // config.group_size
    if world_size > num_groups:
        raise UserError(
            f"{world_size} workers cannot share a batch of {config.batch_size} samples "
            f"in groups of {config.group_size}: use at most {num_groups} workers or a larger --batch-size"
        )
    return range(num_groups * rank // world_size, num_groups * (rank + 1) // world_size)


def group_rows(config: RunConfig[Any], groups: range) -> slice:
    """Return which samples of a whole batch are in consecutive ``groups``; for a stream, which lanes."""
    return slice(groups.start * config.group_size, groups.stop * config.group_size)


class EvaluationBatches:
    """A fixed set of samples of a split, the same for every run with the same sampling and length.

    It has evenly spaced windows; or documents evenly spaced in the order of length, so that batches have little padding
    and the set has the split's distribution of lengths.

    A stream is cut into chunks, which are assigned to at most ``EVALUATION_LANES`` lanes of equally many chunks. The
    set consists of the first chunks of every lane, in reading order. Rank 0 reads all of them, because its model
    carries its state from one chunk to the next.
    """

    def __init__(
        self,
        split: Split,
        config: RunConfig[Any],
        num_samples: int | None = None,
        vocabulary: Vocabulary | None = None,
        groups_at_once: int = EVALUATION_GROUPS,
    ) -> None:
        """Choose the samples.

        Args:
            num_samples: maximum number of samples; all that there are (windows: without overlap) if None.
            vocabulary: a model's vocabulary; the config's vocabulary from the split's corpus if None.
            groups_at_once: groups of samples per batch.
        """
        self.groups_at_once = groups_at_once
        self.samples = Samples(split, config, vocabulary)
        self.config = config
        available = len(split.stream) // config.length if config.sampling == "windows" else self.samples.count
        self.num_samples = min(available, num_samples or available)
        self.is_whole = self.num_samples == available
        """Whether these are all the samples that there are."""
        if self.samples.stream:
            self.chunks_of_lane = -(-available // EVALUATION_LANES)
            lanes = -(-available // self.chunks_of_lane)
            in_order = np.arange(lanes * self.chunks_of_lane).reshape(lanes, -1).T.ravel()
            self.positions = self.samples.chunk * in_order[in_order < available][: self.num_samples]
        else:
            self.positions = np.linspace(0, self.samples.count - 1, self.num_samples).astype(np.int64)

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield the batches that ``rank`` evaluates; every sample is in exactly one rank's share.

        The rows of a stream's batches are lanes. Later batches may have fewer rows, once the last lanes have ended.

        Raises:
            UserError: the corpus was altered since it was opened.
        """
        self.samples.split.check()
        if self.samples.stream:
            yield from self._chunks() if rank == 0 else ()
            return
        size = self.config.group_size
        groups = range(rank, -(-self.num_samples // size), world_size)
        for first in range(0, len(groups), self.groups_at_once):
            chosen = groups[first : first + self.groups_at_once]
            positions = np.concatenate([self.positions[group * size : (group + 1) * size] for group in chosen])
            tokens, text_bytes = self.samples.tokens(positions, self._length(positions))
            yield Batch(tokens, chosen, text_bytes)

    def sequences(self) -> list[np.ndarray]:
        """Return the symbols of each sample; for a stream, those of each lane, whose chunks are consecutive."""
        batches = [[row[row != PAD] for row in batch.tokens.numpy()] for batch in self.batches()]
        if not self.samples.stream:
            return [row for rows in batches for row in rows]
        return [np.concatenate([rows[lane] for rows in batches if lane < len(rows)]) for lane in range(len(batches[0]))]

    def _chunks(self) -> Iterator[Batch]:
        """Yield the chunks of a stream, one batch for all lanes; PAD fills up the chunk at the end of the text."""
        length, numbers = self.samples.chunk, self.positions // self.samples.chunk
        for number in range(self.chunks_of_lane):
            positions = self.positions[numbers % self.chunks_of_lane == number]
            if len(positions) == 0:
                return
            tokens, _ = self.samples.tokens(positions, length)
            beyond = max(0, int(positions[-1]) + length - len(self.samples.text))
            tokens[-1, length - beyond :] = PAD
            text_bytes = int(self.samples.vocabulary.lengths[tokens].sum())
            groups = range(-(-len(positions) // self.config.group_size))
            yield Batch(tokens, groups, text_bytes, self.samples.previous(positions, number == 0))

    def _length(self, positions: np.ndarray) -> int:
        if not self.samples.documents:
            return self.config.length
        split = self.samples.split
        return int(split.lengths(split.by_length[positions]).max()) + 1
