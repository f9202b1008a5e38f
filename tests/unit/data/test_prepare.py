from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data import corpus, synthetic
from raytrain.data.corpus import Corpus
from raytrain.data.documents import split_of
from raytrain.data.prepare import prepare
from raytrain.data.reading import Selection
from raytrain.utils.errors import UserError
from tests.support.examples import examples

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real text in ../shared/data")


def all_texts(corpus: Corpus) -> dict[str, list[bytes]]:
    splits = {name: corpus.split(name) for name in corpus.splits}
    return {name: [split.document(number) for number in range(split.num_documents)] for name, split in splits.items()}


def lines(path: Path, texts: list[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


NUMBERED = [b"line number %d" % number for number in range(500)]


# The hash of a text alone decides, so a list needs some text that falls into either split.
@given(st.lists(st.binary(max_size=12).filter(lambda text: b"\n" not in text and b"\0" not in text), max_size=40))
@settings(deadline=None, max_examples=examples(40))
def test_the_same_text_is_never_in_two_splits(tmp_path_factory: pytest.TempPathFactory, texts: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("split")
    written = [*NUMBERED, *texts, *texts]
    corpus = prepare(str(lines(folder / "a.txt", written)), cache=folder / "cache")
    found = all_texts(corpus)
    assert sum(map(len, found.values())) + corpus.info["empty_dropped"] == len(written), "nothing is lost"
    assert all(split_of(text) == split for split, texts in found.items() for text in texts)


def test_the_split_is_90_5_5() -> None:
    counts = {"train": 0, "valid": 0, "test": 0}
    for number in range(20_000):
        counts[split_of(str(number).encode())] += 1
    assert 17_800 < counts["train"] < 18_200
    assert 850 < counts["valid"] < 1_150
    assert 850 < counts["test"] < 1_150
    assert [number for number in range(60) if split_of(b"line number %d" % number) != "train"] == [25, 30, 31, 50, 58]


def test_a_file_keeps_its_bytes_but_invalid_utf8(tmp_path: Path) -> None:
    special = [b" @bob  https://x.org &amp; ", b" @bob  https://x.org &amp; ", b"caf\xe9\xff!"]
    corpus = prepare(str(lines(tmp_path / "my text.txt", [*NUMBERED, *special])), cache=tmp_path / "cache")
    texts = [text for split in all_texts(corpus).values() for text in split]
    assert sorted(texts) == sorted([*NUMBERED, special[0], special[0], b"caf !"])
    assert corpus.name == "my text"
    assert corpus.info["cleaning"] == ["each run of bytes that is not valid UTF-8 becomes one space"]
    assert "duplicates_dropped" not in corpus.info


@pytest.mark.parametrize("kind", ["one line", "one line without spaces", "a title and a line", "a field"])
def test_a_text_that_is_one_line_is_cut_for_its_splits(tmp_path: Path, kind: str) -> None:
    """Windows need no documents: a text of some size must not be refused for want of line ends."""
    words = ["😀", *(f"wörd{number % 5000}" for number in range(200_000))]
    text = ("" if "without" in kind else " ").join(words).encode()
    file = tmp_path / ("a.jsonl" if kind == "a field" else "a.txt")
    title = b"A title\n" if kind == "a title and a line" else b""
    file.write_bytes(title + (json.dumps({"text": text.decode()}).encode() if kind == "a field" else text))
    corpus = prepare(str(file), cache=tmp_path / "cache")
    found = [text for split in all_texts(corpus).values() for text in split]
    assert corpus.info["invalid_replaced"] == 0, "no character is cut"
    assert corpus.info["pieces_of_longer"] > 1000
    assert sum(map(len, found)) > 0.99 * len(text)
    assert sum(text in (b"A title",) for text in found) == bool(title)
    small = [text for text in found if len(text) > 1024]
    assert len(small) <= 2, "what is left at the end of a part may stay whole"
    if "without" not in kind:
        assert sorted(b" ".join(found).replace(b"A title", b"").split()) == sorted(text.split()), "no word is cut"


def test_what_is_not_utf8_is_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    latin = [f"Fünf von tausend Büchern stehen über der Tür, {number}".encode("latin-1") for number in range(300)]
    items = [b'{"text": "%s"}' % text for text in latin]
    for name, texts in {"a.txt": latin, "a.jsonl": items}.items():
        for _ in range(2):  # a corpus that is found again has lost as much
            caplog.clear()
            corpus = prepare(str(lines(tmp_path / name, texts)), cache=tmp_path / "cache")
            assert corpus.info["invalid_replaced"] == 1200
            assert f"{name}: 1,200 runs of bytes are not UTF-8 and became spaces" in caplog.text
            assert "iconv -f LATIN1 -t UTF-8" in caplog.text
    caplog.clear()
    assert prepare(str(lines(tmp_path / "b.txt", NUMBERED)), cache=tmp_path / "cache").info["invalid_replaced"] == 0
    assert not caplog.text


@pytest.mark.parametrize("source", ["tweets", "bios"])
def test_tweets_and_bios_are_cleaned_and_freed_of_duplicates(tmp_path: Path, source: str) -> None:
    special = [b"@bob see https://x.org", b"@ann  see https://y.org ", b"&nbsp;"]
    path = lines(tmp_path / "a.txt", [*NUMBERED, *special])
    corpus = prepare(source, path=str(path), cache=tmp_path / "cache")
    texts = [text for split in all_texts(corpus).values() for text in split]
    assert sorted(texts) == sorted([*NUMBERED, b"@userid see url"])
    assert (corpus.info["duplicates_dropped"], corpus.info["empty_dropped"]) == (1, 1)


def test_the_characters_of_ptb_are_its_lines_without_their_outer_spaces(tmp_path: Path) -> None:
    lines(tmp_path / "ptb.train.txt", [b" a  b ", b" <unk> N \xff ", b"no spaces", b"  two  "])
    lines(tmp_path / "ptb.valid.txt", [b" c d "])
    corpus, plain = (prepare(name, path=str(tmp_path), cache=tmp_path / "cache") for name in ("ptb_characters", "ptb"))
    assert corpus.split("train").stream.tobytes() == b"a  b\n<unk> N  \nno spaces\n two \n"
    assert corpus.split("valid").stream.tobytes() == b"c d\n"
    assert plain.split("valid").stream.tobytes() == b" c d \n"
    assert (corpus.name, plain.name) == ("ptb_characters", "ptb")
    assert len(corpus.info["cleaning"]) == 2
    assert "duplicates_dropped" not in corpus.info


def test_the_synthetic_corpus(tmp_path: Path) -> None:
    corpus = prepare("synthetic", cache=tmp_path)
    counts = {name: corpus.split(name).num_documents for name in corpus.splits}
    assert counts == {"train": 60_000, "valid": 4_000, "test": 4_000}
    assert corpus.info["entropy_bits_per_byte"] == synthetic.bits_per_byte()
    assert corpus.info["seed"] == 0
    assert corpus.info["empty_dropped"] == 0
    # The recorded limit of a split against the parser, on its documents.
    valid = all_texts(corpus)["valid"]
    some = valid[::40]
    nats = {text: synthetic.nll(text) for text in some}
    drawn = {text: nll for text, nll in synthetic.documents(seed=1, num=4_000) if text in nats}
    assert drawn == pytest.approx(nats), "valid has seed 1"
    total = sum(nll for _, nll in synthetic.documents(seed=1, num=4_000))
    limit = corpus.info["splits"]["valid"]["nll_bits_per_byte"]
    assert limit == pytest.approx(total / 0.6931471805599453 / sum(map(len, valid)))
    assert limit == pytest.approx(synthetic.bits_per_byte(), rel=0.02)


def test_a_prepared_corpus_is_reused_until_the_text_changes(tmp_path: Path) -> None:
    path, cache = lines(tmp_path / "a" / "a.txt", NUMBERED), tmp_path / "cache"
    first = prepare(str(path), cache=cache)
    written = (first.path / "corpus.json").stat().st_mtime_ns
    again = prepare(str(path), cache=cache)
    assert (again.path, (again.path / "corpus.json").stat().st_mtime_ns) == (first.path, written)
    assert prepare(str(first.path)).digest == first.digest, "a corpus is a source"
    lines(path, [*NUMBERED, b"one more"])
    changed = prepare(str(path), cache=cache)
    assert changed.path != first.path
    assert changed.digest != first.digest
    assert prepare("tweets", path=str(path), cache=cache).path != changed.path, "cleaned or not"
    assert sorted(item.name for item in (cache / "corpora").iterdir() if item.name.startswith(".")) == []


def test_output(tmp_path: Path) -> None:
    path, cache, output = lines(tmp_path / "a.txt", NUMBERED), tmp_path / "cache", tmp_path / "deep" / "corpus"
    corpus = prepare(str(path), output=output, cache=cache)
    assert corpus.path == output
    assert not (cache / "corpora").exists()
    assert prepare(str(path), output=output, cache=cache).digest == corpus.digest
    os.utime(path, ns=(1, 1))
    assert prepare(str(path), output=output, cache=cache).digest == corpus.digest, "the same corpus is kept"
    lines(path, [*NUMBERED, b"one more"])
    with pytest.raises(UserError, match="holds another corpus"):
        prepare(str(path), output=output, cache=cache)
    with pytest.raises(UserError, match="is a prepared corpus: it takes no"):
        prepare(str(output), output=tmp_path / "other", cache=cache)
    assert [item.name for item in output.parent.iterdir()] == ["corpus"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path, output = lines(tmp_path / "a.txt", NUMBERED), tmp_path / "corpora" / "corpus"
    leftover = tmp_path / "corpora" / ".corpus.partial-1-abc"
    leftover.mkdir(parents=True)
    (leftover / "train.bin").write_bytes(b"half")
    prepare(str(path), output=output, cache=tmp_path / "cache")
    assert [item.name for item in output.parent.iterdir()] == ["corpus"]


def test_mistakes(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="no document for the train split"):
        prepare(str(lines(tmp_path / "blank.txt", [b"", b""])), cache=cache)
    with pytest.raises(UserError, match=r"no document for the valid split \(non-empty documents: 1\); give more text"):
        prepare(str(lines(tmp_path / "one.txt", [next(t for t in NUMBERED if split_of(t) == "train")])), cache=cache)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write the corpus of synthetic: .* set RAYTRAIN_CACHE or --output"):
        prepare("synthetic", cache=tmp_path / "file")
    with pytest.raises(UserError, match="has no field"):
        prepare(str(lines(tmp_path / "a.jsonl", [b'{"a": "x"}'])), field="b", cache=cache)
    assert list((cache / "corpora").iterdir()) == []


def prepare_in_a_process(path: str, cache: Path, barrier: object, results: object) -> None:
    import raytrain.data.prepare as module

    build = module._build

    def counted(*args: object) -> None:
        results.put("built")  # type: ignore[attr-defined]
        build(*args)  # type: ignore[arg-type]

    module._build = counted  # type: ignore[assignment]
    barrier.wait(30)  # type: ignore[attr-defined]
    results.put(prepare(path, cache=cache).digest)  # type: ignore[attr-defined]


def test_two_processes_at_once_build_it_once(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.txt", [b"line %d" % number for number in range(100_000)])
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (str(path), tmp_path / "cache", barrier, results)
    workers = [context.Process(target=prepare_in_a_process, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    messages = [results.get(timeout=60) for _ in range(3)]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert messages.count("built") == 1
    assert len(set(messages) - {"built"}) == 1
    assert len(list((tmp_path / "cache" / "corpora").iterdir())) == 1


def test_the_report_is_kept_with_the_corpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    posts = [
        {"id": str(n), "author_id": "1", "text": f"post {n}", "lang": "en" if n % 2 else "de"} for n in range(1000)
    ]
    path = lines(tmp_path / "a.jsonl", [json.dumps(post).encode() for post in posts])
    corpus = prepare(str(path), selection=Selection(language="en"), cache=tmp_path / "cache")
    assert sum(map(len, all_texts(corpus).values())) == 500
    assert corpus.info["report"] == {
        "read": 500,
        "formats": {"X API v2, posts": 1},
        "dropped": {"of another language than en": 500},
        "guesses": [f"{path}: X API v2, posts, posts"],
    }
    assert f"{path}: X API v2, posts" in caplog.text
    whole = prepare(str(path), cache=tmp_path / "cache")
    assert (whole.info["report"]["read"], whole.path != corpus.path) == (1000, True)
    with pytest.raises(UserError, match=r"nothing in it was asked for \(1,000 of another language than fr\)"):
        prepare(str(path), selection=Selection(language="fr"), cache=tmp_path / "cache")
    with pytest.raises(UserError, match="is a prepared corpus: it takes no"):
        prepare(str(corpus.path), selection=Selection(language="en"))


def test_names_that_are_no_text_are_escaped_in_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "a"
    rows = [b'{"text": "line %d", "\\ud83d": "\\u001b"}' % number for number in range(500)]
    lines(folder / os.fsdecode(b"caf\xe9\x1b.jsonl"), rows)
    corpus = prepare(str(folder), cache=tmp_path / "cache")
    (guess,) = Corpus.open(corpus.path).info["report"]["guesses"]
    assert guess.endswith("a/caf\\udce9\x1b.jsonl: field 'text' holds the text, not \\ud83d")
    assert "\x1b" not in caplog.text
    caplog.text.encode()  # what a stream that refuses surrogates can write


def test_the_synthetic_corpus_is_what_it_was(tmp_path: Path) -> None:
    digest = "3a1ff0a652ec194b2e9b1fc8123a87a3cfd1927cd3e7dfc6be1c8d4225b118c9"
    assert prepare("synthetic", cache=tmp_path).digest == digest


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "folder", "digest"),
    [
        ("ptb", "ptb", "390e4e614a17b6be5db7bda4419afe414d5c4d2f0cb6d1c0a378b7a7266fc185"),
        ("ptb_characters", "ptb", "e6eb45efaefc352d109ab0886ee9fba8294ff2682e773411177f620209baf278"),
        ("tweets", "tweets", "cfbf4fded09606d0c8473fc8cdb02667b20c002abd433fb21c96fe119b101327"),
        ("bios", "bios", "6d1bb6955c9e993fc8bbaabc51838ba6406f257ba98749e699c1a2964982d4be"),
    ],
)
def test_the_corpora_of_real_text_are_what_they_were(tmp_path: Path, source: str, folder: str, digest: str) -> None:
    """Of the files that lie beside the project, which lack the test split."""
    assert prepare(source, path=str(DATA / folder), cache=tmp_path).digest == digest


@needs_data
def test_real_ptb_is_the_original_file(tmp_path: Path) -> None:
    corpus = prepare("ptb", path=str(DATA / "ptb"), cache=tmp_path)
    assert corpus.splits[:2] == ("train", "valid")
    for split, documents in (("train", 42_068), ("valid", 3_370)):
        assert corpus.split(split).stream.tobytes() == (DATA / "ptb" / f"ptb.{split}.txt").read_bytes()
        assert corpus.split(split).num_documents == documents


@needs_data
def test_the_characters_of_real_ptb_are_as_many_as_published_figures_count(tmp_path: Path) -> None:
    corpus = prepare("ptb_characters", path=str(DATA / "ptb"), cache=tmp_path)
    known = {"train": 5_017_482, "valid": 393_042, "test": 442_423}
    assert {split: len(corpus.split(split).stream) for split in corpus.splits} == {
        split: known[split] for split in corpus.splits
    }
    for split in ("train", "valid"):
        original = (DATA / "ptb" / f"ptb.{split}.txt").read_bytes()
        assert corpus.split(split).stream.tobytes() == original.replace(b" \n ", b"\n")[1:-2] + b"\n"


@needs_data
def test_real_bios(tmp_path: Path) -> None:
    corpus = prepare("bios", path=str(DATA / "bios"), cache=tmp_path)
    texts = all_texts(corpus)
    assert sum(map(len, texts.values())) + corpus.info["duplicates_dropped"] + corpus.info["empty_dropped"] == 61_568
    assert len(set().union(*texts.values())) == sum(map(len, texts.values())), "no text twice"
    with open(DATA / "bios" / "bios.jsonl", encoding="utf-8") as file:
        first = " ".join(json.loads(next(file))["bio"].split()).encode()
    assert first in texts[split_of(first)]


class FullDisk:
    """Files of which only so many bytes can be written; closing them tries again, as Python's do."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.real = open

    def __call__(self, path: Path, mode: str = "r", **settings: Any) -> Any:
        file = self.real(path, mode, **settings)
        if "w" not in mode:
            return file
        return _FullFile(self, file)


class _FullFile:
    def __init__(self, disk: FullDisk, file: Any) -> None:
        self.disk, self.file, self.failed = disk, file, False

    def write(self, data: bytes) -> None:
        self.disk.left -= len(data)
        self.failed = self.failed or self.disk.left < 0
        self._check()
        self.file.write(data)

    def close(self) -> None:
        self.file.close()
        self._check()

    def _check(self) -> None:
        if self.failed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("left", [0, 100, 5_000, 9_800])
def test_a_full_disk_leaves_nothing_behind(left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is buffered cannot be written when the files are closed, either."""
    source = lines(tmp_path / "a.txt", NUMBERED)
    monkeypatch.setattr(corpus, "open", FullDisk(left), raising=False)
    with pytest.raises(UserError, match=r"cannot write the corpus of .*No space left on device"):
        prepare(str(source), output=tmp_path / "out" / "corpus", cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    monkeypatch.undo()
    assert prepare(str(source), output=tmp_path / "out" / "corpus", cache=tmp_path / "cache").split("train")
