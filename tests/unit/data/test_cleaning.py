from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raytrain.data.cleaning import Seen, clean, valid_utf8
from tests.support.examples import examples

DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("@bob_99: look at this", "@userid: look at this"),
        ("@bob@ann,@eve", "@userid@ann,@userid"),
        ("mail me: bob@example.com", "mail me: bob@example.com"),
        ("see https://t.co/Ab1?x=y&z now", "see url now"),
        ("HTTP://X.ORG/a,b and www.example.com/", "url and url"),
        ("awww.so cute", "awww.so cute"),
        ("cut off https:… or http", "cut off url or url"),
        ("cut off https:/ ...", "cut off url ..."),
        ("httpd is a server", "httpd is a server"),
        ("  two\n lines \r\n\t here ", "two lines here"),
        ("non\u00a0breaking\u2003space", "non breaking space"),
        ("AT&amp;T &lt;3 &#128512; &quot;x&quot;", 'AT&T <3 😀 "x"'),
        ("twice &amp;amp;amp; escaped &amp;lt;3", "twice & escaped <3"),
        ("R&D &copy me &unknown; AT&T;", "R&D &copy me &unknown; AT&T;"),
        ("&#0;&#1;&#55357;&#9999999;", "\ufffd\ufffd\ufffd"),
        ("&" + "amp;" * 20 + "lt;", "amp;amp;amp;amp;amp;amp;amp;amp;amp;amp;amp;amp;lt;"),
        ("&nbsp;", ""),
        ("@userid url 😀 naïve", "@userid url 😀 naïve"),
        ("", ""),
    ],
)
def test_examples(raw: str, cleaned: str) -> None:
    assert clean(raw.encode()) == cleaned.encode()


@pytest.mark.parametrize(
    ("raw", "valid"),
    [
        (b"caf\xe9 \xff\xfe\xfd!", b"caf   !"),
        (b"\xe2\x82", b" "),
        (b"\xf0\x9f\x98\x80\x80", b"\xf0\x9f\x98\x80 "),
        (b"\xed\xa0\xbd", b" "),
        (b"\xc0\xafx", b" x"),
        (b"a\0b\r", b"a\0b\r"),
    ],
)
def test_a_run_of_invalid_bytes_becomes_one_space(raw: bytes, valid: bytes) -> None:
    assert valid_utf8(raw) == valid


PIECES = st.sampled_from(
    [
        "@",
        "http",
        "https",
        ":",
        "/",
        "//",
        "...",
        "…",
        "www.",
        "w",
        ".",
        "url",
        "userid",
        "a",
        "_",
        "&",
        "amp;",
        "amp",
        "lt;",
        "#",
        "38;",
        "#38;",
        "#x26;",
        "9",
        ";",
        "\n",
        "\xa0",
        "é",
        "😀",
    ]
)


@given(st.one_of(st.lists(PIECES, max_size=12).map("".join).map(str.encode), st.binary(max_size=40)))
@example(b"&am&#112;;amp;lt;")
@example(b"http:@bob")
@example(b"@http://x@y")
@settings(deadline=None, max_examples=examples(500))
def test_cleaning_cleaned_text_changes_nothing(raw: bytes) -> None:
    once = clean(raw)
    assert clean(once) == once
    assert valid_utf8(once) == once
    assert b"\n" not in once
    assert once.strip() == once


@given(st.binary(max_size=60))
def test_valid_text_is_kept(raw: bytes) -> None:
    valid = valid_utf8(raw)
    valid.decode("utf-8")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        assert len(valid) <= len(raw)
    else:
        assert valid == raw


@pytest.mark.parametrize(
    "piece", [b"&amp;", b"&", b"&#38;", b"@", b"@a", b"http", b"http:/", b"www.", b"\xff", b" \n", b"x"]
)
def test_time_is_linear(piece: bytes) -> None:
    started = time.process_time()
    clean(piece * (2_000_000 // len(piece)))
    assert time.process_time() - started < 10


def test_deeply_nested_entities_take_linear_time() -> None:
    started = time.process_time()
    clean(b"&" + b"amp;" * 500_000)
    assert time.process_time() - started < 10


def test_seen() -> None:
    seen = Seen()
    assert [seen.add(text) for text in (b"a", b"b", b"a", b"", b"")] == [True, True, False, True, False]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real text in ../shared/data")
def test_real_text_that_was_cleaned_before_hardly_changes() -> None:
    with gzip.open(DATA / "tweets" / "tweets.txt.gz") as file:
        tweets = [line.rstrip(b"\n") for _, line in zip(range(20_000), file, strict=False)]
    changed = [tweet for tweet in tweets if clean(tweet) != tweet]
    assert len(changed) < 0.01 * len(tweets)
    with open(DATA / "bios" / "bios.jsonl", encoding="utf-8") as file:
        bios = [json.loads(line)["bio"].encode() for _, line in zip(range(5_000), file, strict=False)]
    assert all(clean(clean(bio)) == clean(bio) for bio in bios)
