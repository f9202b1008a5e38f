from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytrain.config.schema import RunConfig
from raytrain.data.batches import BUCKET_WIDTH, EvaluationBatches, TrainingBatches
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.data.vocabulary import PAD, STOP
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config

WINDOWS = {"sampling": "windows", "length": 24}
DOCUMENTS = {"sampling": "documents", "length": 128}
SAMPLINGS = pytest.mark.parametrize("sampling", [WINDOWS, DOCUMENTS], ids=["windows", "documents"])


def config(**changes: Any) -> RunConfig[Any]:
    return tiny_config("byte_lstm", **changes)


@SAMPLINGS
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


@SAMPLINGS
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


def test_more_workers_than_groups_are_refused(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="5 workers cannot share a batch of 64"):
        TrainingBatches(corpus, config()).batch(0, 4, 5)
