"""The n-grams that models are held against: their probabilities, where samples begin, and how much is counted."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from raytrain.analysis import ngrams
from raytrain.analysis.ngrams import Ladder, measure_ngrams
from raytrain.data import batches
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus, CorpusWriter
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

    def __init__(self, sequences: list[list[int]], order: int, documents: bool) -> None:
        self.order, self.documents = order, documents
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
            return 1 / (257 if self.documents else 256)
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


@SAMPLINGS
def test_the_bits_are_those_of_the_formula(sampling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "EVALUATION_LANES", 1)
    random = np.random.default_rng(0)
    texts = [bytes(random.choice(list(b"abc"), random.integers(3, 12))) for _ in range(40)]
    corpus = a_corpus(tmp_path / "corpus", texts, [b"abcab", b"ccb", b"a", b"dab"])
    config = tiny_config("byte_lstm", sampling=sampling, length=6)
    samples = EvaluationBatches(corpus.split("valid"), config)
    ladder = measure_ngrams(corpus.split("train"), samples)
    stream = corpus.split("train").stream.tolist()
    sequences = [[*text, 256] for text in texts] if sampling == "documents" else [stream]
    counts = Counts(sequences, 3, sampling == "documents")
    rows = [[token for token in row if token <= 256] for batch in samples.batches() for row in batch.tokens.tolist()]
    if sampling == "stream":  # no chunk begins anew
        rows = [corpus.split("valid").stream.tolist()]
    num_bytes = sum(token < 256 for row in rows for token in row)
    for order in range(4):
        nats = -sum(math.log(counts.probability(row, place, order)) for row in rows for place in range(len(row)))
        assert ladder.bits[order] == pytest.approx(nats / math.log(2) / num_bytes), order
    assert (ladder.counted, ladder.available) == (
        sum(map(len, sequences)) - (40 if sampling == "documents" else 0),
    ) * 2


@SAMPLINGS
def test_longer_contexts_help_until_they_are_seldom_seen(sampling: str, corpus: Corpus) -> None:
    config = tiny_config("byte_lstm", sampling=sampling, length=64)
    ladder = measure_ngrams(corpus.split("train"), EvaluationBatches(corpus.split("valid"), config, 256))
    assert list(ladder.bits[:5]) == sorted(ladder.bits[:5], reverse=True)
    assert ladder.bits[0] > 4.5
    assert 0.5 < ladder.bits[ladder.best] < 1.2  # the grammar's entropy is 0.52
    text = f"byte {ladder.best + 1}-gram {min(ladder.bits):.3f} bits/byte"
    assert ladder.verdict(2 * min(ladder.bits)) == f"counting is better: {text}; the model needs 100.0% more"
    assert ladder.verdict(min(ladder.bits) / 2) == f"better than counting: {text}; the model needs 50.0% less"


@SAMPLINGS
def test_what_is_not_counted_is_said(sampling: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "COUNTED", 1 << 16)
    monkeypatch.setattr(ngrams, "STRETCHES", 8)
    config = tiny_config("byte_lstm", sampling=sampling, length=64)
    ladder = measure_ngrams(corpus.split("train"), EvaluationBatches(corpus.split("valid"), config, 64))
    available = corpus.split("train").num_bytes if sampling == "documents" else len(corpus.split("train").stream)
    assert ladder.available == available
    assert (1 << 16) * 0.9 < ladder.counted <= 1 << 16
    assert str(ladder).endswith(f"({ladder.counted} of {available} bytes counted)")
    assert Ladder((2.0, 1.0), 5, 5).best == 1
