from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data import corpus as corpus_module
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.utils.errors import UserError
from tests.support.examples import examples

TEXTS = [b"one", b"", b"a longer text", b"two", b"\n\n", b"\x00\xff", b"one"]


def write(folder: Path, splits: dict[str, list[bytes]]) -> Corpus:
    with CorpusWriter(folder, name="test", source="a test") as writer:
        for split, texts in splits.items():
            for text in texts:
                writer.add(split, text)  # type: ignore[arg-type]
    return Corpus.open(folder)


@given(train=st.lists(st.binary(max_size=40), max_size=30), valid=st.lists(st.binary(max_size=40), max_size=5))
@settings(deadline=None, max_examples=examples(60))
def test_any_bytes_in_the_same_bytes_out(
    tmp_path_factory: pytest.TempPathFactory, train: list[bytes], valid: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("round") / "corpus"
    splits = {"train": [*train, b"x"], "valid": [*valid, b"y"]}
    corpus = write(folder, splits)
    corpus.verify()
    assert corpus.splits == ("train", "valid")
    assert corpus.info["empty_dropped"] == sum(not text for texts in splits.values() for text in texts)
    for name, texts in splits.items():
        kept = [text for text in texts if text]
        split = corpus.split(name)
        assert [split.document(number) for number in range(split.num_documents)] == kept
        assert split.stream.tobytes() == b"".join(text + b"\n" for text in kept)
        assert split.num_bytes == sum(map(len, kept)) == corpus.info["splits"][name]["bytes"]
        assert corpus.info["splits"][name]["longest"] == max(map(len, kept))
        assert split.lengths(np.arange(len(kept))).tolist() == [len(text) for text in kept]
        assert split.by_length.tolist() == sorted(range(len(kept)), key=lambda number: (len(kept[number]), number))
        for low in range(0, 42, 3):
            for high in (low, low + 1, low + 10):
                first, last = split.length_range(low, high)
                expected = sorted(number for number, text in enumerate(kept) if low <= len(text) < high)
                assert sorted(split.by_length[first:last].tolist()) == expected


def test_lengths_are_sorted_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 500)
    texts = [b"x" * length * (1000 if length == 8 else 1) for length in lengths.tolist()]
    for block in (1, 7, 499, 500, 501):
        monkeypatch.setattr(corpus_module, "_SORTED_AT_ONCE", block)
        corpus = write(tmp_path / str(block), {"train": texts, "valid": [b"v"]})
        expected = sorted(range(500), key=lambda number: (len(texts[number]), number))
        assert corpus.split("train").by_length.tolist() == expected
        assert corpus.info["splits"]["train"]["longest"] == 8000


def test_documents_may_be_added_many_at_once(tmp_path: Path) -> None:
    one_by_one = write(tmp_path / "a", {"train": [b"one", b"two and a half", b"x", b"three"], "valid": [b"v"]})
    with CorpusWriter(tmp_path / "b", name="test", source="a test") as writer:
        writer.add("train", b"one")
        writer.extend("train", np.frombuffer(b"two and a half\nx\n", dtype=np.uint8), np.array([14, 1]))
        writer.extend("train", np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.int64))
        writer.add("train", b"three")
        writer.extend("valid", np.frombuffer(b"v\n", dtype=np.uint8), np.array([1]))
    assert Corpus.open(tmp_path / "b").info == one_by_one.info


def test_offsets_are_written_in_several_pieces(tmp_path: Path) -> None:
    texts = [str(number).encode() for number in range(150_000)]
    split = write(tmp_path / "corpus", {"train": texts, "valid": [b"v"]}).split("train")
    assert split.num_documents == 150_000
    assert [split.document(number) for number in (0, 65_534, 65_535, 65_536, 149_999)] == [
        texts[number] for number in (0, 65_534, 65_535, 65_536, 149_999)
    ]


def test_a_split_is_mapped_and_read_only(tmp_path: Path) -> None:
    split = write(tmp_path / "corpus", {"train": TEXTS, "valid": TEXTS, "test": TEXTS}).split("test")
    assert all(isinstance(array, np.memmap) for array in (split.stream, split.offsets, split.by_length))
    with pytest.raises(ValueError):
        split.stream[0] = 1
    with pytest.raises(IndexError):
        split.document(split.num_documents)


def test_the_digest_says_what_determines_training_and_nothing_else(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"train": TEXTS, "valid": [b"v"]})
    with CorpusWriter(tmp_path / "b", name="other name", source="elsewhere") as writer:
        writer.annotate({"seed": 5})
        writer.annotate({"limit": 1.5}, "valid")
        writer.add("valid", b"v")
        for text in TEXTS:
            writer.add("train", text)
    second = Corpus.open(tmp_path / "b")
    assert second.digest == first.digest
    assert second.info["seed"] == 5
    assert second.info["splits"]["valid"]["limit"] == 1.5
    assert write(tmp_path / "c", {"train": TEXTS, "valid": [b"w"]}).digest != first.digest
    assert write(tmp_path / "d", {"train": [*TEXTS[1:], TEXTS[0]], "valid": [b"v"]}).digest != first.digest


@pytest.mark.parametrize("split", ["train", "valid"])
def test_train_and_valid_may_not_be_empty(tmp_path: Path, split: str) -> None:
    other = "valid" if split == "train" else "train"
    with pytest.raises(UserError, match=f"no document for the {split} split"):
        write(tmp_path / "corpus", {other: [b"x"], split: [b""]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_writer_leaves_nothing_behind(tmp_path: Path, interruption: type[BaseException]) -> None:
    def interrupted() -> None:
        with CorpusWriter(tmp_path / "corpus", name="n", source="s") as writer:
            writer.add("train", b"x")
            writer.add("valid", b"x")
            assert len(list(tmp_path.iterdir())) == 1
            raise interruption

    with pytest.raises(interruption):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder, {"train": TEXTS, "valid": [b"v"]})  # an empty folder may
    written = (folder / "corpus.json").stat().st_mtime_ns
    write(folder, {"train": TEXTS, "valid": [b"v"]})  # the same corpus is kept
    assert (folder / "corpus.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="holds another corpus"):
        write(folder, {"train": TEXTS, "valid": [b"w"]})
    Corpus.open(folder).verify()
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    with pytest.raises(UserError, match="is not a corpus"):
        write(other, {"train": TEXTS, "valid": [b"v"]})
    assert sorted(item.name for item in tmp_path.iterdir()) == ["corpus", "other"]
    assert (other / "precious").read_text() == "x"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write(tmp_path / "corpus", {"train": TEXTS, "valid": TEXTS})


def test_no_such_split(corpus: Corpus) -> None:
    with pytest.raises(UserError, match=r"no split 'test'; it has train, valid"):
        corpus.split("test")


@pytest.mark.parametrize("part", ["bin", "offsets", "by_length"])
def test_a_truncated_or_missing_file_is_refused(corpus: Corpus, part: str) -> None:
    path = corpus.path / f"train.{part}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"train.{part} has .* bytes, not"):
        Corpus.open(corpus.path)
    path.unlink()
    with pytest.raises(UserError, match=f"train.{part} is missing"):
        Corpus.open(corpus.path)


@pytest.mark.parametrize("part", ["bin", "offsets", "by_length"])
def test_verify_finds_an_altered_byte(corpus: Corpus, part: str) -> None:
    path = corpus.path / f"valid.{part}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    opened = Corpus.open(corpus.path)
    with pytest.raises(UserError, match=f"valid.{part} was altered"):
        opened.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "cannot be read"),
        ("[]", "not a corpus of format 1"),
        ('{"format": 2}', "not a corpus of format 1"),
        ('{"format": 1, "name": "x"}', "is incomplete"),
        ({"documents": 4}, "do not fit each other"),
        ({"files": {}}, "is incomplete"),
    ],
)
def test_a_damaged_corpus_json_is_refused(corpus: Corpus, change: str | dict[str, object], message: str) -> None:
    path = corpus.path / "corpus.json"
    if isinstance(change, dict):
        info = json.loads(path.read_text())
        info["splits"]["train"].update(change)
        change = json.dumps(info)
    path.write_text(change)
    with pytest.raises(UserError, match=message):
        Corpus.open(corpus.path)


def test_what_is_not_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(UserError, match="is not a prepared corpus"):
            Corpus.open(path)


def test_room_on_the_disk_is_taken_before_a_file_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is an error then; a mapped page for which there is no room ends the process."""
    ends = np.arange(0, 200_000, 2, dtype="<i8")
    ends.tofile(tmp_path / "offsets")
    memmap = np.memmap

    def check(path: Path, **options: Any) -> Any:
        if options["mode"] != "r":
            assert path.stat().st_blocks * 512 >= 8 * (len(ends) - 1)
        return memmap(path, **options)

    monkeypatch.setattr(np, "memmap", check)
    assert corpus_module.write_by_length(tmp_path / "offsets", tmp_path / "order") == 1
    assert np.fromfile(tmp_path / "order", dtype="<i8").tolist() == list(range(len(ends) - 1))

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus_module.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        corpus_module.write_by_length(tmp_path / "offsets", tmp_path / "order")
