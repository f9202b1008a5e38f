from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import os
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from raytrain.data import files as inputs
from raytrain.data import sources
from raytrain.data.reading import Selection
from raytrain.utils.errors import UserError


def texts(source: str | Path, path: str | Path | None = None, field: str | None = None, **options: Any) -> list[bytes]:
    reading = sources.reading(str(source), Selection(field))
    return [text for _, text in sources.documents(str(source), None if path is None else str(path), reading, **options)]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def table(path: Path, **columns: list[Any]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


# ---------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
def test_a_document_of_plain_text_is_a_line(tmp_path: Path, name: str) -> None:
    content = b" one \r\n\ntwo\xff\rtwo\nlast"
    assert texts(write(tmp_path / name, content)) == [b" one ", b"", b"two\xff\rtwo", b"last"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    lines = [{"id": 1, "t": "one\ntwo 😀"}, {"t": None, "id": 2}, {"id": 3, "t": ""}]
    content = "\n".join(json.dumps(line) for line in lines) + '\n\n{"t": "lone \\ud83d surrogate"}\n'
    expected = ["one\ntwo 😀".encode(), b"", b"", b"lone \xed\xa0\xbd surrogate"]
    assert texts(write(tmp_path / name, content.encode())) == expected


def test_an_invalid_byte_does_not_spoil_a_json_line(tmp_path: Path) -> None:
    content = b'{"t": "caf\xe9 au lait"}\n{"t": "\xfc\xfc \\ud83d"}\n'
    assert texts(write(tmp_path / "a.jsonl", content)) == [b"caf\xe9 au lait", b"\xfc\xfc \xed\xa0\xbd"]


@pytest.mark.parametrize("usual", ["text", "bio", "tweet", "content"])
def test_the_field_is_found_or_named(tmp_path: Path, usual: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"user": "u", usual: "x", "n": 1}).encode())
    assert texts(path) == [b"x"]
    assert texts(path, field="user") == [b"u"]
    path = table(tmp_path / "a.parquet", user=["u"], **{usual: ["x"]})
    assert texts(path) == [b"x"]
    assert texts(path, field="user") == [b"u"]


IDS = [f"id-{number}" for number in range(200)]


def json_lines(path: Path, items: Sequence[object]) -> Path:
    return write(path, "".join(json.dumps(item) + "\n" for item in items).encode())


@pytest.mark.parametrize(
    "first",
    [
        {"text": None},
        {"text": ""},
        {"text": None, "n": 1},
        {"text": None, "entities": {"text": "x"}, "lang": "de"},
        {"bio": None, "content": "no"},
    ],
)
def test_a_null_is_no_reason_to_read_another_field(tmp_path: Path, first: dict[str, Any]) -> None:
    field = next(iter(first))
    items = [{"id": IDS[0], **first}, *({"id": name, **first, field: f"of {name}"} for name in IDS[1:])]
    expected = [b"", *(f"of {name}".encode() for name in IDS[1:])]
    assert texts(json_lines(tmp_path / "a.jsonl", items)) == expected
    columns = {name: [item[name] for item in items] for name in ("id", field)}
    assert texts(table(tmp_path / "a.parquet", **columns)) == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        # nothing but a null, or something with parts, may be the text as well as the only string
        ([{"id": "i", "words": None}], "line 1: which field holds the text. It has id, words"),
        ([{"id": "i", "words": ["x"]}], "line 1: which field"),
        ([{"id": "i", "words": {"text": "x"}}], "line 1: which field"),
        ([{"words": None}], "line 1: which field"),
        # the usual name goes first, and is not passed over
        ([{"id": "i", "text": ["x"]}], "line 1: field 'text' holds no text; it has id, text: name"),
        ([{"id": "i", "text": {"body": "x"}}], "field 'text' holds no text"),
        ([{"id": "i", "bio": "x", "text": 5}], "field 'text' holds no text"),
        # a later line has what the first lacks, soon or late
        ([{"id": "i"}, {"id": "j", "words": "x"}], "line 1: which field"),
        ([{"id": "i"}] * 150 + [{"id": "j", "words": "x"}], "line 151: which field"),
        (
            [{"id": "i"}] * 150 + [{"id": "j", "text": "x"}],
            "line 151 has a field 'text', but the lines before have 'id'",
        ),
        ([{"id": "i"}] * 150 + [{"id": "j", "text": None}], "line 151 has a field 'text'"),
        ([{"id": "i", "n": 1}] * 150 + [{"id": "j", "n": "x"}], "line 151: which field"),
        ([{"text": "x"}, {"id": "j"}], "line 2 has no field 'text'; it has id"),
        ([{}, {}], "line 1: which field holds the text. It has none"),
    ],
)
def test_no_other_field_of_json_is_taken_silently(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        texts(json_lines(tmp_path / "a.jsonl", lines))


def test_the_files_of_a_folder_have_their_text_in_one_field(tmp_path: Path) -> None:
    """Never a silent mixture of the texts of one file and the ids or titles of another."""
    json_lines(tmp_path / "a.jsonl", [{"content": "one"}])
    table(tmp_path / "b.parquet", content=["two"], text=["no"])
    write(tmp_path / "c.csv", b"content,id\nthree,3\n")
    message = rf"{tmp_path}/b.parquet has its text in the field 'text', but {tmp_path}/a.jsonl in 'content': name the"
    with pytest.raises(UserError, match=message):
        texts(tmp_path)
    assert texts(tmp_path, field="content") == [b"one", b"two", b"three"]
    (tmp_path / "b.parquet").unlink()
    assert texts(tmp_path) == [b"one", b"three"]


def test_the_only_string_is_the_text_beside_numbers(tmp_path: Path) -> None:
    items = [{"n": None, "t": None}, {"n": 1, "t": "a", "ok": True}, {"n": None, "t": "b", "ok": None, "f": 0.5}]
    assert texts(json_lines(tmp_path / "a.jsonl", items)) == [b"", b"a", b"b"]


@pytest.mark.parametrize("line", ['{"text": "a", "text": "b"}', '{"n": {"text": 1}, "text": "a", "x": 1, "text": "b"}'])
def test_a_field_that_is_there_twice_is_refused(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "x", "n": {"text": "y"}}\n' + line.encode())
    for field in (None, "text"):
        with pytest.raises(UserError, match=r"a.jsonl line 2 has the field 'text' twice"):
            texts(path, field=field)


@pytest.mark.parametrize("names", [["text", "text"], ["words", "words"], ["text", "id", "text"]])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table([pyarrow.array(["x"] * 20) for _ in names], names=names), path)
    for field in (None, names[0]):
        with pytest.raises(UserError, match=f"a.parquet has the column '{names[0]}' twice"):
            texts(path, field=field)
    assert texts(path, field="id") == [b"x"] * 20 if "id" in names else True


def as_type(kind: Any) -> Any:
    return lambda words: pyarrow.array([word if word is None else word.encode() for word in words], kind)


TEXT_TYPES = {
    "dictionary": lambda words: pyarrow.array(words).dictionary_encode(),
    "dictionary of bytes": lambda words: as_type(pyarrow.binary())(words).dictionary_encode(),
    "string_view": lambda words: pyarrow.array(words, pyarrow.string_view()),
    "large_string": lambda words: pyarrow.array(words, pyarrow.large_string()),
    "binary": as_type(pyarrow.binary()),
    "binary_view": as_type(pyarrow.binary_view()),
    "large_binary": as_type(pyarrow.large_binary()),
    "fixed size": lambda words: pyarrow.array(
        [word if word is None else word.encode().ljust(40, b"\0") for word in words], pyarrow.binary(40)
    ),
    "json": lambda words: pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(words)),
}


@pytest.mark.parametrize("kind", TEXT_TYPES)
@pytest.mark.parametrize("name", ["text", "words"])
def test_text_of_any_type_is_text(tmp_path: Path, kind: str, name: str) -> None:
    words = [None, "", *(f"word {number} é" for number in range(5_000))]
    column = TEXT_TYPES[kind](words)
    expected = [(word or "").encode() for word in words]
    path = table(tmp_path / "a.parquet", n=list(range(len(words))), **{name: column})
    assert texts(path) == texts(path, field=name) == expected
    path = table(tmp_path / "b.parquet", id=["i"] * len(words), **{name: column})
    if name == "text":
        assert texts(path) == expected
    else:  # and no other column is taken for it
        with pytest.raises(UserError, match=r"which field holds the text\? It has id, words"):
            texts(path)


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([["x"]] * 3),
        pyarrow.array([{"x": "y"}] * 3),
        pyarrow.array([[("x", "y")]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.string())),
        pyarrow.array([1, 2, 3]).dictionary_encode(),
    ],
    ids=str,
)
def test_a_column_text_that_cannot_be_read_is_named(tmp_path: Path, column: Any) -> None:
    with pytest.raises(UserError, match=r"a.parquet: field 'text' holds no text; it has id, text: name"):
        texts(table(tmp_path / "a.parquet", id=["i"] * 3, text=column))
    if not pyarrow.types.is_dictionary(column.type):
        with pytest.raises(UserError, match="which field holds the text"):
            texts(table(tmp_path / "b.parquet", id=["i"] * 3, words=column))
    assert texts(table(tmp_path / "c.parquet", id=["i"] * 3, text=pyarrow.nulls(3))) == [b""] * 3
    with pytest.raises(UserError, match="which field holds the text"):
        texts(table(tmp_path / "d.parquet", id=["i"] * 3, words=pyarrow.nulls(3)))


def test_a_column_is_found_by_its_whole_name(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", **{"text.lang": ["de"], "text": ["x"], "user.bio": ["y"]})
    assert texts(path) == [b"x"]
    assert texts(path, field="user.bio") == [b"y"]


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_a_column_within_others_is_found_by_its_way(tmp_path: Path, kind: str) -> None:
    words = ["a", None, "c", ""]
    record = pyarrow.StructArray.from_arrays([TEXT_TYPES[kind](words), pyarrow.array([1] * 4)], ["text", "n"])
    commit = pyarrow.StructArray.from_arrays([record], ["record"], mask=pyarrow.array([False, False, True, False]))
    path = table(tmp_path / "a.parquet", id=["i"] * 4, commit=commit)
    assert texts(path, field="commit.record.text") == [b"a", b"", b"", b""], "null where what is around it is"
    for field, message in {
        "commit.record.n": "column 'commit.record.n' is not text but int64",
        "commit.record": "column 'commit.record' is not text but struct",
        "commit.record.words": "no column 'commit.record.words'; it has text, n in 'commit.record'",
        "id.text": "no column 'id.text'; it has none in 'id'",
    }.items():
        with pytest.raises(UserError, match=message):
            texts(path, field=field)
    with pytest.raises(UserError, match="which field holds the text"):
        texts(path)


def test_parquet_by_language(tmp_path: Path) -> None:
    tags = [["en", "de"], [], None, ["de"]]
    path = table(tmp_path / "a.parquet", text=["a", "b", "c", "d"], langs=tags)
    reading = sources.reading("x", Selection(language="de"))
    assert [text for _, text in sources.documents(str(path), reading=reading)] == [b"a", b"d"]
    assert reading.report.dropped == {"of no stated language": 2}


def test_a_field_within_objects_is_found_by_its_way(tmp_path: Path) -> None:
    items = [{"a": {"b": "x"}}, {"a": {"b": None}}, {"a": {}}, {"a": 5}, {"a.b": "whole name", "a": {"b": "y"}}]
    reading = sources.reading("x", Selection(field="a.b"))
    path = json_lines(tmp_path / "a.jsonl", items)
    assert [text for _, text in sources.documents(str(path), reading=reading)] == [b"x", b"", b"whole name"]
    assert reading.report.dropped == {"without the field a.b": 2}


def test_parquet(tmp_path: Path) -> None:
    many = [f"row {number}" for number in range(10_000)]
    assert texts(table(tmp_path / "a.parquet", words=[*many, None, "", "é\n"], n=[1] * 10_003)) == [
        *(text.encode() for text in many),
        b"",
        b"",
        "é\n".encode(),
    ]
    words = pyarrow.array([b"\xff", b"a"], pyarrow.binary())
    assert texts(table(tmp_path / "b.parquet", words=words)) == [b"\xff", b"a"]


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", b"3\n4\n")
    write(tmp_path / "a" / "z.jsonl.gz", b'{"x": "2"}')
    table(tmp_path / "a" / "a.parquet", x=["1"])
    write(tmp_path / "README.md", b"not read")
    write(tmp_path / ".hidden" / "c.txt", b"not read")
    assert texts(tmp_path) == [b"1", b"2", b"3", b"4"]


def test_a_line_of_100_megabytes_takes_linear_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"ab " * 33_333_333 + b"\nend\n")
    started = time.process_time()
    *parts, last = texts(path)
    assert (sum(map(len, parts)), last) == (99_999_999, b"end")
    assert all(len(part) <= 2**20 and part.startswith(b"ab ") for part in parts), "in parts, none of them within a word"
    assert time.process_time() - started < 10


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_lines_may_end_as_on_old_macs_and_begin_with_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    lines = [b'{"t": "%d"}' % number for number in range(20_000)]
    found = texts(write(tmp_path / name, b"\xef\xbb\xbf" + b"\r".join(lines)))
    assert found == ([b"%d" % number for number in range(20_000)] if "jsonl" in name else lines)


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("a.txt", b"", None, "a.txt is empty"),
        ("a.txt", b"text\0text\n", None, "contains NUL bytes"),
        ("a.txt.gz", b"text\0text\n", None, "contains NUL bytes"),
        ("a.jsonl", b"\xff\xfe" * 20 + b"text" * 20, None, "not UTF-8 text: 40 of its first 120 bytes"),
        ("a.txt", b"text\n", "bio", "plain text and has no field 'bio'"),
        ("a.jsonl", b'{"a": "b"}\n{"a": ', None, "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"a": ' * 100_000, None, "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b'{"a": "b"}\n[1]\n', None, "line 2 is not a JSON object"),
        ("a.jsonl", b'{"a": "b"}\n{"b": "b", "c": 1}\n', "a", "line 2 has no field 'a'; it has b, c"),
        ("a.txt", "text\n".encode("utf-16"), None, "is UTF-16 text: convert it by iconv"),
        ("a.jsonl", b'{"a": "b"}\n', "bio", "line 1 has no field 'bio'; it has a"),
        ("a.jsonl", b'{"a": "b"}\n{"a": 7}\n', None, "line 2: field 'a' is not a string"),
        ("a.jsonl", b'{"a": "b", "c": "d", "n": 1}\n', None, "line 1: which field.* It has a, c, n; name one"),
        ("a.jsonl", b'{"n": 1}\n', None, "line 1: which field"),
        ("a.parquet", b"PAR1 but not really", None, "a.parquet is damaged or not Parquet"),
        ("a.csv", b"one,two", None, "which column holds the text. Its first line has one, two; name one"),
        ("a.pdf", b"%PDF\0", None, "a.pdf is not text: it contains NUL bytes"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, content: bytes, field: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        texts(write(tmp_path / name, content), field=field)


def test_mistakes_in_parquet(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", a=["x"] * 1000, b=["y"] * 1000, n=list(range(1000)))
    with pytest.raises(UserError, match=r"which field holds the text\? It has a, b, n"):
        texts(path)
    with pytest.raises(UserError, match="no column 'bio'; it has a, b, n"):
        texts(path, field="bio")
    with pytest.raises(UserError, match="column 'n' is not text but int64"):
        texts(path, field="n")
    content = bytearray(path.read_bytes())
    content[10:60] = b"\xaa" * 50
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="is damaged or not Parquet"):
        texts(path, field="a")


@pytest.mark.parametrize("damage", ["truncated", "altered", "no gzip"])
def test_damaged_gzip(tmp_path: Path, damage: str) -> None:
    random = Random(0)
    lines = b"".join(b"%d %s\n" % (number, random.randbytes(8).hex().encode()) for number in range(20_000))
    content = gzip.compress(lines)
    content = {
        "truncated": content[:-2000],
        "altered": content[:-2000] + b"\0" * 50 + content[-1950:],
        "no gzip": b"plain text\n",
    }[damage]
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"a.txt.gz is damaged after line \d+") as error:
        texts(tmp_path / "a.txt.gz")
    line = int(str(error.value).split("after line ")[1].split(":")[0])
    assert line == 0 if damage == "no gzip" else 10_000 < line <= 20_000


def test_mistakes_in_sources(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="no source 'tweeets': it is neither one of synthetic, ptb, ptb_characters, tweets, bios nor"
    ):
        texts("tweeets")
    with pytest.raises(UserError, match="no text in this folder"):
        texts(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        texts("tweets", tmp_path / "absent")
    with pytest.raises(UserError, match="bios has no public address: give --data-path"):
        texts("bios")
    with pytest.raises(UserError, match="--data-path does not go with synthetic"):
        texts("synthetic", tmp_path)
    with pytest.raises(UserError, match="--data-path goes with ptb, ptb_characters, tweets or bios"):
        texts(tmp_path, tmp_path)


# -------------------------------------------------------------------------------------- named, downloads


@pytest.mark.parametrize("name", ["ptb", "ptb_characters"])
def test_ptb_keeps_its_split_and_may_lack_a_test_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / "ptb.train.txt", b" a b \n c \n")
    with pytest.raises(UserError, match=r"no ptb.valid.txt; give the folder of ptb.train.txt and ptb.valid.txt"):
        texts(name, tmp_path)
    write(tmp_path / "ptb.valid.txt", b" d \n")
    write(tmp_path / "other.txt", b" not read \n")
    expected = [("train", b" a b "), ("train", b" c "), ("valid", b" d ")]
    assert list(sources.documents(name, str(tmp_path))) == expected
    write(tmp_path / "ptb.test.txt", b" e \n")
    assert list(sources.documents(name, str(tmp_path))) == [*expected, ("test", b" e ")]


def test_synthetic() -> None:
    found = list(sources.documents("synthetic"))
    assert [sum(split == name for split, _ in found) for name in ("train", "valid", "test")] == [60_000, 4_000, 4_000]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A web server in the place of the public addresses; the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(sources, "PTB_URL", f"http://127.0.0.1:{running.server_port}/")
        monkeypatch.setattr(sources, "TWEETS_URL", f"http://127.0.0.1:{running.server_port}/")
        yield folder
        running.shutdown()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_downloads_are_checked_and_kept(tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {split: f"the {split} text\n".encode() for split in ("train", "valid", "test")}
    monkeypatch.setattr(sources, "PTB_SHA256", {split: sha256(content) for split, content in contents.items()})
    for split, content in contents.items():
        write(server / f"ptb.{split}.txt", content)
    cache = tmp_path / "cache"
    expected = [(split, content[:-1]) for split, content in contents.items()]
    assert list(sources.documents("ptb", cache=cache)) == expected
    for split in contents:
        (server / f"ptb.{split}.txt").unlink()
    assert list(sources.documents("ptb", cache=cache)) == expected
    assert list(sources.documents("ptb_characters", cache=cache)) == expected
    assert len(list((cache / "downloads").iterdir())) == 3


def test_an_altered_download_is_refused(tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TWEETS_SHA256", {"emoji/train_text.txt": sha256(b"right\n")})
    write(server / "emoji" / "train_text.txt", b"wrong\n")
    with pytest.raises(UserError, match=r"has changed: its SHA-256 sum is .*; give the text with --data-path"):
        texts("tweets", cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    write(server / "emoji" / "train_text.txt", b"right\n")
    assert texts("tweets", cache=tmp_path / "cache") == [b"right"]


@pytest.mark.parametrize("source", ["ptb", "tweets"])
def test_where_there_is_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(sources, f"{source.upper()}_URL", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match=r"cannot download http://127.0.0.1:9/.* give --data-path"):
        texts(source, cache=tmp_path)


def test_known_sums_are_of_the_real_files() -> None:
    folder = Path(__file__).parents[4] / "shared" / "data" / "ptb"
    if not folder.is_dir():
        pytest.skip("needs the real text in ../shared/data")
    for split in ("train", "valid"):
        assert sha256((folder / f"ptb.{split}.txt").read_bytes()) == sources.PTB_SHA256[split]


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"x\n")
    first = sources.fingerprint(str(tmp_path))
    assert sources.fingerprint(str(tmp_path)) == first
    os.utime(path, ns=(1, 1))
    assert sources.fingerprint(str(tmp_path)) != first
    assert sources.fingerprint("ptb") == sources.fingerprint("ptb_characters") == sources.PTB_SHA256
    assert sources.fingerprint("synthetic") == sources.fingerprint("synthetic")


# --------------------------------------------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A bucket ``text`` in moto's server, reached through the AWS_* variables alone."""
    server_module = pytest.importorskip("moto.server", reason="needs moto[s3,server]")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("no_proxy", "*")
        import boto3

        client = boto3.client("s3")
        client.create_bucket(Bucket="text")
        yield client
    server.stop()


def test_s3(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put_object(Bucket="text", Key="many/", Body=b"")
    bucket.put_object(Bucket="text", Key="many/b.txt.gz", Body=gzip.compress(b"2\n3\n"))
    bucket.put_object(Bucket="text", Key="many/a/a.jsonl", Body=b'{"t": "1"}\n')
    bucket.put_object(Bucket="text", Key="many/note.md", Body=b"not read")
    bucket.put_object(Bucket="text", Key="many-more/c.txt", Body=b"not under many\n")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert texts("s3://text/many") == texts("s3://text/many/") == [b"1", b"2", b"3"]
    assert texts("s3://text/many/b.txt.gz") == texts("tweets", "s3://text/many/b.txt.gz") == [b"2", b"3"]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data/tweets.js", 'window.YTD.tweets.part0 = [{"tweet": {"full_text": "of an archive"}}]')
    bucket.put_object(Bucket="text", Key="archive.zip", Body=packed.getvalue())
    assert texts("s3://text/archive.zip") == [b"of an archive"]
    assert list(tmp_path.iterdir()) == [], "temporary files are removed"
    first = sources.fingerprint("s3://text/many")
    bucket.put_object(Bucket="text", Key="many/a/a.jsonl", Body=b'{"t": "9"}\n')
    assert sources.fingerprint("s3://text/many") != first
    first_input = inputs.find("s3://text/many")[0]
    assert (first_input.name, first_input.size) == ("s3://text/many/a/a.jsonl", 11)


def test_mistakes_in_s3(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put_object(Bucket="text", Key="only/note.md", Body=b"x")
    bucket.put_object(Bucket="text", Key="empty.txt", Body=b"")
    with pytest.raises(UserError, match="s3://text/absent: no such object or prefix"):
        texts("s3://text/absent")
    with pytest.raises(UserError, match="s3://text/only: nothing to read"):
        texts("s3://text/only")
    with pytest.raises(UserError, match=r"s3://text/empty.txt is empty"):
        texts("s3://text/empty.txt")
    with pytest.raises(UserError, match=r"s3://nobucket/x: .*NoSuchBucket.*; check the address"):
        texts("s3://nobucket/x")
    with pytest.raises(UserError, match="give s3://BUCKET/KEY"):
        texts("s3://")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match="Could not connect to the endpoint"):
        texts("s3://text/x")
