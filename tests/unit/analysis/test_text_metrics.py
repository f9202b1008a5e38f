from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raytrain.analysis.text_metrics import distinct, find_copies, self_bleu, text_metrics, valid_utf8


def stream(text: bytes) -> Any:
    return np.frombuffer(text, dtype=np.uint8)


def words(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


def naive_run(text: bytes, corpus: bytes) -> int:
    """The longest run of ``text`` in ``corpus``, by trying all."""
    pairs = ((start, end) for start in range(len(text)) for end in range(start + 1, len(text) + 1))
    return max((end - start for start, end in pairs if text[start:end] in corpus), default=0)


few_bytes = st.binary(max_size=40).map(lambda text: bytes(byte % 3 for byte in text))


@example([bytes(3)], bytes(3), 50)  # a suffix that ends is smaller than what goes on with a zero
@given(st.lists(few_bytes, min_size=1, max_size=4), few_bytes, st.integers(1, 50))
def test_the_longest_copy_is_what_a_naive_scan_finds(texts: list[bytes], corpus: bytes, block_bytes: int) -> None:
    found = find_copies(texts, stream(corpus), block_bytes=block_bytes)
    assert list(map(len, found.runs)) == [naive_run(text, corpus) for text in texts]
    assert all(run in corpus and run in text for run, text in zip(found.runs, texts, strict=True))
    assert found.searched_bytes == len(corpus)


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4), st.binary(max_size=300))
def test_any_bytes_can_be_searched(texts: list[bytes], corpus: bytes) -> None:
    found = find_copies(texts, stream(corpus))
    assert list(map(len, found.runs)) == [naive_run(text, corpus) for text in texts]


@pytest.mark.parametrize("block_bytes", [64, 1000, 1 << 26])
def test_a_planted_copy_is_found_exactly(block_bytes: int) -> None:
    generator = np.random.default_rng(0)
    corpus = generator.integers(0, 128, 20_000, dtype=np.uint8)
    texts = [generator.integers(128, 256, 50, dtype=np.uint8) for _ in range(20)]
    texts[7][9:40] = corpus[990 : 990 + 31]  # over the end of the block of 1000 bytes
    found = find_copies([text.tobytes() for text in texts], corpus, block_bytes=block_bytes)
    assert found.runs == [corpus[990:1021].tobytes() if number == 7 else b"" for number in range(20)]


def test_of_a_larger_corpus_evenly_spaced_blocks_are_searched() -> None:
    corpus = np.zeros(1000, dtype=np.uint8)
    corpus[0:3], corpus[300:303], corpus[997:1000] = (1, 2, 3), (4, 5, 6), (7, 8, 9)
    found = find_copies([b"\1\2\3", b"\4\5\6", b"\7\10\11"], corpus, block_bytes=100, searched_bytes=250)
    assert found.runs == [b"\1\2\3", b"", b"\7\10\11"]  # the first and the last hundred; what lies between is not seen
    assert found.searched_bytes == 200


def test_nothing_is_quadratic_in_the_texts_or_the_corpus() -> None:
    """A corpus of one repeated byte and texts of it: the worst case of a scan. 200 x 200 bytes in 1 MB."""
    corpus = np.full(1_000_000, 65, dtype=np.uint8)
    started = time.perf_counter()
    found = find_copies([b"A" * 200] * 200, corpus)
    assert found.runs == [b"A" * 200] * 200
    assert time.perf_counter() - started < 20  # 1 s on a free core


def test_empty_texts_copy_nothing() -> None:
    assert find_copies([b"", b"ab", b""], stream(b"xaby")).runs == [b"", b"ab", b""]
    found = text_metrics({"all": [b"", b""], "one": [b"ab"]}, stream(b"abc"))
    assert (found["all"]["copied_whole"], found["all"]["longest_copy"]) == (0, "")
    assert (found["one"]["copied_whole"], found["one"]["self_bleu"]) == (1, 0)


# ---------------------------------------------------------------------------------------------- words


def test_valid_utf8_is_counted_by_whole_texts() -> None:
    assert valid_utf8([b"plain", "naïve".encode(), b"cut \xc3", b"\xff"]) == 0.5
    assert valid_utf8([b"", b"\xed\xa0\x80"]) == 0.5  # a surrogate is not UTF-8


def test_distinct_ngrams_are_of_words() -> None:
    texts = words("a b a b", "a b c")
    assert distinct(texts, 1) == 3 / 7
    assert distinct(texts, 2) == 3 / 5  # ab, ba, bc of ab ba ab ab bc
    assert distinct(texts, 3) == 3 / 3
    assert distinct(texts, 4) == 1
    assert distinct(words("a", ""), 2) == 0


def plain_bleu(texts: list[list[str]]) -> float:
    """Self-BLEU by its definition, every text against every other."""

    def grams(text: list[str], order: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(text[start : start + order]) for start in range(len(text) - order + 1))

    scores = []
    for number, text in enumerate(texts):
        others = texts[:number] + texts[number + 1 :]
        score = 1.0
        for order in range(1, 5):
            own = grams(text, order)
            best: Counter[tuple[str, ...]] = Counter()
            for other in others:
                best |= grams(other, order)
            matches: float = (own & best).total()
            if order == 1 and matches == 0:
                score = 0.0
            score *= ((matches or 0.1) / max(1, own.total())) ** 0.25
        closest = min((len(other) for other in others), key=lambda length: (abs(length - len(text)), length))
        if text and len(text) < closest:
            score *= math.exp(1 - closest / len(text))
        scores.append(score)
    return sum(scores) / len(scores)


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=12), min_size=2, max_size=6))
def test_self_bleu_is_what_its_definition_says(texts: list[list[str]]) -> None:
    assert self_bleu(texts) == pytest.approx(plain_bleu(texts))


def test_self_bleu_is_that_of_nltk() -> None:
    """The figure of nltk 3.10.4's sentence_bleu with SmoothingFunction().method1, mean over the texts."""
    texts = words(
        "the cat sat on the mat today", "the cat sat on a chair", "dogs do not sit on the mat", "the mat", "birds fly"
    )
    assert self_bleu(texts) == pytest.approx(0.29129333473585317)
    assert self_bleu(words("one two three four five", "one two three four five")) == pytest.approx(1)
    assert self_bleu(words("one two three four", "five six seven eight")) == 0


def test_all_measures_of_texts_that_copy() -> None:
    train = stream(b"the quick brown fox\njumps over\n")
    texts = [b"the quick brown fox", b"jumps under \xff"]
    found = text_metrics({"other": [b"x"], "copied": texts}, train)["copied"]
    assert found["texts"] == 2
    assert found["mean_bytes"] == 16
    assert found["valid_utf8"] == 0.5
    assert found["distinct_1"] == 1
    assert found["copied_mean_bytes"] == (19 + 6) / 2
    assert found["copied_max_bytes"] == 19
    assert found["copied_whole"] == 0.5
    assert found["longest_copy"] == "the quick brown fox"
    assert found["searched_bytes"] == found["corpus_bytes"] == 31
