"""The reference ladder: what it says of a model, and the file beside the corpus that keeps it."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from raytrain.config.schema import RunConfig
from raytrain.data import synthetic
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.data.pieces import Vocabulary
from raytrain.models import ladder as module
from raytrain.models.ladder import FILE, Ladder, reference_ladder, validation_ladder
from raytrain.models.ngrams import MAX_ORDER, measure_ngrams
from tests.conftest import tiny_config

BITS = (5.0, 4.0, 3.0, 2.5, 2.2, 2.0, 2.1, 2.3)
WINDOWS = tiny_config("byte_lstm")


@pytest.fixture
def mine(tmp_path: Path) -> Corpus:
    """A small corpus of a test's own, of the generator whose entropy is known."""
    with CorpusWriter(tmp_path / "mine", name="mine", source="tests") as writer:
        for seed, split in enumerate(("train", "valid")):
            for text, _ in synthetic.documents(seed, 200):
                writer.add(split, text)  # type: ignore[arg-type]
        writer.annotate({"entropy_bits_per_byte": synthetic.bits_per_byte()})
    return Corpus.open(tmp_path / "mine")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The highest order of each ladder that is measured."""
    orders: list[int] = []

    def measure(train: Any, samples: EvaluationBatches, max_order: int) -> Any:
        orders.append(max_order)
        return measure_ngrams(train, samples, max_order)

    monkeypatch.setattr(module, "measure_ngrams", measure)
    return orders


# ------------------------------------------------------------------------------------- what it says


def test_the_line_at_the_start_has_the_baseline_and_the_best() -> None:
    ladder = Ladder(BITS, 9, 9)
    assert str(ladder) == "reference: byte 3-gram 3.000, 6-gram 2.000 bits per byte (best, order 5)"
    large = replace(ladder, counted=64_000_000, available=1_512_300_000, entropy=0.52)
    assert str(large) == f"{ladder}; fitted on 64 of 1,512 MB; entropy 0.520"
    assert (
        str(Ladder((*BITS[:2], 1.0, *BITS[3:]), 9, 9)) == "reference: byte 3-gram 1.000 bits per byte (best, order 2)"
    )
    short = replace(large, bits=BITS[:3])
    assert str(short) == (
        "reference: byte 3-gram 3.000 bits per byte (longer ones are counted at the end); fitted on 64 of 1,512 MB; "
        "entropy 0.520"
    )


def test_a_model_is_held_against_the_best_and_warned_of_unless_it_is_better() -> None:
    ladder = Ladder(BITS, 9, 9)
    assert ladder.comparison(1.5) == "model 1.500, byte 6-gram 2.000 bits per byte"
    known = replace(ladder, counted=64_000_000, available=512_000_000, entropy=0.52)
    assert known.comparison(2.5) == (
        "model 2.500, byte 6-gram 2.000, entropy 0.520 bits per byte; n-grams fitted on 64 of 512 MB"
    )
    assert ladder.warning(1.999) is None
    assert ladder.warning(2.5) == "the model has learnt less than counting: it needs 25.0% more than a byte 6-gram"
    assert str(ladder.warning(2.0, whose="the best trial's")).startswith("the best trial's model has learnt less")


def test_pieces_stand_beside_bytes_and_the_better_of_both_is_what_warns() -> None:
    ladder = Ladder(BITS, 9, 9, pieces=Ladder((4.0, 1.8, 1.9, 2.0), 9, 9, vocabulary="bpe:500"))
    assert str(ladder) == (
        "reference: byte 3-gram 3.000, 6-gram 2.000 bits per byte (best, order 5); bpe:500 2-gram 1.800 (best, order 1)"
    )
    assert ladder.comparison(1.9) == "model 1.900, byte 6-gram 2.000, bpe:500 2-gram 1.800 bits per byte"
    assert ladder.warning(1.79) is None
    assert ladder.warning(1.98) == (
        "the model has learnt less than counting: it needs 10.0% more than a bpe:500 2-gram"
    )
    assert ladder.baseline == 3.0
    worse = replace(ladder, pieces=Ladder((4.0, 2.1, 2.2), 9, 9, vocabulary="char"))
    assert worse.warning(1.99) is None
    assert str(worse.warning(2.0)).endswith("than a byte 6-gram")
    assert Ladder.from_json(json.loads(json.dumps(asdict(ladder)))) == ladder
    with pytest.raises(ValueError, match="bits"):
        Ladder.from_json(
            {"bits": BITS, "counted": 1, "available": 1, "pieces": {"bits": [1.0], "counted": 1, "available": 1}}
        )


@pytest.mark.parametrize("bits", [BITS[:2], (*BITS, 1.0), (1.0, float("nan"), 1.0), (1.0, 2.0, -1.0), "5", (1, 2, "3")])
def test_what_is_no_ladder_is_refused(bits: Any) -> None:
    assert Ladder.from_json(json.loads(json.dumps(asdict(Ladder(BITS, 8, 9))))) == Ladder(BITS, 8, 9)
    with pytest.raises(ValueError, match="bits"):
        Ladder.from_json({"bits": bits, "counted": 1, "available": 1})


# -------------------------------------------------------------------------------------- how it is had


def test_it_is_measured_once_for_the_same_samples(mine: Corpus, measured: list[int]) -> None:
    first = validation_ladder(mine, WINDOWS)
    samples = EvaluationBatches(mine.split("valid"), WINDOWS, WINDOWS.evaluate_samples)
    assert first.bits == measure_ngrams(mine.split("train"), samples)[0]
    assert (first.counted, first.available) == (len(mine.split("train").stream),) * 2
    assert first.entropy == synthetic.bits_per_byte()
    again = Corpus.open(mine.path)
    assert validation_ladder(again, replace(WINDOWS, seed=5, steps=7), quick=True) == first
    assert measured == [MAX_ORDER]
    mine.verify()


@pytest.mark.parametrize(
    "changes", [{"sampling": "documents", "length": 128}, {"length": 25}, {"evaluate_samples": 63}, {"split": "train"}]
)
def test_other_samples_have_their_own(mine: Corpus, measured: list[int], changes: dict[str, Any]) -> None:
    first = validation_ladder(mine, WINDOWS)
    split = changes.pop("split", "valid")
    config: RunConfig[Any] = replace(WINDOWS, **changes)
    other = reference_ladder(mine, EvaluationBatches(mine.split(split), config, config.evaluate_samples))
    assert other.bits != first.bits
    assert measured == [MAX_ORDER] * 2
    assert validation_ladder(mine, WINDOWS) == first
    assert len(measured) == 2


def test_a_start_measures_no_more_of_a_large_text_than_its_trials_need(
    mine: Corpus, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUICK", 1000)
    short = validation_ladder(mine, WINDOWS, quick=True)
    assert validation_ladder(mine, WINDOWS, quick=True) == short
    whole = validation_ladder(mine, WINDOWS)
    assert (len(short.bits), whole.bits[:3], whole.baseline) == (3, short.bits, short.bits[2])
    assert validation_ladder(mine, WINDOWS, quick=True) == whole
    assert measured == [2, MAX_ORDER]


def test_a_vocabulary_has_its_own_beside_that_of_bytes(mine: Corpus, measured: list[int]) -> None:
    config = replace(WINDOWS, sampling="documents", length=128, vocabulary="bpe:300")
    ladder = validation_ladder(mine, config)
    assert ladder.pieces is not None
    assert ladder.pieces.vocabulary == "bpe:300"
    assert replace(ladder, pieces=None) == validation_ladder(mine, replace(config, vocabulary="byte"))
    samples = EvaluationBatches(mine.split("valid"), config, config.evaluate_samples)
    assert ladder.pieces.bits == measure_ngrams(mine.split("train"), samples, MAX_ORDER)[0]
    assert validation_ladder(Corpus.open(mine.path), config) == ladder
    assert measured == [MAX_ORDER] * 2
    # other pieces under the same name, of a model that was trained on another text, have another one
    others = Vocabulary("char:300", ["\u00e9".encode()]), Vocabulary("char:300", [b"st", b"en"])
    found = [reference_ladder(mine, EvaluationBatches(mine.split("valid"), config, 64, each)) for each in others]
    assert found[0].pieces != found[1].pieces


def test_a_start_does_not_wait_for_the_pieces_of_a_large_text(
    mine: Corpus, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUICK", 1000)
    config = replace(WINDOWS, vocabulary="bpe:300")
    assert validation_ladder(mine, config, quick=True).pieces is None
    assert validation_ladder(mine, config).pieces is not None
    assert measured == [2, MAX_ORDER, MAX_ORDER]


def test_a_damaged_or_older_file_is_measured_anew(mine: Corpus, measured: list[int]) -> None:
    ladder = validation_ladder(mine, WINDOWS)
    file = mine.path / FILE
    text = file.read_text()
    values = json.loads(text)
    (entry,) = values["ladders"].values()
    damaged = [
        text[:-20], "[]", "{}", "\0", "[" * 5000, text.replace(mine.digest, "0" * 64),
        json.dumps(values | {"method": values["method"] | {"version": 0}}), json.dumps(values | {"ladders": [1]}),
        json.dumps(values | {"ladders": {next(iter(values["ladders"])): entry | {"bits": [1.0] * 9}}}),
    ]  # fmt: skip
    for number, content in enumerate(damaged, 2):
        file.write_text(content)
        assert validation_ladder(mine, WINDOWS) == ladder
        assert len(measured) == number, content[:200]
        assert file.read_text() == text


def test_a_folder_that_cannot_be_written_keeps_none(mine: Corpus, measured: list[int]) -> None:
    (mine.path / FILE).mkdir()  # whoever runs the tests may write to any folder, but not replace one by a file
    assert validation_ladder(mine, WINDOWS) == validation_ladder(mine, WINDOWS)
    assert len(measured) == 2
    assert [path.name for path in mine.path.glob(".*")] == []


def test_a_corpus_that_was_removed_is_not_made_again(mine: Corpus) -> None:
    mine.split("train"), mine.split("valid")
    shutil.rmtree(mine.path)
    assert validation_ladder(mine, WINDOWS).entropy is not None
    assert not mine.path.exists()


def test_processes_that_write_at_once_leave_a_whole_file(mine: Corpus, measured: list[int]) -> None:
    def work(first: int) -> None:
        for length in range(first, first + 12):
            validation_ladder(Corpus.open(mine.path), replace(WINDOWS, length=length, evaluate_samples=2), quick=True)

    children = [
        multiprocessing.get_context("fork").Process(target=work, args=(10 + 20 * number,)) for number in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 3
    kept = json.loads((mine.path / FILE).read_text())["ladders"]
    assert len(kept) >= 12  # two that write in the same moment keep one of theirs
    assert {path.name for path in mine.path.iterdir()} == {path.name for path in mine.path.glob("[!.]*")}
    validation_ladder(mine, replace(WINDOWS, length=int(list(kept)[-1].split("/")[2]), evaluate_samples=2))
    assert measured == []
