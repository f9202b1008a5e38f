"""A golden file of every form, of our own making: the texts and the report that must come of it."""

from __future__ import annotations

import contextlib
import json
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest

from raytrain.data import sources
from raytrain.data.markup import html_text
from raytrain.data.reading import Reading, Report, Selection
from raytrain.utils.errors import UserError


def read(path: Path, *, source: str | None = None, **selection: Any) -> tuple[list[str], Report]:
    reading = sources.reading(source or str(path), Selection(**selection))
    found = sources.documents(source or str(path), None if source is None else str(path), reading)
    return [text.decode() for _, text in found], reading.report


def read_bytes(path: Path, **selection: Any) -> list[bytes]:
    return [text for _, text in sources.documents(str(path), reading=sources.reading("x", Selection(**selection)))]


def lines(path: Path, *items: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def script(path: Path, start: str, items: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{start} = {json.dumps(items, indent=2)}", "utf-8")
    return path


# ----------------------------------------------------------------------------------------- X archives

LONG = "A long post about rivers. " * 14
ARCHIVE = [
    {"tweet": {"id_str": "1", "full_text": "salt &amp; pepper", "retweeted": False, "lang": "en", "truncated": False}},
    {"tweet": {"id_str": "2", "full_text": "RT @ann: hello", "retweeted": False, "lang": "en"}},
    {"tweet": {"id_str": "3", "full_text": "Guten Tag", "lang": "de", "entities": {"urls": []}}},
    {"tweet": {"id_str": "4", "full_text": f"{LONG[:270]}… https://t.co/abc", "lang": "en"}},
    {"tweet": {"id_str": "5", "full_text": "named", "lang": "en"}},
    {"tweet": {"id_str": "6", "lang": "en"}},
]
NOTES = [
    {"noteTweet": {"noteTweetId": "90", "core": {"text": LONG.strip()}}},
    {"noteTweet": {"noteTweetId": "91", "noteTweetResults": {"text": "named, in full"}, "tweetId": "5"}},
]


def x_archive(folder: Path) -> Path:
    """An archive as it is unpacked, with much that is no post."""
    data = folder / "data"
    script(data / "tweets.js", "window.YTD.tweets.part0", ARCHIVE)
    script(data / "tweets-part1.js", "window.YTD.tweets.part1", [{"tweet": {"id_str": "7", "full_text": "part two"}}])
    script(data / "note-tweet.js", "window.YTD.note_tweet.part0", NOTES)
    script(data / "direct-messages.js", "window.YTD.direct_messages.part0", [{"dmConversation": {"text": "secret"}}])
    bio = {"profile": {"description": {"bio": "rivers &amp; maps", "website": "x"}}}
    script(data / "profile.js", "window.YTD.profile.part0", [bio])
    (data / "manifest.js").write_text("window.__THAR_CONFIG = {}")
    (folder / "Your archive.html").write_text("<html>not read</html>")
    return folder


ARCHIVE_TEXTS = ["part two", "salt & pepper", "RT @ann: hello", "Guten Tag", LONG.strip(), "named, in full"]


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_an_x_archive(tmp_path: Path, form: str) -> None:
    path = x_archive(tmp_path / "archive")
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "archive.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(path.rglob("*")):
                archive.write(file, file.relative_to(path))
            archive.writestr("__MACOSX/data/tweets.js", "rubbish")
        path = tmp_path / "archive.zip"
    texts, report = read(path)
    assert texts == ARCHIVE_TEXTS
    assert report.dropped == {"without a text": 1}
    assert report.remarks == {"cut off, replaced by the full text": 2}
    assert report.formats == {"X archive": 3}
    assert {name.rpartition("/")[2]: why for name, why in report.skipped.items()} == {
        "direct-messages.js": "direct_messages of an X archive, no posts",
        "manifest.js": "no posts in it",
        "profile.js": "profile of an X archive, no posts",
    }
    assert [line.rpartition("/")[2] for line in report.guesses][-1] == "tweets.js: tweets of an X archive"
    texts, report = read(path, language="en", reposts=False)
    assert texts == ["salt & pepper", LONG.strip(), "named, in full"]
    assert report.dropped == {
        "without a text": 1,
        "reposts": 1,
        "of another language than en": 1,
        "of no stated language": 1,
    }
    assert read(path, take="bio")[0] == read(path, source="bios")[0] == ["rivers & maps"]


def test_a_script_of_an_archive_that_holds_something_else_is_refused_by_name(tmp_path: Path) -> None:
    path = x_archive(tmp_path) / "data"
    with pytest.raises(UserError, match=r"direct-messages.js: direct_messages of an X archive, no posts"):
        read(path / "direct-messages.js")
    with pytest.raises(UserError, match=r"tweets.js: tweets of an X archive, no bio"):
        read(path / "tweets.js", take="bio")
    assert read(path / "tweets-part1.js")[0] == ["part two"]


def test_older_x_archives(tmp_path: Path) -> None:
    old = script(tmp_path / "a" / "tweet.js", "window.YTD.tweet.part0", [{"id_str": "1", "full_text": "no wrapper"}])
    assert read(old)[0] == ["no wrapper"]
    items = [
        {"id_str": "1", "text": "of 2007 &lt;3"},
        {"id_str": "2", "text": "RT @bob: cut of…", "retweeted_status": {"text": "cut off no more"}},
    ]
    oldest = script(tmp_path / "b" / "data/js/tweets/2007_11.js", "Grailbird.data.tweets_2007_11", items).parents[3]
    (oldest / "data" / "js" / "user_details.js").write_text('var user_details = {"bio": "not read"}')
    texts, report = read(oldest)
    assert texts == ["of 2007 <3", "cut off no more"]
    assert list(report.skipped.values()) == ["no posts in it"]
    assert read(oldest, reposts=False)[0] == ["of 2007 <3"]


# ----------------------------------------------------------------------------------------- X API

USER = {"id_str": "11", "description": "I post &amp; read", "screen_name": "ann"}
V1 = [
    {"delete": {"status": {"id": 5, "id_str": "5", "user_id": 1}}},
    {"created_at": "x", "id": 1, "text": "plain &gt; fancy", "user": USER, "lang": "en", "truncated": False},
    {
        "created_at": "x",
        "id": 2,
        "text": "the begin… https://t.co/x",
        "truncated": True,
        "extended_tweet": {"full_text": "the beginning and the end"},
        "user": USER,
        "lang": "en",
    },
    {"created_at": "x", "id": 3, "text": "only the begin…", "truncated": True, "user": USER, "lang": "en"},
    {
        "created_at": "x",
        "id": 4,
        "text": "RT @bob: all of th…",
        "user": {"id_str": "12", "description": None},
        "lang": "fr",
        "retweeted_status": {"text": "all of th…", "extended_tweet": {"full_text": "all of this"}, "truncated": True},
    },
    {
        "created_at": "x",
        "id": 6,
        "full_text": "of twarc",
        "user": {"id_str": "13", "description": "maps"},
        "lang": "und",
    },
    {"limit": {"track": 7}},
]


def test_posts_of_the_first_x_interface(tmp_path: Path) -> None:
    path = lines(tmp_path / "stream.json", *V1)
    texts, report = read(path)
    assert texts == ["plain > fancy", "the beginning and the end", "only the begin…", "all of this", "of twarc"]
    assert report.dropped == {"notices of the stream: delete": 1, "notices of the stream: limit": 1}
    assert report.remarks == {
        "cut off, replaced by the full text": 2,
        "cut off, and the full text is not in the file": 1,
    }
    assert report.formats == {"X API v1.1": 1}
    assert report.guesses == [f"{path}: X API v1.1, posts"]
    assert read(path, language="EN", reposts=False)[0] == texts[:3]
    texts, report = read(path, take="bio")
    assert texts == ["I post & read", "maps"]
    assert report.dropped["the same bio of the same account"] == 2
    assert report.dropped["without a bio"] == 1


def test_a_named_field_is_read_and_not_the_form(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *(item for item in V1 if "text" in item))
    texts, report = read(path, field="user.description")
    assert texts == ["I post &amp; read"] * 3 + [""], "as it stands there"
    assert report.formats == {"JSON": 1}
    assert report.guesses == []


PAGE = {
    "data": [
        {"id": "1", "author_id": "11", "text": "one &amp; two", "lang": "en"},
        {
            "id": "2",
            "author_id": "12",
            "text": "RT @ann: cut of…",
            "lang": "en",
            "referenced_tweets": [{"type": "retweeted", "id": "9"}],
        },
        {"id": "3", "author_id": "12", "text": "begin…", "note_tweet": {"text": "beginning and end"}, "lang": "de"},
        {"id": "4", "author_id": "12", "text": "an answer", "referenced_tweets": [{"type": "replied_to", "id": "8"}]},
    ],
    "includes": {
        "users": [{"id": "11", "username": "ann", "description": "rivers"}, {"id": "12", "username": "bob"}],
        "tweets": [{"id": "9", "text": "cut off no more"}, {"id": "8", "text": "the question"}],
    },
    "meta": {"result_count": 4},
}


@pytest.mark.parametrize("form", ["page", "indented page", "flattened"])
def test_posts_of_the_second_x_interface(tmp_path: Path, form: str) -> None:
    if form == "page":
        path = lines(tmp_path / "a.jsonl", PAGE, {"data": [], "meta": {"result_count": 0}})
    elif form == "indented page":
        path = tmp_path / "a.json"
        path.write_text(json.dumps(PAGE, indent=4))
    else:
        users = {user["id"]: user for user in PAGE["includes"]["users"]}
        others = {post["id"]: post for post in PAGE["includes"]["tweets"]}
        flat = [{**post, "author": users[post["author_id"]], "__twarc": {"version": "2"}} for post in PAGE["data"]]
        for post in flat:
            post["referenced_tweets"] = [one | others[one["id"]] for one in post.get("referenced_tweets", ())]
        path = lines(tmp_path / "a.jsonl", *flat)
    texts, report = read(path)
    assert texts == ["one & two", "cut off no more", "beginning and end", "an answer"]
    assert report.remarks == {"cut off, replaced by the full text": 2}
    assert report.formats == {"X API v2, posts" if form == "flattened" else "X API v2, pages": 1}
    assert read(path, language="en", reposts=False)[0] == ["one & two"]
    texts, report = read(path, take="bio")
    assert texts == ["rivers"]
    assert report.dropped["without a bio"] == (3 if form == "flattened" else 1)


# ----------------------------------------------------------------------------------------- Bluesky


def event(operation: str, collection: str, record: dict[str, Any] | None, did: str = "did:plc:a") -> dict[str, Any]:
    commit = {"rev": "r", "operation": operation, "collection": f"app.bsky.{collection}", "rkey": "k"}
    return {"did": did, "commit": commit | ({} if record is None else {"record": record, "cid": "c"})}


EVENTS = [
    event("create", "feed.like", {"subject": {}}),
    event("create", "feed.post", {"text": "hello &amp; sky", "langs": ["en-GB"], "createdAt": "x"}),
    event("create", "feed.post", {"text": "hallo", "langs": ["de", "en"], "reply": {"root": {}}}),
    event("create", "feed.post", {"text": "", "langs": ["en"], "embed": {}}),
    event("create", "feed.post", {"text": "no language said"}),
    event("update", "feed.post", {"text": "changed"}),
    event("delete", "feed.post", None),
    event("create", "feed.repost", {"subject": {}}),
    event("create", "actor.profile", {"description": "a bio", "displayName": "A"}),
    event("update", "actor.profile", {"description": "a bio"}),
    event("update", "actor.profile", {"description": "another"}, "did:plc:b"),
]


@pytest.mark.parametrize("version", [1, 2])
def test_bluesky_jetstream(tmp_path: Path, version: int) -> None:
    if version == 1:
        items = [{"did": "did:plc:a", "time_us": 1, "kind": "identity", "identity": {"handle": "a"}}]
        items += [{**item, "time_us": 1, "kind": "commit"} for item in EVENTS]
    else:
        start = "network.bsky.jetstream.subscribeEvents#"
        payloads = [{"$type": f"{start}identity", "did": "did:plc:a", "seq": 1}]
        payloads += [{"$type": f"{start}commit", "did": item["did"], "seq": 2, **item["commit"]} for item in EVENTS]
        items = [{"$type": "message", "payload": payload} for payload in payloads]
    path = lines(tmp_path / "events.jsonl", *items)
    texts, report = read(path)
    assert texts == ["hello &amp; sky", "hallo", "no language said"]
    assert report.dropped == {
        "events that are no posts: identity": 1,
        "records that are no posts: app.bsky.feed.like": 1,
        "records that are no posts: app.bsky.feed.repost": 1,
        "records that are no posts: app.bsky.actor.profile": 3,
        "without a text": 1,
        "changes of posts": 1,
        "deletions": 1,
    }
    assert report.formats == {"Bluesky Jetstream" if version == 1 else "Bluesky Jetstream 2": 1}
    assert read(path, language="en")[0] == ["hello &amp; sky", "hallo"]
    texts, report = read(path, take="bio")
    assert texts == ["a bio", "another"]
    assert report.dropped["the same bio of the same account"] == 1
    field = "commit.record.text" if version == 1 else "payload.record.text"
    texts, report = read(path, field=field)
    assert texts == ["hello &amp; sky", "hallo", "", "no language said", "changed"]
    assert report.dropped == {f"without the field {field}": 7}


# ----------------------------------------------------------------------------------------- Mastodon


def status(content: str, **values: Any) -> dict[str, Any]:
    account = {"id": "1", "url": "https://a/@ann", "note": "<p>maps &amp; more</p>"}
    return {"id": "1", "uri": "u", "visibility": "public", "content": content, "account": account, **values}


STATUSES = [
    status("<p>Hi &amp; bye</p><p>two<br>lines</p>", language="en", reblog=None),
    status("<p>secret</p>", visibility="direct"),
    status("<p>for friends</p>", visibility="private"),
    status("", language="de", reblog=status("<p>of another</p>", language="fr")),
    status("", media_attachments=[{}]),
]


@pytest.mark.parametrize("form", ["lines", "array"])
def test_mastodon_statuses(tmp_path: Path, form: str) -> None:
    path = tmp_path / "statuses.json"
    if form == "lines":
        lines(path, *STATUSES)
    else:
        path.write_text(json.dumps(STATUSES, indent=1))
    texts, report = read(path)
    assert texts == ["Hi & bye\n\ntwo\nlines", "of another"]
    assert report.dropped == {"posts that are not public": 2, "without a text": 1}
    assert read(path, language="fr")[0] == ["of another"]
    assert read(path, reposts=False)[0] == texts[:1]
    texts, report = read(path, take="bio")
    assert texts == ["maps & more"]
    assert report.dropped == {"the same bio of the same account": 4}


PUBLIC = "https://www.w3.org/ns/activitystreams#Public"


def activity(content: str, to: str = PUBLIC, **post: Any) -> dict[str, Any]:
    note = {"type": "Note", "content": content, "summary": None, "published": "x", "to": [to], "cc": [], **post}
    return {"type": "Create", "actor": "https://a/users/ann", "to": [to], "object": note}


def mastodon_archive(folder: Path) -> Path:
    items = [
        activity("<p>First</p>", contentMap={"en": "<p>First</p>"}),
        activity("<p>secret</p>", "https://a/users/bob"),
        activity("<p>quiet</p>", "https://a/users/ann/followers", cc=[PUBLIC], contentMap={"de": "<p>quiet</p>"}),
        {"type": "Announce", "actor": "https://a/users/ann", "object": "https://b/users/bob/statuses/1"},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    outbox = {"@context": "x", "id": "outbox.json", "type": "OrderedCollection", "totalItems": 4, "orderedItems": items}
    actor = {"type": "Person", "id": "https://a/users/ann", "preferredUsername": "ann", "outbox": "outbox.json"}
    likes = {"type": "OrderedCollection", "id": "likes.json", "orderedItems": ["https://b/1", "https://b/2"]}
    for name, values in {"outbox": outbox, "actor": actor | {"summary": "<p>rivers</p>"}, "likes": likes}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    (folder / "settings.json").write_text('{"theme": "dark", "note": "not read"}')
    return folder


def test_a_mastodon_archive(tmp_path: Path) -> None:
    path = mastodon_archive(tmp_path / "archive")
    texts, report = read(path)
    assert texts == ["First", "quiet"]
    assert report.dropped == {
        "reposts, whose text is elsewhere": 1,
        "posts that are not public": 1,
        "profiles, where posts were asked for": 1,
        "entries of a collection that are no posts": 2,
    }
    assert [name.rpartition("/")[2] for name in report.skipped] == ["settings.json"]
    assert read(path, language="de")[0] == ["quiet"]
    assert read(path, take="bio")[0] == ["rivers"]
    assert read(path / "outbox.json")[0] == texts
    with pytest.raises(UserError, match=r"settings.json line 1: which field holds the text"):
        read(path / "settings.json")


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("plain &lt;3 &#128512;", "plain <3 😀"),
        ("<p>a</p>\n<p>b</p>", "a\n\nb"),
        ('<a href="https://x.org/abc"><span class="invisible">https://</span>x.org/abc</a>', "https://x.org/abc"),
        ('<span class="h-card"><a class="u-url">@<span>ann</span></a></span> hi', "@ann hi"),
        ("<ul><li>one</li><li>two</li></ul>", "one\ntwo"),
        ("a<script>no()</script><style>p{}</style>b", "ab"),
        ("1 < 2 & 3", "1 < 2 & 3"),
        ("", ""),
    ],
)
def test_html_is_read_as_a_person_sees_it(html: str, text: str) -> None:
    assert html_text(html) == text


# ----------------------------------------------------------------------------------------- together


def test_forms_in_one_folder_are_each_read_as_what_they_are(tmp_path: Path) -> None:
    x_archive(tmp_path / "x")
    mastodon_archive(tmp_path / "mastodon")
    lines(tmp_path / "v1.jsonl", *V1)
    (tmp_path / "plain.txt").write_text("a line\nRT @ann: again\n")
    texts, report = read(tmp_path, reposts=False)
    assert {"a line", "First", "of twarc", "salt & pepper"} <= set(texts)
    assert not any(text.startswith("RT @") for text in texts)
    assert set(report.formats) == {
        "X archive",
        "ActivityPub collection",
        "ActivityPub profile",
        "X API v1.1",
        "plain text",
    }


def test_objects_of_another_form_are_counted(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *V1, STATUSES[0], {"what": "ever", "it": "is"})
    texts, report = read(path)
    assert texts[-1] == "Hi & bye\n\ntwo\nlines"
    assert report.dropped["objects that are not of the form X API v1.1"] == 1


@pytest.mark.parametrize(
    "items",
    [
        [{"text": "a", "user": "ann", "lang": "en"}],
        [{"warning": {"text": "no form"}, "text": "a"}],
        [{"content": "a", "author": "b"}],
        [{"data": "x", "text": "a"}],
        [{"did": "it", "text": "a"}],
    ],
)
def test_what_only_resembles_a_form_is_read_by_its_field(tmp_path: Path, items: list[Any]) -> None:
    texts, report = read(lines(tmp_path / "a.jsonl", *items))
    assert texts == ["a"]
    assert report.formats == {"JSON": 1}


def test_languages_and_bios_that_nothing_tells_are_refused(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("a\n")
    with pytest.raises(UserError, match=r"a.txt: nothing says the language of a text"):
        read(plain, language="en")
    with pytest.raises(UserError, match=r"a.txt is plain text, in which nothing says what is a bio"):
        read(plain, take="bio")
    path = lines(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(UserError, match=r"a.jsonl: nothing says the language of a text"):
        read(path, language="en")
    with pytest.raises(UserError, match=r"line 1: which field holds the bio\? It has text"):
        read(path, take="bio")
    with pytest.raises(UserError, match="synthetic has no fields, languages or reposts"):
        list(sources.documents("synthetic", reading=Reading(Selection(language="en"))))


def altered(value: Any, random: Random) -> Any:
    """``value`` with one part of it, at any depth, of another kind."""
    if not isinstance(value, (dict, list)) or not value or random.random() < 0.2:
        return random.choice((None, 5, True, "x", "\ud83d", [], {}, [[]], {"id": []}, [None, {"text": 1}]))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = random.choice(keys)
    copy: Any = value.copy()
    copy[key] = altered(value[key], random)
    return copy


@pytest.mark.parametrize("take", ["text", "bio"])
def test_posts_of_no_form_end_in_the_report_or_in_one_line(tmp_path: Path, take: str) -> None:
    random = Random(0)
    versions = [{**item, "time_us": 1, "kind": "commit"} for item in EVENTS]
    groups: list[list[Any]] = [V1, [PAGE], versions, STATUSES, [activity("<p>a</p>")], PAGE["data"]]
    taken = 0
    for number in range(300):
        items = [altered(item, random) for item in random.choice(groups)]
        path = lines(tmp_path / f"{number}.jsonl", *(item for item in items if isinstance(item, dict)))
        with contextlib.suppress(UserError):
            taken += len(read_bytes(path, take=take))
    assert taken > 100
