"""The n-grams that models are held against: their probabilities, where samples begin, and how much is counted."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytrain.config.schema import RunConfig
from raytrain.data import batches
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.models import ngrams
from raytrain.models.ngrams import measure_ngrams
from tests.conftest import tiny_config

SAMPLINGS = pytest.mark.parametrize("sampling", ["windows", "documents", "stream"])


def a_corpus(folder: Path, train: list[bytes], valid: list[bytes]) -> Corpus:
    with CorpusWriter(folder, name="texts", source="tests") as writer:
        for split, texts in (("train", train), ("valid", valid)):
            for text in texts:
                writer.add(split, text)  # type: ignore[arg-type]
    return Corpus.open(folder)


class Counts:
    """The same model, as its formula is written: dictionaries of tuples."""

    def __init__(self, sequences: list[list[int]], order: int, documents: bool, pieces: int = 0) -> None:
        self.order, self.documents, self.pieces = order, documents, pieces
        self.grams: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
        for sequence in sequences:
            for place in range(len(sequence)):
                for length in range(order + 1):
                    if (context := self.context(sequence, place, length)) is not None:
                        self.grams[length][(*context, sequence[place])] += 1

    def context(self, sequence: list[int], place: int, length: int) -> list[int] | None:
        if not self.documents:
            return sequence[place - length : place] if place >= length else None
        return ([256] * length + sequence)[place : place + length]

    def probability(self, sequence: list[int], place: int, length: int) -> float:
        if length < 0:
            return 1 / ((257 if self.documents else 256) + self.pieces)
        shorter = self.probability(sequence, place, length - 1)
        context = self.context(sequence, place, length)
        if context is None:
            return shorter
        grams = self.grams[length]
        once, twice = (sum(count == number for count in grams.values()) for number in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        after = {gram: count for gram, count in grams.items() if list(gram[:-1]) == context}
        total = sum(after.values())
        if total == 0:
            return shorter
        count = after.get((*context, sequence[place]), 0)
        return (max(count - discount, 0) + discount * len(after) * shorter) / total


def bits_of(corpus: Corpus, config: RunConfig[Any], samples: int | None = None, **settings: int) -> tuple[float, ...]:
    return measure_ngrams(corpus.split("train"), EvaluationBatches(corpus.split("valid"), config, samples), **settings)[
        0
    ]


@SAMPLINGS
def test_the_bits_are_those_of_the_formula(sampling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "EVALUATION_LANES", 1)
    random = np.random.default_rng(0)
    texts = [bytes(random.choice(list(b"abc"), random.integers(1, 12))) for _ in range(40)]
    corpus = a_corpus(tmp_path / "corpus", texts, [b"abcab", b"ccb", b"a", b"dab"])
    config = tiny_config("byte_lstm", sampling=sampling, length=6)
    samples = EvaluationBatches(corpus.split("valid"), config)
    bits, counted = measure_ngrams(corpus.split("train"), samples)
    stream = corpus.split("train").stream.tolist()
    sequences = [[*text, 256] for text in texts] if sampling == "documents" else [stream]
    counts = Counts(sequences, 4, sampling == "documents")
    rows = [[token for token in row if token <= 256] for batch in samples.batches() for row in batch.tokens.tolist()]
    if sampling == "stream":  # no chunk begins anew
        rows = [corpus.split("valid").stream.tolist()]
    num_bytes = sum(token < 256 for row in rows for token in row)
    for order in range(5):
        nats = -sum(math.log(counts.probability(row, place, order)) for row in rows for place in range(len(row)))
        assert bits[order] == pytest.approx(nats / math.log(2) / num_bytes), order
    assert counted == sum(map(len, sequences)) - (40 if sampling == "documents" else 0)
    assert measure_ngrams(corpus.split("train"), samples, 2) == (bits[:3], counted)


@SAMPLINGS
@pytest.mark.parametrize("vocabulary", ["char", "bpe:280"])
def test_the_bits_of_pieces_are_those_of_the_formula(
    sampling: str, vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "EVALUATION_LANES", 1)
    random = np.random.default_rng(0)
    words = ["ab", "\u00e9\u00e8", "cab", "b\u00e9"]
    texts = [" ".join(random.choice(words, random.integers(1, 6))).encode() for _ in range(60)]
    corpus = a_corpus(tmp_path / "corpus", texts, [b"ab cab", "\u00e9\u00e8".encode(), "d b\u00e9".encode(), b"\xff"])
    config = tiny_config("byte_lstm", sampling=sampling, length=16, vocabulary=vocabulary)
    samples = EvaluationBatches(corpus.split("valid"), config)
    pieces = samples.samples.vocabulary
    bits, counted = measure_ngrams(corpus.split("train"), samples)
    documents = sampling == "documents"
    if documents:
        sequences = [[*symbols.tolist(), 256] for symbols in pieces.encode(texts)]
        rows = [
            [*symbols.tolist(), 256] for symbols in pieces.encode([corpus.split("valid").document(n) for n in range(4)])
        ]
    else:
        sequences = [pieces.encode([corpus.split("train").stream.tobytes()])[0].tolist()]
        valid = corpus.split("valid").stream.tobytes()
        starts = samples.positions.tolist()
        rows = [row.tolist() for row in pieces.encode([valid[start : start + 16] for start in starts])]
        if sampling == "stream":  # no chunk begins anew
            rows = [pieces.encode([valid])[0].tolist()]
    assert any(symbol > 258 for row in rows for symbol in row)
    counts = Counts(sequences, 4, documents, len(pieces.pieces))
    num_bytes = sum(len(pieces.decode(row)) for row in rows)
    for order in range(5):
        nats = -sum(math.log(counts.probability(row, place, order)) for row in rows for place in range(len(row)))
        assert bits[order] == pytest.approx(nats / math.log(2) / num_bytes), order
    assert counted == sum(map(len, texts)) + (0 if documents else len(texts))


@pytest.mark.parametrize("sampling", ["windows", "documents"])
def test_pieces_that_are_cut_in_parts_or_of_stretches_are_counted(
    sampling: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("byte_lstm", sampling=sampling, length=64, vocabulary="bpe:300")
    whole = bits_of(corpus, config, 64)
    assert min(whole) < min(bits_of(corpus, tiny_config("byte_lstm", sampling=sampling, length=64), 64)) * 1.1
    monkeypatch.setattr(ngrams, "BLOCK", 5000)
    # documents are whole in any part; text without them may be cut within a piece
    assert bits_of(corpus, config, 64) == (whole if sampling == "documents" else pytest.approx(whole, rel=0.01))
    monkeypatch.setattr(ngrams, "COUNTED", 1 << 16)
    monkeypatch.setattr(ngrams, "STRETCHES", 8)
    samples = EvaluationBatches(corpus.split("valid"), config, 64)
    bits, counted = measure_ngrams(corpus.split("train"), samples)
    assert (1 << 16) * 0.9 < counted <= 1 << 16
    assert bits != whole


@SAMPLINGS
def test_longer_contexts_help_until_they_are_seldom_seen(sampling: str, corpus: Corpus) -> None:
    bits = bits_of(corpus, tiny_config("byte_lstm", sampling=sampling, length=64), 256)
    assert list(bits[:5]) == sorted(bits[:5], reverse=True)
    assert bits[0] > 4.5
    assert 0.5 < min(bits) < 1.2  # the grammar's entropy is 0.52


@SAMPLINGS
def test_what_is_sorted_and_hashed_in_parts_is_the_same(
    sampling: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("byte_lstm", sampling=sampling, length=64)
    whole = bits_of(corpus, config, 64)
    monkeypatch.setattr(ngrams, "SORTED", 20_000)
    monkeypatch.setattr(ngrams, "BLOCK", 1000)
    assert bits_of(corpus, config, 64) == whole


@SAMPLINGS
def test_of_a_large_text_evenly_spaced_stretches_are_counted(
    sampling: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngrams, "COUNTED", 1 << 16)
    monkeypatch.setattr(ngrams, "STRETCHES", 8)
    config, train = tiny_config("byte_lstm", sampling=sampling, length=64), corpus.split("train")
    samples = EvaluationBatches(corpus.split("valid"), config, 64)
    bits, counted = measure_ngrams(train, samples)
    assert (1 << 16) * 0.9 < counted <= 1 << 16 < train.num_bytes
    assert (bits, counted) == measure_ngrams(train, samples)
    # they are from everywhere in the text
    monkeypatch.setattr(ngrams, "STRETCHES", 1)
    assert measure_ngrams(train, samples)[0] != bits


def test_documents_longer_than_a_stretch_are_counted_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = a_corpus(tmp_path / "corpus", [b"ab" * 400, b"ab" * 300, b"ab"], [b"abab"])
    monkeypatch.setattr(ngrams, "COUNTED", 600)
    monkeypatch.setattr(ngrams, "STRETCHES", 6)
    config = tiny_config("byte_lstm", sampling="documents", length=8)
    bits, counted = measure_ngrams(corpus.split("train"), EvaluationBatches(corpus.split("valid"), config))
    # of the six stretches of 100 bytes these documents begin in three: 100 and 82 bytes of the long ones, and the third
    assert counted == 100 + 82 + 2
    assert all(math.isfinite(value) for value in bits)
