"""Corpora that are made in parts, against those of one process: the same files, digest and report."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from raytrain.data import corpus as corpus_module
from raytrain.data import cutting, readers
from raytrain.data import parts as parts_module
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.data.documents import Source, Taken
from raytrain.data.files import find
from raytrain.data.parts import Kind, Parts, repeated
from raytrain.data.prepare import prepare
from raytrain.data.read_tasks import read_tasks
from raytrain.data.reading import Reading, Selection
from raytrain.utils.errors import UserError
from tests.support.examples import examples

CHUNK = 64
"""Bytes that are read at once here, so that small files have many spans."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK", CHUNK)
    monkeypatch.setattr(readers, "_LONGEST_LINE", 3 * CHUNK)
    monkeypatch.setattr(cutting, "LONGEST", 128)
    monkeypatch.setattr(cutting, "PIECE", 48)
    monkeypatch.setattr(corpus_module, "_SORTED_AT_ONCE", 7)


def fill(source: Source, writer: CorpusWriter, size: int, folder: Path) -> Taken:
    """Add a source to a corpus in parts, in this process, the last part first."""
    folder.mkdir()
    parts = Parts(folder, source, read_tasks(source.files(), size))
    for number in reversed(range(len(parts.tasks))):
        parts.write(number)
    for kind in ("bios", "texts"):
        if kind == "texts" and not source.is_cleaned:
            continue
        drop_repeated(parts, kind)
    return parts.join(writer)


def drop_repeated(parts: Parts, kind: Kind) -> None:
    found = [np.empty((0, 4), dtype=np.int64)]
    for number in range(len(parts.tasks)):
        for rows in parts.rows(number, kind):
            found.append(np.column_stack([rows[:, :2], np.full(len(rows), number), rows[:, 2]]))
    again = repeated(np.concatenate(found))
    for number in set(again[:, 2].tolist()):
        parts.note_repeated(number, kind, again[again[:, 2] == number, 3])


def files_of(corpus: Corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.path.iterdir() if path.name != "corpus.json"}


def assert_same(
    folder: Path, source: Path, name: str = "", sizes: tuple[int, ...] = (1000, 4000), **asked: Any
) -> Corpus:
    """Prepare ``source`` by one process and in parts of several sizes; all must be the same to the byte."""
    known, path = (name, str(source)) if name else (str(source), None)
    selection = Selection(**asked)
    whole = prepare(known, path=path, selection=selection, output=folder / "whole", cache=folder / "cache")
    for size in sizes:
        scratch, output = folder / f"scratch{size}", folder / f"parts{size}"
        filled = partial(fill, size=size, folder=scratch)
        made = prepare(known, path=path, selection=selection, output=output, cache=folder / "cache", fill=filled)
        assert files_of(made) == files_of(whole)
        assert (made.path / "corpus.json").read_bytes() == (whole.path / "corpus.json").read_bytes()
        assert not list(scratch.iterdir())
        made.verify()
        assert len(read_tasks(Source(known, path, selection, folder).files(), size)) > 1
    return whole


def texts(number: int, seed: int = 0) -> list[bytes]:
    """Texts of all kinds, some of them the same, invalid, empty or long."""
    source = random.Random(seed)
    kinds: list[Callable[[], bytes]] = [
        lambda: b"line number %d" % source.randrange(number),
        lambda: b"@bob see https://x.org/%d &amp; " % source.randrange(9),
        lambda: "wörter und 😀 ".encode() * source.randrange(6),
        lambda: b"caf\xe9 %d \xff" % source.randrange(99),
        lambda: b"",
    ]
    found = [source.choice(kinds)() for _ in range(number)]
    found[number // 3] = b"a long one " * 30
    found[number // 2] = b"x" * 12_000 + b" y" * 3_000
    return found


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_plain_text(tmp_path: Path) -> None:
    for number, (end, start, tail) in enumerate(
        [(b"\n", b"", b""), (b"\r\n", b"\xef\xbb\xbf", b"no end"), (b"\r", b"", b"")]
    ):
        path = write(tmp_path / f"{number}.txt", start + b"".join(text + end for text in texts(300)) + tail)
        corpus = assert_same(tmp_path / str(number), path)
        assert corpus.info["invalid_replaced"] > 0
        assert corpus.info["pieces_of_longer"] > 0
        assert corpus.info["empty_dropped"] > 0


@given(
    st.lists(st.sampled_from([b"", b"a", b"bc", b"d" * 61, b"e" * 63, b"f" * 64, b"g" * 300, b"h i " * 90])),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=examples(100))
def test_spans_share_the_lines_of_a_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes, closed: bool, marked: bool
) -> None:
    """Wherever line ends fall: at the first or last byte of a chunk or span, far from it, or nowhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK", CHUNK)
        patch.setattr(readers, "_LONGEST_LINE", 3 * CHUNK)
        content = (b"\xef\xbb\xbf" if marked else b"") + end.join([*lines, b""] if closed else lines)
        path = write(tmp_path_factory.mktemp("span") / "a.txt", content or b"x")
        whole = list(readers.read(path, "a.txt", Reading()))
        for size in (1, 2 * CHUNK):
            tasks = read_tasks(find(str(path)) and [(None, find(str(path))[0])], size)
            found = [text for task in tasks for text in readers.read(path, "a.txt", Reading(), span=task.span)]
            assert found == whole


@pytest.mark.parametrize("selection", [{}, {"language": "en"}, {"reposts": False}, {"field": "text"}])
def test_json_lines(tmp_path: Path, selection: dict[str, Any]) -> None:
    posts = [
        {"id": str(n), "author_id": "1", "text": ("RT @" if n % 5 == 0 else "") + text.decode("latin-1"),
         "lang": "en" if n % 3 else "de"}
        for n, text in enumerate(texts(200))
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", b"".join(json.dumps(post).encode() + b"\n\n" for post in posts))
    corpus = assert_same(tmp_path / "out", path, **selection)
    assert corpus.info["report"]["formats"] == {"JSON" if "field" in selection else "X API v2, posts": 1}


def test_objects_of_any_form(tmp_path: Path) -> None:
    rows = [{"content": f"text {n}", "kind": n} | ({"tag": "x"} if n < 50 else {}) for n in range(900)]
    path = write(tmp_path / "a.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    corpus = assert_same(tmp_path / "out", path)
    assert "field 'content' holds the text, not tag" in corpus.info["report"]["guesses"][0]


def test_the_first_span_is_read_as_the_whole_file_is(tmp_path: Path) -> None:
    """It may hold a single object, while another of the first ones has one field more."""
    rows = [{"content": f"text {n} " * 50} | ({"tag": "x"} if n == 60 else {}) for n in range(200)]
    path = write(tmp_path / "a.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    corpus = assert_same(tmp_path / "out", path, sizes=(CHUNK,))
    assert "field 'content' holds the text, not tag" in corpus.info["report"]["guesses"][0]


@pytest.mark.parametrize("source", ["tweets", "bios"])
def test_duplicates_within_and_across_files(tmp_path: Path, source: str) -> None:
    for number in range(4):
        write(tmp_path / "in" / f"{number}.txt", b"".join(text + b"\n" for text in texts(300, number % 3)))
    corpus = assert_same(tmp_path / "out", tmp_path / "in", source)
    assert corpus.info["duplicates_dropped"] > 300


@pytest.mark.parametrize("source", ["", "bios"])
@pytest.mark.parametrize("selection", [{}, {"language": "en"}])
def test_bios_of_the_same_account_in_several_files(tmp_path: Path, source: str, selection: dict[str, Any]) -> None:
    """A bio counts once for its account, also where it was left out the first time; two accounts may have the same."""
    draw = random.Random(1)
    for number in range(5):
        rows = [
            {"id": n, "created_at": "x", "text": "t", "lang": draw.choice(["en", "de", None]),
             "user": {"id": draw.randrange(60), "description": draw.choice(
                 ["", "caf\udce9 \ud83d", "long " * 40, *(f"bio {k}" for k in range(200))])}}
            for n in range(300)
        ]  # fmt: skip
        write(tmp_path / "in" / f"{number}.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    corpus = assert_same(tmp_path / "out", tmp_path / "in", source, take="bio", sizes=(3000, 40_000), **selection)
    assert corpus.info["report"]["dropped"]["the same bio of the same account"] > 50


def test_a_folder_of_all_forms(tmp_path: Path) -> None:
    folder, plain = tmp_path / "in", b"".join(text + b"\n" for text in texts(200))
    write(folder / "a.txt", plain)
    write(folder / "b.txt.gz", gzip.compress(plain))
    write(folder / "b" / "c.txt.bz2", bz2.compress(plain))
    rows = [{"text": f"row {n}\nand more"} for n in range(200)]
    write(folder / "c.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    write(folder / "d.json", json.dumps(rows).encode())
    write(folder / "e.csv", b"text,n\n" + b"".join(b'"row, %d\nin two lines",%d\n' % (n, n) for n in range(200)))
    parquet.write_table(
        pyarrow.table({"text": [f"value {n}" if n % 7 else None for n in range(200)]}), folder / "f.parquet"
    )
    with zipfile.ZipFile(folder / "g.zip", "w") as archive:
        archive.writestr("x/a.txt", plain)
        archive.writestr("x/b.jsonl", json.dumps({"text": "in a zip"}))
    write(folder / "h.json", json.dumps({"a": 1, "b": 2}).encode())
    write(folder / os.fsdecode(b"i\xe9.txt"), plain)
    corpus = assert_same(tmp_path / "out", folder)
    assert set(corpus.info["report"]["formats"].values()) == {1, 3, 5}
    assert list(corpus.info["report"]["skipped"]) == [str(folder / "h.json")]
    assert_same(tmp_path / "cleaned", folder, "tweets")


def test_posts_of_an_archive_find_their_full_texts(tmp_path: Path) -> None:
    """These are in another file of the folder: note-tweet.js, between which and tweets.js others may stand."""
    full = {number: f"{number} " + "a long post, whose end is elsewhere " * 8 for number in range(100)}
    notes = [
        {"noteTweet": {"core": {"text": full[number]}} | ({"tweetId": str(number)} if number % 2 else {})}
        for number in full
    ]
    posts = [{"tweet": {"id_str": str(number), "full_text": text[:160] + "…"}} for number, text in full.items()]
    for name in ("one", "two"):
        data = tmp_path / "in" / name / "data"
        write(
            data / "note-tweet.js",
            b"window.YTD.note_tweet.part0 = " + json.dumps(notes if name == "one" else notes[:9]).encode(),
        )
        write(data / "other.txt", b"a line\n" * 50)
        write(data / "tweets.js", b"window.YTD.tweets.part0 = " + json.dumps(posts).encode())
        write(data / "tweets-part1.js", b"window.YTD.tweets.part1 = " + json.dumps(posts[:30]).encode())
    corpus = assert_same(tmp_path / "out", tmp_path / "in")
    assert corpus.info["report"]["remarks"] == {"cut off, replaced by the full text": 130 + 18}


def test_ptb_keeps_its_own_splits(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(tmp_path / "in" / f"ptb.{split}.txt", b"".join(b" a %d \n" % number for number in range(100)) + b" \n")
    assert assert_same(tmp_path / "out", tmp_path / "in", "ptb_characters", sizes=(64, 600)).info["empty_dropped"] == 3


def test_nothing_that_was_asked_for_is_the_same_mistake(tmp_path: Path) -> None:
    rows = [{"id": str(n), "author_id": "1", "text": "x", "lang": "de"} for n in range(99)]
    path = write(tmp_path / "a.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    filled = partial(fill, size=64, folder=tmp_path / "scratch")
    with pytest.raises(UserError, match=r"nothing in it was asked for \(99 of another language than en\)"):
        prepare(str(path), selection=Selection(language="en"), cache=tmp_path / "cache", fill=filled)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (b"{broken", "a.jsonl line 401 is not JSON"),
        (b'{"id": 4}', "a.jsonl line 401 has no field 'bio'"),
        (b'{"bio": "x", "text": "y"}', "a.jsonl line 401 has a field 'text', but the lines before have 'bio'"),
        (b'{"bio": 5}', "a.jsonl line 401: field 'bio' is not a string"),
    ],
)
def test_a_mistake_is_said_with_its_line_in_the_whole_file(tmp_path: Path, last: bytes, message: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"bio": "some text"}\n' * 400 + last + b"\n")
    for filled in (None, partial(fill, size=64, folder=tmp_path / "scratch")):
        with pytest.raises(UserError, match=message):
            prepare(str(path), cache=tmp_path / "cache", fill=filled)


def test_files_whose_texts_are_in_different_fields_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", b'{"text": "some text"}\n' * 200)
    write(tmp_path / "in" / "b.jsonl", b'{"content": "some text"}\n' * 200)
    for filled in (None, partial(fill, size=64, folder=tmp_path / "scratch")):
        with pytest.raises(UserError, match=r"b.jsonl has its text in the field 'content', but .*a.jsonl in 'text'"):
            prepare(str(tmp_path / "in"), cache=tmp_path / "cache", fill=filled)


def test_a_part_is_whole_or_not_there_and_may_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", b"".join(text + b"\n" for text in texts(300)))
    source = Source("tweets", str(path), Selection(), tmp_path)
    folder = tmp_path / "scratch"
    folder.mkdir()
    parts = Parts(folder, source, read_tasks(source.files(), 1000))
    parts.write(1)
    before = {item.name: item.read_bytes() for item in parts.part(1).iterdir()}
    parts.write(1)
    shutil.move(parts.part(1), tmp_path / "kept")
    parts.write(1)
    assert {item.name: item.read_bytes() for item in parts.part(1).iterdir()} == before
    monkeypatch.setattr(json, "dumps", lambda _: 1 / 0)  # at the very end
    with pytest.raises(ZeroDivisionError):
        parts.write(2)
    assert [item.name for item in folder.iterdir()] == ["1"]


def test_a_frequent_text_leaves_its_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "_ROWS_AT_ONCE", 1000)
    path = write(tmp_path / "a.txt", b"the same\n" * 1500 + b"another\n" + b"the same\n" * 400)
    folder = tmp_path / "scratch"
    folder.mkdir()
    source = Source("tweets", str(path), Selection(), tmp_path)
    parts = Parts(folder, source, read_tasks(source.files(), 10**6))
    parts.write(0)
    assert [len(rows) for rows in parts.rows(0, "texts")] == [1, 2]


def test_nothing_of_a_part_is_mapped_when_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of NFS keeps the removed files that a process has mapped, and cannot be removed before."""
    for number in range(3):
        rows = [{"id": n, "created_at": "x", "text": "t", "user": {"id": n % 50, "description": f"bio {n % 30}"}}
                for n in range(100)]  # fmt: skip
        write(tmp_path / "in" / f"{number}.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    removed = []
    rmtree = shutil.rmtree

    def check(folder: Path, **options: Any) -> None:
        if folder.name.isdigit():
            assert f"{folder}/" not in Path("/proc/self/maps").read_text()
            removed.append(sorted(item.name for item in folder.iterdir() if "_" in item.name))
        rmtree(folder, **options)

    monkeypatch.setattr(parts_module.shutil, "rmtree", check)
    filled = partial(fill, size=64, folder=tmp_path / "scratch")
    prepare("bios", path=str(tmp_path / "in"), cache=tmp_path / "cache", fill=filled)
    assert ["lost_bios"] in removed
    assert ["lost_texts"] in removed


def test_small_files_share_a_task_and_what_cannot_be_cut_stays_whole(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / f"a{number}.txt", b"x" * 100)
    write(tmp_path / "b.csv", b"text\n" * 1000)
    write(tmp_path / "c.txt", b"text\n" * 100)
    tasks = read_tasks([(None, item) for item in find(str(tmp_path))], 200)
    assert [(len(task.files), task.span) for task in tasks] == [
        *[(2, None)] * 5, (1, None), *((1, (start, start + 256)) for start in (0, 256))
    ]  # fmt: skip


def test_one_process_does_not_import_ray(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"".join(b"line %d\n" % number for number in range(300)))
    code = (
        "import sys; from raytrain.data import __main__ as command; command.main(); "
        "sys.exit([name for name in sys.modules if name.split('.')[0] == 'ray'] != [])"
    )
    command = [sys.executable, "-c", code, "prepare", str(path), "--output", str(tmp_path / "out")]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


def test_a_large_source_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.txt", b"".join(b"line %d\n" % number for number in range(300)))
    prepare(str(path), output=tmp_path / "small", cache=tmp_path / "cache")
    assert "--distributed" not in caplog.text
    monkeypatch.setattr("raytrain.data.prepare._LARGE", 1000)
    table = write(tmp_path / "b.csv", b"text\n" + path.read_bytes())
    prepare(str(table), output=tmp_path / "whole", cache=tmp_path / "cache")  # by one task in any case
    assert "--distributed" not in caplog.text
    prepare(str(path), output=tmp_path / "large", cache=tmp_path / "cache")
    assert "raytrain.data prepare --distributed" in caplog.text


def test_synthetic_text_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave --distributed out"):
        prepare("synthetic", cache=tmp_path, fill=partial(fill, size=64, folder=tmp_path))
