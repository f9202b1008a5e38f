from __future__ import annotations

import collections
import mmap
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytrain.config.schema import RunConfig
from raytrain.data.batches import BUCKET_WIDTH, EVALUATION_LANES, ROWS, EvaluationBatches, Samples, TrainingBatches
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.data.vocabulary import PAD, STOP
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config

WINDOWS = {"sampling": "windows", "length": 24}
DOCUMENTS = {"sampling": "documents", "length": 128}
STREAM = {"sampling": "stream", "length": 24}
SAMPLINGS = pytest.mark.parametrize("sampling", [WINDOWS, DOCUMENTS], ids=["windows", "documents"])
ALL_SAMPLINGS = pytest.mark.parametrize(
    "sampling", [WINDOWS, DOCUMENTS, STREAM], ids=["windows", "documents", "stream"]
)


def config(**changes: Any) -> RunConfig[Any]:
    return tiny_config("byte_lstm", **changes)


@ALL_SAMPLINGS
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_number_of_workers_sees_the_same_samples_in_the_same_order(
    corpus: Corpus, sampling: dict[str, Any], world_size: int
) -> None:
    batches = TrainingBatches(corpus, config(**sampling))
    for step in (0, 1, 17, 1000):
        whole = batches.batch(step)
        parts = [batches.batch(step, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert [group for part in parts for group in part.groups] == list(whole.groups)
        assert sum(part.text_bytes for part in parts) == whole.text_bytes
        if whole.previous is not None:
            assert torch.equal(
                torch.cat([part.previous for part in parts if part.previous is not None]), whole.previous
            )


@SAMPLINGS
def test_a_step_is_a_pure_function_of_seed_and_step(corpus: Corpus, sampling: dict[str, Any]) -> None:
    first, again = (TrainingBatches(corpus, config(**sampling)) for _ in range(2))
    again.batch(99)  # whatever was asked before makes no difference
    assert torch.equal(first.batch(5).tokens, again.batch(5).tokens)
    assert not torch.equal(first.batch(5).tokens, first.batch(6).tokens)
    other = TrainingBatches(corpus, config(**sampling, seed=1))
    assert not torch.equal(first.batch(5).tokens, other.batch(5).tokens)


def test_windows_are_slices_of_the_stream(corpus: Corpus) -> None:
    text = corpus.split("train").stream.tobytes()
    batch = TrainingBatches(corpus, config(**WINDOWS)).batch(0)
    assert batch.tokens.shape == (64, 24)
    assert batch.text_bytes == 64 * 24
    assert all(bytes(row.tolist()) in text for row in batch.tokens)


def test_documents_are_whole_and_share_a_bucket(corpus: Corpus) -> None:
    split = corpus.split("train")
    texts = {split.document(number) for number in range(split.num_documents)}
    batches = TrainingBatches(corpus, config(**DOCUMENTS))
    for step in range(20):
        batch = batches.batch(step)
        lengths = (batch.tokens != PAD).sum(1)
        assert all(
            bytes(row[: length - 1].tolist()) in texts for row, length in zip(batch.tokens, lengths, strict=True)
        )
        assert (batch.tokens.gather(1, lengths[:, None] - 1) == STOP).all()
        assert batch.text_bytes == int((batch.tokens < STOP).sum())
        assert int(lengths.min()) > batch.tokens.shape[1] - BUCKET_WIDTH


def test_documents_are_equally_likely(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", name="c", source="test") as writer:
        for length in (3, 4, 20, 21, 22, 40):
            writer.add("train", bytes([length]) * length)
        writer.add("valid", b"x")
    batches = TrainingBatches(Corpus.open(tmp_path / "c"), config(sampling="documents", length=64))
    counts = collections.Counter(int(row[0]) for step in range(600) for row in batches.batch(step).tokens)
    shares = np.array([counts[length] for length in (3, 4, 20, 21, 22, 40)]) / counts.total()
    # 600 draws of a bucket: the standard error of the largest bucket's share is 0.02
    assert np.abs(shares - 1 / 6).max() < 0.04


def test_over_long_documents_are_left_out_in_training_and_evaluation(corpus: Corpus) -> None:
    short = config(sampling="documents", length=40)
    batches = TrainingBatches(corpus, short)
    split = corpus.split("train")
    fitting = int((split.lengths(np.arange(split.num_documents)) <= 39).sum())
    assert 0 < fitting < split.num_documents
    assert batches.samples.count == fitting
    assert batches.samples.too_long == split.num_documents - fitting
    assert all(batches.batch(step).tokens.shape[1] <= 40 for step in range(20))
    evaluation = EvaluationBatches(corpus.split("valid"), short)
    assert all(batch.tokens.shape[1] <= 40 for batch in evaluation.batches())


@ALL_SAMPLINGS
@pytest.mark.parametrize("num_samples", [10, 100, None])
@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_is_the_same_set_whoever_does_it(
    corpus: Corpus, sampling: dict[str, Any], num_samples: int | None, world_size: int
) -> None:
    batches = EvaluationBatches(corpus.split("valid"), config(**sampling), num_samples)

    def rows(rank: int, size: int) -> list[tuple[int, ...]]:
        return [
            tuple(token for token in row.tolist() if token != PAD)
            for batch in batches.batches(rank, size)
            for row in batch.tokens
        ]

    whole = rows(0, 1)
    assert len(whole) == batches.num_samples
    parts = [row for rank in range(world_size) for row in rows(rank, world_size)]
    assert collections.Counter(parts) == collections.Counter(whole)


def text_of(folder: Path, num_bytes: int) -> Corpus:
    """A corpus whose two splits are streams of so many bytes, no two places of which look alike."""
    random = np.random.default_rng(0)
    text = bytes(random.integers(97, 123, num_bytes - 1).astype(np.uint8))
    with CorpusWriter(folder, name="text", source="test") as writer:
        for split in ("train", "valid"):
            writer.add(split, text)  # type: ignore[arg-type]
    return Corpus.open(folder)


def test_each_lane_of_a_stream_reads_on_and_round(tmp_path: Path) -> None:
    """Lane i begins in the text of its own, goes on in that of lane i + 1, and never begins anew."""
    corpus = text_of(tmp_path / "text", 1003)
    text = corpus.split("train").stream[:]
    batches = TrainingBatches(corpus, config(**STREAM, batch_size=32))
    read = [batches.batch(step) for step in range(100)]  # 2,400 bytes: more than twice round
    tokens = torch.cat([batch.tokens for batch in read], dim=1).numpy()
    starts = np.arange(32) * (1003 // 32)
    assert (tokens == text[(starts[:, None] + np.arange(2400)) % 1003]).all()
    assert read[0].previous is not None
    assert (read[0].previous == STOP).all()
    for before, batch in pairwise(read):
        assert batch.previous is not None
        assert torch.equal(batch.previous, before.tokens[:, -1])
    assert {batch.text_bytes for batch in read} == {32 * 24}


@pytest.mark.parametrize("num_bytes", [2, 23, 24, 25, 16 * 24, 16 * 24 + 1, 1003])
@pytest.mark.parametrize("group_size", [8, 64])
def test_a_stream_is_evaluated_whole_and_without_a_break_in_a_lane(
    tmp_path: Path, num_bytes: int, group_size: int
) -> None:
    valid = text_of(tmp_path / "text", num_bytes).split("valid")
    batches = EvaluationBatches(valid, config(**STREAM, group_size=group_size))
    read = list(batches.batches())
    # every byte once: the lanes stand one after the other in the text
    lanes = batches.sequences()
    assert np.array_equal(np.concatenate(lanes), valid.stream)
    assert len(lanes) <= EVALUATION_LANES
    assert sum(batch.text_bytes for batch in read) == num_bytes
    assert sum(len(batch.tokens) for batch in read) == batches.num_samples == -(-num_bytes // 24)
    assert read[0].previous is not None
    assert (read[0].previous == STOP).all()
    for before, batch in pairwise(read):
        assert batch.previous is not None
        assert torch.equal(batch.previous, before.tokens[: len(batch.tokens), -1])
    assert all(len(batch.groups) == -(-len(batch.tokens) // group_size) for batch in read)


def test_an_evaluation_of_few_samples_reads_the_beginnings_of_all_lanes(corpus: Corpus) -> None:
    valid = corpus.split("valid")
    few, whole = (EvaluationBatches(valid, config(**STREAM), number) for number in (40, None))
    assert [len(batch.tokens) for batch in few.batches()] == [16, 16, 8]
    for batch, longer in zip(few.batches(), whole.batches(), strict=False):
        assert torch.equal(batch.tokens, longer.tokens[: len(batch.tokens)])
    assert few.num_samples == 40


def test_a_corpus_shorter_than_one_sample_is_refused(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", name="c", source="test") as writer:
        writer.add("train", b"a" * 50)
        writer.add("valid", b"b" * 10)
    corpus = Corpus.open(tmp_path / "c")
    with pytest.raises(UserError, match="train split has 51 bytes, less than one sample of length 60"):
        TrainingBatches(corpus, config(length=60))
    with pytest.raises(UserError, match="train split has no document of at most 39 bytes"):
        TrainingBatches(corpus, config(sampling="documents", length=40))
    with pytest.raises(UserError, match="valid split"):
        EvaluationBatches(corpus.split("valid"), config(length=24))
    with pytest.raises(UserError, match="train split has 51 bytes, less than one chunk of 24 for each of 64 lanes"):
        TrainingBatches(corpus, config(**STREAM))


def test_more_workers_than_groups_are_refused(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="5 workers cannot share a batch of 64"):
        TrainingBatches(corpus, config()).batch(0, 4, 5)


def test_documents_are_gathered_as_one_by_one(corpus: Corpus) -> None:
    """More than are gathered at once, the last document of the stream and one that fills its row among them."""
    samples = Samples(corpus.split("train"), config(**DOCUMENTS))
    split = samples.split
    positions = np.random.default_rng(0).integers(0, samples.count, 2 * ROWS + 3)
    positions[5] = int(np.flatnonzero(split.by_length[: samples.count] == split.by_length[: samples.count].max())[0])
    length = int(split.lengths(split.by_length[positions]).max()) + 1
    tokens, text_bytes = samples.tokens(positions, length)
    texts = [split.document(number) for number in split.by_length[positions]]
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[*text, STOP] + [PAD] * (length - len(text) - 1) for text in texts]
    assert text_bytes == sum(map(len, texts))


@SAMPLINGS
def test_a_text_that_memory_cannot_hold_is_read_without_reading_ahead(
    corpus: Corpus, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives the same batches; what is read from end to end is mapped as ever."""
    held = Corpus.open(corpus.path)
    assert held.split("train").scattered is held.split("train").stream
    size, asked = len(corpus.split("train").stream), list[int]()
    monkeypatch.setattr("raytrain.data.corpus.free_memory", lambda: 1.9 * size)
    monkeypatch.setattr("raytrain.data.corpus.advise", lambda stream, advice: asked.append(advice))
    large = Corpus.open(corpus.path)
    split = large.split("train")
    assert asked == [mmap.MADV_RANDOM]
    assert split.scattered is not split.stream
    found, expected = (TrainingBatches(each, config(**sampling)) for each in (large, held))
    assert found.samples.text is split.scattered
    assert torch.equal(found.batch(3).tokens, expected.batch(3).tokens)
