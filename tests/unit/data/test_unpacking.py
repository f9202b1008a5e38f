from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow
import pytest
from pyarrow import parquet

from raytrain.data import sources
from raytrain.data.reading import Reading
from raytrain.utils.errors import UserError


def texts(path: Path) -> list[bytes]:
    return [text for _, text in sources.documents(str(path))]


def zstandard(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard,
}
LINES = [b"line %d %s" % (number, Random(number).randbytes(8).hex().encode()) for number in range(20_000)]
CONTENT = b"".join(line + b"\n" for line in LINES)


@pytest.mark.parametrize("codec", PACKED)
@pytest.mark.parametrize("name", ["a.txt.{}", "A.TXT.{}", "a.{}", "packed"])
def test_packed_files_are_read_in_place(tmp_path: Path, codec: str, name: str) -> None:
    """By their ending or, without one, by their first bytes; several packed parts may follow each other."""
    path = tmp_path / name.format(codec)
    path.write_bytes(PACKED[codec](CONTENT[:1000]) + PACKED[codec](CONTENT[1000:]))
    assert texts(path) == LINES


# Zstandard notices what was altered only by a sum, which is optional.
@pytest.mark.parametrize(
    ("codec", "damage"),
    [
        (codec, damage)
        for codec in PACKED
        for damage in ("truncated", "altered", "not packed")
        if (codec, damage) != ("zst", "altered")
    ],
)
def test_damaged_files_are_named(tmp_path: Path, codec: str, damage: str) -> None:
    content = PACKED[codec](CONTENT)
    half = len(content) // 2
    content = {
        "truncated": content[:-2000],
        "altered": content[:half] + b"\xff\0" * 500 + content[half + 1000 :],
        "not packed": b"plain text\n",
    }[damage]
    path = tmp_path / f"a.txt.{codec}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a.txt.{codec} is damaged after line \d+"):
        texts(path)


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def column(path: Path, words: list[str]) -> bytes:
    parquet.write_table(pyarrow.table({"text": words}), path)
    return path.read_bytes()


def test_the_members_of_an_archive_are_read_in_order(tmp_path: Path) -> None:
    members = {
        "b/c.csv": b"text\nfour\n",
        "a.txt": b"one\n",
        "b/a.jsonl.bz2": bz2.compress(b'{"text": "two"}\n'),
        "b/b.parquet": column(tmp_path / "x", ["three"]),
        "c.json": b'[{"text": "five"},\n {"text": "six"}]',
        "picture.png": b"\x89PNG",
        "__MACOSX/a.txt": b"no",
        ".hidden/a.txt": b"no",
        "note.json": b'{"title": "x", "body": "y"}',
    }
    path = archive(tmp_path / "all.zip", members)
    reading = Reading()
    found = [text for _, text in sources.documents(str(path), reading=reading)]
    assert found == [b"one", b"two", b"three", b"four", b"five", b"six"]
    assert reading.report.skipped == {f"{path}/note.json": "JSON without posts"}
    path.rename(tmp_path / "no_ending")
    assert texts(tmp_path / "no_ending") == found, "an archive is known by its first bytes"
    folder = tmp_path / "folder"
    folder.mkdir()
    archive(folder / "b.zip", {"a.txt": b"two\n"})
    (folder / "a.txt").write_bytes(b"one\n")
    assert texts(folder) == [b"one", b"two"]


def test_mistakes_in_archives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.docx: no text in this archive of 1 files"):
        texts(archive(tmp_path / "a.docx", {"word/document.xml": b"<x/>"}))
    with pytest.raises(UserError, match=r"b.zip/bad.txt is not text: it contains NUL bytes"):
        texts(archive(tmp_path / "b.zip", {"bad.txt": b"\0"}))
    path = archive(tmp_path / "c.zip", {"a.txt": CONTENT})
    content = path.read_bytes()
    path.write_bytes(content[:5000] + b"\xff" * 1000 + content[6000:])
    with pytest.raises(UserError, match=r"c.zip/a.txt is damaged after line \d+"):
        texts(path)
    path.write_bytes(content[:5000])
    with pytest.raises(UserError, match=r"c.zip is damaged: File is not a zip file"):
        texts(path)
    path = archive(tmp_path / "d.zip", {"a.txt": b"x\n"})
    content = bytearray(path.read_bytes())
    for start in (content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8):
        content[start] |= 1  # as a zip with a password says it
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"d.zip/a.txt is locked by a password"):
        texts(path)


def test_an_array_is_read_item_by_item_whatever_its_size(tmp_path: Path) -> None:
    words = ["x" * (3 << 20), *(f'word {number} é😀]}},"' for number in range(50_000))]
    path = tmp_path / "a.json"
    path.write_text(
        "\ufeff [\n" + ",\n".join(json.dumps({"text": word}, ensure_ascii=False) for word in words) + "\n]\n"
    )
    assert texts(path) == [word.encode() for word in words]
    for end, message in (
        ("", "is not JSON"),
        (', {"text": 5}]', "field 'text' is not a string"),
        (", 5]", "not a JSON"),
    ):
        path.write_text('[{"text": "a"}' + end)
        with pytest.raises(UserError, match=rf"a.json item {2}.*{message}"):
            texts(path)


@pytest.mark.parametrize("name", ["a", "a.dat", "a.md"])
def test_a_file_of_any_ending_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content, expected in (
        (b'{"text": "a"}\n{"text": "b"}\n', [b"a", b"b"]),
        (b'[{"text": "a"}, {"text": "b"}]', [b"a", b"b"]),
        (column(tmp_path / "x", ["a", "b"]), [b"a", b"b"]),
        (b"{a}\nb\n", [b"{a}", b"b"]),
    ):
        path.write_bytes(content)
        reading = Reading()
        assert [text for _, text in sources.documents(str(path), reading=reading)] == expected
        if expected[0] == b"{a}":
            assert reading.report.guesses == [f"{path}: plain text, a document a line"]


def test_text_that_looks_like_json_is_text_and_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b'{"text": "a"}\n')
    reading = Reading()
    assert [text for _, text in sources.documents(str(path), reading=reading)] == [b'{"text": "a"}']
    assert "its lines look like JSON" in reading.report.guesses[0]
