from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.config.schema import RunConfig, from_dict, to_dict
from raytrain.config.vocabularies import longer_pieces, parse_vocabulary
from raytrain.data import pieces
from raytrain.data.batches import EvaluationBatches, TrainingBatches
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.data.frequencies import symbol_frequencies
from raytrain.data.pieces import Vocabulary, byte_vocabulary
from raytrain.data.vocabulary import NUM_OUTPUTS, PAD, SIZE, STOP
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.support.examples import examples

NAMES = ("byte", "char", "char:260", "bpe:300", "bpe:700")
LONGER = NAMES[1:]


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("text") / "corpus"
    with CorpusWriter(folder, name="text", source="tests") as writer:
        for number in range(3000):
            words = f"{number % 7} rivers and {number % 11} märkte 😀 near the {'old ' * (number % 3)}town é"
            writer.add("train", words.encode())
            writer.add("valid", f"the {number} rivers near märkte".encode())
    return Corpus.open(folder)


@pytest.mark.parametrize("name", NAMES)
@given(
    given_text=st.one_of(st.binary(max_size=60), st.text(max_size=30).map(lambda text: text.encode("utf-8", "replace")))
)
@settings(deadline=None, max_examples=examples(300))
def test_any_bytes_come_back(text: Corpus, name: str, given_text: bytes) -> None:
    vocabulary = text.vocabulary(name)
    (symbols,) = vocabulary.encode([given_text])
    assert vocabulary.decode(symbols) == given_text
    assert vocabulary.lengths[symbols].sum() == len(given_text)
    assert all(symbol < STOP or SIZE <= symbol < SIZE + longer_pieces(name) for symbol in symbols)


@pytest.mark.parametrize("name", NAMES)
def test_a_vocabulary_survives_json(text: Corpus, name: str) -> None:
    vocabulary = text.vocabulary(name)
    again = Vocabulary.from_values(json.loads(json.dumps(vocabulary.values())))
    assert (again.name, again.pieces, again.digest) == (name, vocabulary.pieces, vocabulary.digest)
    texts = [text.split("valid").document(number) for number in range(50)]
    for one, other in zip(vocabulary.encode(texts), again.encode(texts), strict=True):
        assert one.tolist() == other.tolist()


def test_longer_pieces_are_fewer(text: Corpus) -> None:
    document = text.split("train").document(5)
    counts = {name: len(text.vocabulary(name).encode([document])[0]) for name in NAMES}
    assert counts["byte"] == len(document)
    assert counts["char"] == len(document.decode())
    assert counts["char"] > 2 * counts["bpe:300"] >= 2 * counts["bpe:700"]
    assert set(text.vocabulary("char").pieces) == {"é".encode(), "ä".encode(), "😀".encode()}


def test_pieces_are_learnt_from_the_training_split_alone_and_alike_each_time(text: Corpus, tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "other", name="other", source="tests") as writer:
        for number in range(text.split("train").num_documents):
            writer.add("train", text.split("train").document(number))
        writer.add("valid", b"quite another text " * 50)
    other = Corpus.open(tmp_path / "other")
    for name in LONGER:
        assert other.vocabulary(name).digest == text.vocabulary(name).digest


def test_a_vocabulary_is_kept_beside_its_corpus(text: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    first = text.vocabulary("bpe:300")
    path = text.path / "vocabulary-bpe-300.json"
    assert path.is_file()
    monkeypatch.setattr(pieces, "learn", lambda *_: pytest.fail("learnt again"))
    assert Corpus.open(text.path).vocabulary("bpe:300").digest == first.digest
    monkeypatch.undo()
    path.write_text(path.read_text()[:-200])  # damaged
    assert Corpus.open(text.path).vocabulary("bpe:300").digest == first.digest
    assert Vocabulary.from_values(json.loads(path.read_text())).digest == first.digest
    assert text.digest == Corpus.open(text.path).digest, "it is no part of the corpus"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "of format 2"),
        ({"name": "bpe"}, "must be byte, char"),
        ({"pieces": ["a"]}, "not the pieces"),
        ({"pieces": ["ab", "ab"]}, "not the pieces"),
        ({"pieces": ["ab"]}, "has other pieces"),
        ({"pieces": 5}, "must be a list"),
        ({"tokenizer": "{"}, "is damaged"),
    ],
)
def test_damaged_vocabularies_are_refused(text: Corpus, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vocabulary.from_values(text.vocabulary("bpe:300").values() | change)


@pytest.mark.parametrize(
    "name", ["bytes", "bpe", "bpe:0", "bpe:256", "bpe:99999", "char:12", "bpe:1k", "", "byte:300", "unigram:300"]
)
def test_a_config_refuses_what_is_no_vocabulary(name: str) -> None:
    with pytest.raises((ValueError, UserError), match=r"vocabulary is .*: "):
        tiny_config("byte_lstm", vocabulary=name)


def test_configs_name_their_vocabulary() -> None:
    config = tiny_config("byte_lstm", vocabulary="bpe:300")
    assert from_dict(to_dict(config)) == config
    assert parse_vocabulary("char") == ("char", 1024)


@pytest.mark.parametrize("name", ["byte", "char", "bpe:700"])
@given(
    given_text=st.one_of(
        st.text(alphabet="ab \n.\t\u00e0\u0085\u00a0\U0001f600", max_size=60).map(str.encode),
        st.lists(st.sampled_from([b"a", b" ", b"\n", b"\x85", b"\xa0", b"\xc3", b"\t", b"old", b"7"]), max_size=40).map(
            b"".join
        ),
    )
)
@settings(deadline=None, max_examples=examples(300))
def test_a_text_in_blocks_has_the_pieces_of_the_whole(text: Corpus, name: str, given_text: bytes) -> None:
    vocabulary = text.vocabulary(name)
    (whole,) = vocabulary.encode([given_text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "BLOCK", max(8, len(given_text) // 3))
        patch.setattr(pieces, "BLOCKS", 2)
        blocks = [*vocabulary.encode_stream(np.frombuffer(given_text, dtype=np.uint8))]
    assert b"".join(map(vocabulary.decode, blocks)) == given_text
    cut = np.concatenate([np.zeros(0, dtype=np.int64), *blocks])
    seams = np.cumsum([len(vocabulary.decode(block)) for block in blocks])[:-1].tolist()
    if all(given_text[seam : seam + 1] in (b" ", b"\n") for seam in seams):  # else a block had no white space
        assert cut.tolist() == whole.tolist()


# ----------------------------------------------------------------------------------------- batches


def texts_of(batches: Iterator[object], vocabulary: Vocabulary) -> list[bytes]:
    return [vocabulary.decode(row) for batch in batches for row in batch.tokens.tolist()]  # type: ignore[attr-defined]


def configs(name: str, sampling: str) -> RunConfig[object]:
    return tiny_config("byte_lstm", vocabulary=name, sampling=sampling, length=60)


@pytest.mark.parametrize("sampling", ["windows", "documents"])
@pytest.mark.parametrize("name", LONGER)
def test_the_samples_are_the_same_bytes_whatever_the_vocabulary(text: Corpus, name: str, sampling: str) -> None:
    split, vocabulary = text.split("valid"), text.vocabulary(name)
    in_bytes = list(EvaluationBatches(split, configs("byte", sampling), 100).batches())
    in_pieces = list(EvaluationBatches(split, configs(name, sampling), 100).batches())
    assert texts_of(iter(in_pieces), vocabulary) == texts_of(iter(in_bytes), byte_vocabulary())
    assert [batch.text_bytes for batch in in_pieces] == [batch.text_bytes for batch in in_bytes]
    trained = [TrainingBatches(text, configs(each, sampling)).batch(3) for each in ("byte", name)]
    assert texts_of(iter(trained[1:]), vocabulary) == texts_of(iter(trained[:1]), byte_vocabulary())
    assert trained[0].text_bytes == trained[1].text_bytes
    for batch in (*in_pieces, trained[1]):
        ends = (batch.tokens == STOP).sum(1)
        assert (ends == (sampling == "documents")).all()
        assert (batch.tokens[:, -1] != PAD).any(), "no wider than its longest sample"


def test_a_corpus_that_was_removed_is_not_made_again(text: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(text.path, folder)
    split = Corpus.open(folder).split("train")
    vocabulary = split.vocabulary("bpe:270")
    shutil.rmtree(folder)
    cut = split.in_pieces(vocabulary)
    assert vocabulary.lengths[cut].sum() == len(split.stream)
    assert not folder.exists()


@pytest.mark.parametrize("name", LONGER)
def test_each_lane_of_a_stream_reads_on_and_round_in_pieces(text: Corpus, name: str) -> None:
    split, vocabulary = text.split("train"), text.vocabulary(name)
    config = tiny_config("byte_lstm", vocabulary=name, sampling="stream", length=60, batch_size=1024)
    batches = TrainingBatches(text, config)
    symbols = np.concatenate([*vocabulary.encode_stream(split.stream)])
    assert vocabulary.decode(symbols) == split.stream.tobytes()
    chunk = round(60 * len(symbols) / len(split.stream))
    assert 1 <= batches.samples.chunk == chunk <= 60
    steps = 2 * len(symbols) // 1024 // chunk + 2  # a lane reads on in the text of the next one
    read = [batches.batch(step) for step in range(steps)]
    tokens = torch.cat([batch.tokens for batch in read], dim=1).numpy()
    starts = np.arange(1024) * (len(symbols) // 1024)
    assert (tokens == symbols[(starts[:, None] + np.arange(steps * chunk)) % len(symbols)]).all()
    assert [batch.text_bytes for batch in read] == [int(vocabulary.lengths[batch.tokens].sum()) for batch in read]
    assert read[0].previous is not None
    assert (read[0].previous == STOP).all()
    for before, batch in pairwise(read):
        assert batch.previous is not None
        assert torch.equal(batch.previous, before.tokens[:, -1])
    parts = [batches.batch(3, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), read[3].tokens)


@pytest.mark.parametrize("name", LONGER)
def test_a_stream_of_pieces_is_evaluated_whole(text: Corpus, name: str) -> None:
    split, vocabulary = text.split("valid"), text.vocabulary(name)
    batches = EvaluationBatches(split, configs(name, "stream"))
    assert batches.is_whole
    assert b"".join(map(vocabulary.decode, batches.sequences())) == split.stream.tobytes()
    assert sum(batch.text_bytes for batch in batches.batches()) == len(split.stream)
    few = EvaluationBatches(split, configs(name, "stream"), 40)
    assert [len(batch.tokens) for batch in few.batches()] == [16, 16, 8]
    assert not few.is_whole


def test_the_pieces_of_a_stream_are_cut_once(text: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(text.path, tmp_path / "mine", ignore=shutil.ignore_patterns("*.pieces"))
    split, vocabulary = Corpus.open(tmp_path / "mine").split("valid"), text.vocabulary("bpe:300")
    first = split.in_pieces(vocabulary)
    assert split.in_pieces(vocabulary) is first
    first = np.array(first)  # not mapped: the file is cut short below
    (file,) = (tmp_path / "mine").glob("valid.*.pieces")
    cut = Vocabulary.encode_stream
    monkeypatch.setattr(Vocabulary, "encode_stream", lambda *_: pytest.fail("it is cut again"))
    assert np.array_equal(Corpus.open(tmp_path / "mine").split("valid").in_pieces(vocabulary), first)
    monkeypatch.setattr(Vocabulary, "encode_stream", cut)
    whole = file.read_bytes()
    for damaged in (b"", whole[:-4], whole[:-3], b"\xff" * len(whole)):
        file.write_bytes(damaged)
        assert np.array_equal(Corpus.open(tmp_path / "mine").split("valid").in_pieces(vocabulary), first)
        assert file.read_bytes() == whole
    file.unlink()
    file.mkdir()  # whoever runs the tests may write to any folder, but not replace one by a file
    assert np.array_equal(Corpus.open(tmp_path / "mine").split("valid").in_pieces(vocabulary), first)
    Corpus.open(tmp_path / "mine").verify()


@pytest.mark.parametrize("name", ["char", "bpe:300"])
def test_workers_share_a_batch_of_one_width(text: Corpus, name: str) -> None:
    batches = TrainingBatches(text, configs(name, "documents"))
    whole, parts = batches.batch(2), [batches.batch(2, rank, 4) for rank in range(4)]
    assert np.concatenate([part.tokens for part in parts]).tolist() == whole.tokens.tolist()
    assert sum(part.text_bytes for part in parts) == whole.text_bytes


@pytest.mark.parametrize("sampling", ["windows", "documents"])
def test_frequencies_are_of_the_pieces(text: Corpus, sampling: str) -> None:
    vocabulary = text.vocabulary("bpe:300")
    frequencies = symbol_frequencies(text.split("train"), sampling, vocabulary)
    assert frequencies.shape == (NUM_OUTPUTS + 44,)
    assert frequencies.sum().item() == pytest.approx(1)
    rivers = next(number for number, piece in enumerate(vocabulary.pieces) if piece == b" rivers")
    assert frequencies[NUM_OUTPUTS + rivers] > 0.01
    assert (frequencies[STOP] > 0.01) == (sampling == "documents")
