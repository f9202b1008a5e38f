"""Posts that are collected: whole, once each, continued after any end, at no more cost than was said."""

from __future__ import annotations

import builtins
import errno
import importlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrain.data import __main__ as command
from raytrain.data.collecting import Collection
from raytrain.data.prepare import prepare
from raytrain.data.reading import Selection
from raytrain.utils.errors import UserError
from tests.support.networks import TOKEN, Jetstream, XServer, event

tweepy = pytest.importorskip("tweepy")
pytest.importorskip("websockets")

from raytrain.data import collect_bluesky, collect_x  # noqa: E402 (they need the packages)

QUERY = "lang:en birds"


@pytest.fixture
def x(monkeypatch: pytest.MonkeyPatch) -> Iterator[XServer]:
    """A server in the place of X, for every client of tweepy."""
    import requests

    server = XServer(250)

    class Local(requests.adapters.HTTPAdapter):
        def send(self, request: Any, *arguments: Any, **settings: Any) -> Any:
            request.url = request.url.replace("https://api.twitter.com", server.uri)
            return super().send(request, *arguments, **settings)

    begin = tweepy.client.BaseClient.__init__

    def mounted(client: Any, *arguments: Any, **settings: Any) -> None:
        begin(client, *arguments, **settings)
        client.session.trust_env = False
        client.session.mount("https://", Local())

    monkeypatch.setattr(tweepy.client.BaseClient, "__init__", mounted)
    monkeypatch.setenv(collect_x.TOKEN, TOKEN)
    yield server
    server.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were slept, each at once."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def search(output: Path, most: int, *, bios: bool = False, query: str = QUERY) -> None:
    collect_x.collect(query, output, most, bios=bios, token_file=None)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def ids(path: Path) -> list[str]:
    return [post["id"] for page in lines(path) for post in page["data"]]


def texts(path: Path, folder: Path, take: Any) -> list[str]:
    corpus = prepare(str(path), selection=Selection(take=take), output=folder)
    return sorted(
        corpus.split(name).document(number).decode()
        for name in corpus.splits
        for number in range(corpus.split(name).num_documents)
    )


# ------------------------------------------------------------------------------------------------ X


def test_posts_are_collected_once_each_and_no_more_than_asked_for(
    x: XServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "posts.jsonl"
    search(output, 105)
    assert ids(output) == [post["id"] for post in x.posts[:105]]
    assert [query["max_results"] for query in x.queries] == ["95", "10"]  # none asks for fewer than 10
    said = capsys.readouterr().out
    assert "up to 105 posts, in at least 2 requests" in said
    assert "450 of these in 15 minutes" in said
    assert "cost: at most $0.53, at $0.005 a post;" in said
    assert "Developer Agreement" in said
    assert said.index("cost:") < said.index("95 of 105 posts")
    assert {page["collected"]["query"] for page in lines(output)} == {QUERY}
    assert {page["collected"]["source"] for page in lines(output)} == {"X API v2, recent search"}

    # nothing is left to ask for
    search(output, 105)
    assert len(x.queries) == 2
    # a larger number goes on below the oldest, to the end of what there is
    search(output, 1000)
    assert ids(output) == [post["id"] for post in x.posts]
    assert "105 posts are there; up to 895 posts" in capsys.readouterr().out
    assert x.queries[2]["until_id"] == x.posts[104]["id"]


def test_what_was_collected_is_read_as_posts_and_as_bios(x: XServer, tmp_path: Path) -> None:
    search(tmp_path / "posts.jsonl", 250, bios=True)
    assert "expansions" in x.queries[0]
    found = texts(tmp_path / "posts.jsonl", tmp_path / "text", "text")
    assert found == sorted(f"post {number} & more é" for number in range(250))
    assert texts(tmp_path / "posts.jsonl", tmp_path / "bio", "bio") == [f"bio of {number}" for number in range(7)]
    search(tmp_path / "without.jsonl", 10)
    assert "expansions" not in x.queries[-1]


def test_the_accounts_of_authors_are_in_the_cost(
    x: XServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search(tmp_path / "posts.jsonl", 20, bios=True)
    assert "cost: at most $0.30, at $0.005 a post and $0.010 an account" in capsys.readouterr().out


def test_the_token_reaches_no_log_no_output_and_no_file(
    x: XServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("tweepy", "tweepy.client"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    search(tmp_path / "posts.jsonl", 10)
    x.answers = [lambda headers: (403, {}, {"errors": [{"message": f"no: {headers['Authorization']}"}]})]
    with pytest.raises(UserError, match=r"X refuses the search: 403 Forbidden.*no: Bearer \(token\)") as refused:
        search(tmp_path / "posts.jsonl", 20)
    captured = capsys.readouterr()
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    for text in (str(refused.value), captured.out, captured.err, caplog.text, *files):
        assert TOKEN not in text
        assert "secret" not in text


def test_a_rate_limit_is_waited_for(x: XServer, tmp_path: Path, pauses: list[float]) -> None:
    reset = str(int(time.time()) + 30)
    x.answers = [lambda _: (429, {"x-rate-limit-remaining": "0", "x-rate-limit-reset": reset}, {"title": "Too Many"})]
    search(tmp_path / "posts.jsonl", 10)
    assert len(ids(tmp_path / "posts.jsonl")) == 10
    assert len(pauses) == 1
    assert 25 <= pauses[0] <= 31


def test_a_service_that_fails_for_a_while_is_asked_again(x: XServer, tmp_path: Path, pauses: list[float]) -> None:
    x.answers = [lambda _: (503, {}, {"title": "Over capacity"})] * 2
    search(tmp_path / "posts.jsonl", 10)
    assert len(ids(tmp_path / "posts.jsonl")) == 10
    assert len(pauses) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}, {"detail": "Unauthorized"}), "X refuses the search: 401 Unauthorized"),
        ((403, {}, {"detail": "Forbidden"}), "X refuses the search: 403 Forbidden"),
        ((400, {}, {"errors": [{"message": "bad\nquery"}]}), "X refuses the search: 400 Bad Request"),
        ((429, {}, {"title": "UsageCapExceeded"}), "X gives no more posts: 429 Too Many Requests.*console.x.com"),
        (
            (429, {"x-rate-limit-remaining": "7", "x-rate-limit-reset": "9"}, {"title": "CreditsDepleted"}),
            "X gives no more posts: 429",
        ),
        ((200, {}, {"data": [{"text": "no id"}]}), "something that is no page of posts"),
        ((200, {}, [1]), "something that is no page of posts"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_what_there_is(
    x: XServer, tmp_path: Path, answer: tuple[int, dict[str, str], Any], message: str
) -> None:
    search(tmp_path / "posts.jsonl", 10)
    before = (tmp_path / "posts.jsonl").read_bytes()
    x.answers = [lambda _: answer]
    with pytest.raises(UserError, match=message) as refused:
        search(tmp_path / "posts.jsonl", 30)
    assert "\n" not in str(refused.value)
    assert (tmp_path / "posts.jsonl").read_bytes() == before
    search(tmp_path / "posts.jsonl", 30)
    assert ids(tmp_path / "posts.jsonl") == [post["id"] for post in x.posts[:30]]


def test_a_server_that_cannot_be_reached_is_named(
    x: XServer, tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect_x, "PATIENCE_S", 0.0)
    x.close()
    with pytest.raises(UserError, match=r"X cannot be reached: .*; the same command continues"):
        search(tmp_path / "posts.jsonl", 10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "asks for a bearer token"),
        (b" \n", "asks for a bearer token"),
        (b"AAAA BBBB", "holds more than a bearer token"),
        (b"AAAA\r\nHost: other", "holds more than a bearer token"),
        ("ÄÄÄÄ".encode(), "holds more than a bearer token"),
        (b"\xff\xfe", "cannot be read: it is no text"),
    ],
)
def test_a_file_without_a_token_is_refused_without_repeating_it(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        collect_x.read_token(file)
    assert "AAAA" not in str(refused.value)


def test_a_token_may_stand_in_a_file(x: XServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(collect_x.TOKEN)
    (tmp_path / "token").write_text(TOKEN + "\n")
    collect_x.collect(QUERY, tmp_path / "posts.jsonl", 10, bios=False, token_file=tmp_path / "token")
    assert len(ids(tmp_path / "posts.jsonl")) == 10


# --------------------------------------------------------------------------------------------- the file


def test_what_was_left_of_a_last_line_is_collected_again(x: XServer, tmp_path: Path) -> None:
    search(tmp_path / "posts.jsonl", 200)
    whole = (tmp_path / "posts.jsonl").read_bytes()
    second = whole.index(b"\n") + 1
    for end in (0, 5, 40, second, second + 1, second + 100, len(whole) - 1):
        (tmp_path / "posts.jsonl").write_bytes(whole[:end])
        search(tmp_path / "posts.jsonl", 200)
        assert (tmp_path / "posts.jsonl").read_bytes() == whole, end


@pytest.mark.parametrize("content", [b"mine", b"mine\n", b'{"text": "mine"}\n', b'{"collected": "x"}\n', b"[" * 5000])
def test_a_file_of_somebody_else_is_left_as_it_is(x: XServer, tmp_path: Path, content: bytes) -> None:
    output = tmp_path / "posts.jsonl"
    output.write_bytes(content)
    with pytest.raises(
        UserError, match=r"posts.jsonl: line 1 is not from this source and request; choose another file"
    ):
        search(output, 10)
    assert output.read_bytes() == content
    assert x.queries == []


@pytest.mark.parametrize("other", [{"query": "cats"}, {"bios": True}])
def test_another_request_does_not_go_into_the_same_file(x: XServer, tmp_path: Path, other: dict[str, Any]) -> None:
    search(tmp_path / "posts.jsonl", 10)
    with pytest.raises(UserError, match="is not from this source and request"):
        search(tmp_path / "posts.jsonl", 20, **other)


def test_one_process_at_a_time_adds_to_a_file(tmp_path: Path) -> None:
    origin = {"source": "tests"}
    with (
        Collection(tmp_path / "posts.jsonl", origin, lambda values: None),
        pytest.raises(UserError, match="another process adds to it"),
        Collection(tmp_path / "posts.jsonl", origin, lambda values: None),
    ):
        pass


def test_a_text_that_is_no_unicode_can_be_kept(tmp_path: Path) -> None:
    values = {"text": "\ud83d half of a pair", "collected": "another"}
    origin, seen = {"source": "tests"}, []
    for _ in range(2):
        with Collection(tmp_path / "posts.jsonl", origin, seen.append) as collection:
            collection.add(values)
    assert seen == [{"collected": origin, "text": values["text"]}]


# --------------------------------------------------------------------------------------------- Bluesky


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_bluesky, "SILENCE_S", 0.2)
    monkeypatch.setattr(collect_bluesky, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(collect_bluesky, "CLOSING_S", 0.05)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))


def stream(output: Path, most: int, server: Jetstream, take: Any = "text") -> None:
    collect_bluesky.collect(output, most, take=take, endpoint=server.uri)


def events() -> list[Any]:
    """Events of every kind, and what is none."""
    others: list[Any] = [
        event(200, operation="delete"),
        event(201, operation="update"),
        {"did": "did:plc:1", "time_us": 1_000_202, "kind": "identity", "identity": {"did": "did:plc:1"}},
        "no JSON",
        "[" * 5000,
        '"a text"',
        '{"time_us": true, "did": "did:plc:1", "commit": {}}',
        event(203, "app.bsky.actor.profile"),
        event(204, "app.bsky.actor.profile", "update"),
    ]
    return [*(event(number) for number in range(100)), *others, *(event(number) for number in range(300, 400))]


@pytest.mark.parametrize("breaks_after", [None, 1, 7, 120])
def test_a_stream_that_breaks_off_is_read_on_without_gap_or_repetition(
    quick: None, tmp_path: Path, breaks_after: int | None
) -> None:
    server = Jetstream(events(), breaks_after=breaks_after)
    try:
        if breaks_after == 1:  # each connection sends the last event again, and no more
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(collect_bluesky, "PATIENCE_S", 0.05)
                with pytest.raises(UserError, match=r"does not answer: .*; the same command continues"):
                    stream(tmp_path / "posts.jsonl", 150, server)
            assert len(lines(tmp_path / "posts.jsonl")) == 1
            server.breaks_after = None
        stream(tmp_path / "posts.jsonl", 150, server)
        found = lines(tmp_path / "posts.jsonl")
        assert [each["time_us"] - 1_000_000 for each in found] == [*range(100), *range(300, 350)]
        assert {each["collected"]["source"] for each in found} == {server.uri}
        assert found[3]["commit"]["rkey"] == "k3"
        assert server.queries[0] == {"wantedCollections": ["app.bsky.feed.post"]}
        # a later call goes on
        stream(tmp_path / "posts.jsonl", 160, server)
        assert [each["time_us"] - 1_000_000 for each in lines(tmp_path / "posts.jsonl")] == [
            *range(100), *range(300, 360)
        ]  # fmt: skip
        assert server.queries[-1]["cursor"] == [str(1_000_000 + 349)] or breaks_after is not None
    finally:
        server.close()


def test_posts_and_profiles_are_read_as_texts(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Jetstream(events())
    try:
        stream(tmp_path / "posts.jsonl", 200, server)
        server.events = [event(number, "app.bsky.actor.profile") for number in range(60)]
        stream(tmp_path / "bios.jsonl", 60, server, "bio")
    finally:
        server.close()
    found = texts(tmp_path / "posts.jsonl", tmp_path / "text", "text")
    assert found == sorted(f"post {number} 🦋" for number in [*range(100), *range(300, 400)])
    assert texts(tmp_path / "bios.jsonl", tmp_path / "bio", "bio") == sorted(f"bio {number}" for number in range(60))
    said = capsys.readouterr().out
    assert "up to 200 more posts, as fast as people write them" in said
    assert "rate limit: none" in said
    assert "cost: none" in said
    assert "terms: those of Bluesky" in said


def test_a_full_disk_is_no_broken_connection(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Collection, values: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Collection, "add", full)
    server = Jetstream(events())
    try:
        with pytest.raises(OSError, match="No space left"):
            stream(tmp_path / "posts.jsonl", 10, server)
    finally:
        server.close()


def test_a_stream_that_refuses_is_not_asked_again(quick: None, tmp_path: Path) -> None:
    server = Jetstream([])
    try:
        server.status = 404
        with pytest.raises(UserError, match="refuses: status 404"):
            stream(tmp_path / "posts.jsonl", 10, server)
        server.status = 503
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collect_bluesky, "PATIENCE_S", 0.1)
            with pytest.raises(UserError, match=r"does not answer: .*503"):
                stream(tmp_path / "posts.jsonl", 10, server)
    finally:
        server.close()


# --------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "birds", "--most", "9"], "--most 9: X gives at least 10 posts"),
        (["x", " ", "--most", "10"], "the query has 1 characters: must be from 1 to 512"),
        (["x", "b" * 513, "--most", "10"], "the query has 513 characters"),
        (["x", "birds", "--most", "10"], "set X_BEARER_TOKEN"),
        (["bluesky", "--most", "0"], "--most 0: must be positive"),
        (["bluesky", "--most", "1", "--endpoint", "https://x/"], "must be an address such as wss://"),
        *(
            (["bluesky", "--most", "1", "--endpoint", address], "must be an address such as wss://")
            for address in ("wss://me:key@x/", "wss://[abc/", "wss://x:abc/", "wss://x:99999/", "wss://x/?a=b")
        ),
    ],
)
def test_a_mistake_is_told_before_a_file_is_made(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(collect_x.TOKEN, raising=False)
    output = tmp_path / "posts.jsonl"
    monkeypatch.setattr(sys, "argv", ["data", "collect", *arguments, "--output", str(output)])
    with pytest.raises(UserError, match=message):
        command.main()
    assert not output.exists()


@pytest.mark.parametrize(
    ("module", "package", "arguments"),
    [("collect_x", "tweepy", ["x", "birds"]), ("collect_bluesky", "websockets", ["bluesky"])],
)
def test_a_missing_package_is_named(
    module: str, package: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return find(name, *more)

    loaded = importlib.import_module(f"raytrain.data.{module}")
    monkeypatch.setattr(sys, "argv", ["data", "collect", *arguments, "--most", "10", "--output", str(tmp_path / "o")])
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        importlib.reload(loaded)
        with pytest.raises(UserError, match=rf"needs the package {package}: pip install 'raytrain\[collect\]'"):
            command.main()
    importlib.reload(loaded)
