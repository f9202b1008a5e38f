from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytrain.data import sources
from raytrain.data.reading import Report, Selection
from raytrain.utils.errors import UserError


def read(path: Path, *, source: str | None = None, **selection: Any) -> tuple[list[bytes], Report]:
    reading = sources.reading(source or str(path), Selection(**selection))
    found = sources.documents(source or str(path), None if source is None else str(path), reading)
    return [text for _, text in found], reading.report


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


CELLS = 'id,text,n\n1,"one, two",5\n2,"a ""quote""\nand a line",6\n\n3,é 😀,7\n4,broken\n5,,8\n'
TEXTS = [b"one, two", b'a "quote"\nand a line', "é 😀".encode(), b""]


@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.csv.gz"])
def test_csv(tmp_path: Path, name: str) -> None:
    import gzip

    content = CELLS.encode()
    texts, report = read(write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content))
    assert texts == TEXTS
    assert report.dropped == {"rows with another number of cells than the first": 1}
    assert report.formats == {"CSV": 1}
    assert report.guesses == [], "the other columns hold numbers"


@pytest.mark.parametrize(("delimiter", "word"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_what_separates_cells_is_found_and_said(tmp_path: Path, delimiter: str, word: str) -> None:
    rows = [("id", "text", "more"), ("1", "one, two", "x"), ("2", "three", "y")]
    path = write(tmp_path / "a.csv", "\r\n".join(delimiter.join(row) for row in rows))
    texts, report = read(path)
    assert texts == [b"one, two", b"three"]
    assert f"{path}: cells are separated by {word}" in report.guesses
    assert f"{path}: field 'text' holds the text, not more" in report.guesses


def test_tabs_need_no_quotes(tmp_path: Path) -> None:
    bare = 'text\tlabel\n"so he said\t1\nand "yes"\t0\n'
    assert read(write(tmp_path / "a.tsv", bare))[0] == [b'"so he said', b'and "yes"']
    quoted = 'text\tlabel\n"two\twords"\t1\n"a ""b"""\t0\n'
    texts, report = read(write(tmp_path / "b.tsv", quoted))
    assert texts == [b"two\twords", b'a "b"']
    assert report.guesses == [f"{tmp_path}/b.tsv: cells are separated by tabs, with quotes"]


def test_a_column_is_found_named_or_numbered(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "user,comment\nann,good\nbob,bad\n")
    with pytest.raises(UserError, match=r"which column holds the text\? Its first line has user, comment; name one"):
        read(path)
    assert read(path, field="comment")[0] == [b"good", b"bad"]
    texts, report = read(path, field="2")
    assert texts == [b"comment", b"good", b"bad"], "a number says that there is no line of names"
    assert report.guesses == [f"{path}: no line of names; column 2 of 2 holds the text"]
    with pytest.raises(UserError, match=r"has no column '3'; its first line has user, comment; .* from 1 to 2"):
        read(path, field="3")
    with pytest.raises(UserError, match=r"has the column 'text' twice"):
        read(write(tmp_path / "b.csv", "text,text\na,b\n"))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_sentiment140(tmp_path: Path, encoding: str) -> None:
    rows = [
        '"0","1467810369","Mon Apr 06 22:19:45 PDT 2009","NO_QUERY","ann","@bob caf\xe9 &amp; cake"',
        '"4","1467810672","Mon Apr 06 22:19:49 PDT 2009","NO_QUERY","bob","it is ""fine"", so"',
    ]
    path = write(tmp_path / "training.csv", "\n".join(rows).encode(encoding))
    texts, report = read(path)
    assert texts == ["@bob café & cake".encode(), b'it is "fine", so']
    assert report.formats == {"Sentiment140": 1}
    assert report.guesses == [f"{path}: Sentiment140, column 6 of 6 holds the text"]
    named = write(tmp_path / "b.csv", "text,date,user,sentiment,query\na &lt; b,x,ann,4,NO_QUERY\n")
    texts, report = read(named)
    assert (texts, report.formats) == ([b"a < b"], {"Sentiment140": 1})


TWARC_1 = "id,text,tweet_type,lang,user_id,user_description\n"
TWARC_2 = "id,text,lang,referenced_tweets.retweeted.id,author_id,author.description\n"


@pytest.mark.parametrize("version", [1, 2])
def test_csv_of_twarc(tmp_path: Path, version: int) -> None:
    rows = [("1", "a &amp; b", "en", False), ("2", "c", "de", False), ("3", "again", "en", True)]
    lines = [
        f"{number},{text},{'retweet' if again else 'original'},{tag},7,rivers\n"
        if version == 1
        else f"{number},{text},{tag},{9 if again else ''},7,rivers\n"
        for number, text, tag, again in rows
    ]
    path = write(tmp_path / "a.csv", (TWARC_1 if version == 1 else TWARC_2) + "".join(lines))
    texts, report = read(path)
    assert texts == [b"a & b", b"c", b"again"]
    assert report.formats == {"twarc CSV": 1}
    texts, report = read(path, language="en", reposts=False)
    assert texts == [b"a & b"]
    assert report.dropped == {"reposts": 1, "of another language than en": 1}
    for options in ({"take": "bio"}, {"source": "bios"}):
        texts, report = read(path, **options)
        assert texts == [b"rivers"]
        assert report.dropped == {"the same bio of the same account": 2}


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    long = "word " * 100_000
    assert read(write(tmp_path / "a.csv", f"text,n\n{long},1\n"))[0] == [long.encode()]


def test_invalid_bytes_stay_what_they_are(tmp_path: Path) -> None:
    content = b"text,n\n" + b"ok,1\n" * 50 + b"caf\xe9,2\n"
    assert read(write(tmp_path / "a.csv", content))[0][-1] == b"caf\xe9"
