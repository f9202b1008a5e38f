"""Posts and bios in the forms that networks provide them: X, Bluesky and Mastodon, each recognised by its content.

A form tells whether a JSON object belongs to it, and which records the object holds. Field names are those of the
networks' own documentation and of the tools that write such files (twarc, archive converters).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from raytrain.data.cleaning import unescape
from raytrain.data.markup import html_text
from raytrain.data.reading import REPOST, Reading, Record, languages

Item = dict[str, Any]
PUBLIC = "https://www.w3.org/ns/activitystreams#Public"
NOTICES = ("delete", "limit", "scrub_geo", "status_withheld", "user_withheld", "disconnect", "warning")
"""Lines of an X stream that are not posts, by their only field."""
_NO_TEXT = "without a text"
_NO_BIO = "without a bio"
_CUT_OFF = re.compile(r"\s*(?:…|\.\.\.)?\s*(?:https://t\.co/\w+)?\s*$")
"""Ending of a long post's truncated text."""
_SHORTEST_BEGINNING = 140


class Form(NamedTuple):
    """A form in which posts are provided."""

    name: str
    matches: Callable[[Item], bool]
    records: Callable[[Item, Reading], Iterable[Record]]


def recognised(items: Iterable[Item]) -> Form | None:
    """Return the form of the first of ``items`` that has a known one."""
    return next((form for item in items for form in FORMS if form.matches(item)), None)


def _is(value: Any, **kinds: type) -> bool:
    """Return whether ``value`` is an object with fields of these types."""
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _inner(item: Item, name: str) -> Item:
    """Return an object nested in an object; an empty one if there is none."""
    value = item.get(name)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _record(text: str | None, missing: str = _NO_TEXT, **known: Any) -> Record:
    return Record(text, "" if text else missing, **known)


# ----------------------------------------------------------------------------------------- X, version 1.1


def _is_v1(item: Item) -> bool:
    if set(item) == {"delete"}:
        return _is(item["delete"], status=dict)
    return _is(item, user=dict, created_at=str) and ("full_text" in item or "text" in item) and "id" in item


def _v1(item: Item, reading: Reading) -> Iterator[Record]:
    if len(item) == 1 and next(iter(item)) in NOTICES:
        yield Record(None, f"notices of the stream: {next(iter(item))}")
        return
    tongue = languages(item.get("lang"))
    if reading.bios:
        user = _inner(item, "user")
        yield _bio(user.get("description"), user.get("id_str") or user.get("id"), tongue)
        return
    repeated = _inner(item, "retweeted_status")
    yield _record(_full_text(repeated or item, reading), languages=tongue, repost=bool(repeated))


def _full_text(post: Item, reading: Reading) -> str | None:
    """Return the whole text of a post of version 1.1; some interfaces also give a truncated text."""
    whole = _inner(post, "extended_tweet").get("full_text") or post.get("full_text")
    text = _text(whole) or _text(post.get("text"))
    if post.get("truncated") is True:
        reading.report.remarks["cut off, replaced by the full text" if _text(whole) else _STILL_CUT] += 1
    return None if text is None else unescape(text)


_STILL_CUT = "cut off, and the full text is not in the file"


def _bio(text: Any, account: Any, tongue: tuple[str, ...] = (), *, is_html: bool = False) -> Record:
    found = _text(text)
    if found is not None:
        found = html_text(found) if is_html else unescape(found)
    return _record(found or None, _NO_BIO, languages=tongue, author="" if account is None else str(account))


# ----------------------------------------------------------------------------------------- X, version 2


def _is_v2_post(value: Any) -> bool:
    return _is(value, id=str, text=str) and any(
        name in value for name in ("edit_history_tweet_ids", "author_id", "conversation_id", "public_metrics")
    )


def _is_v2_page(item: Item) -> bool:
    if "data" not in item:
        return False
    data = item["data"]
    if data == [] or _is(data, username=str) or (isinstance(data, list) and _is(data[0], username=str)):
        return "meta" in item or "includes" in item or "__twarc" in item
    return _is_v2_post(data[0] if isinstance(data, list) else data) or (
        isinstance(data, list) and _is(data[0], id=str, text=str) and ("includes" in item or "meta" in item)
    )


def _v2_page(item: Item, reading: Reading) -> Iterator[Record]:
    included = _inner(item, "includes")
    data = item["data"] if isinstance(item["data"], list) else [item["data"]]
    if reading.bios:
        users = included.get("users")
        for user in [*(users if isinstance(users, list) else []), *(one for one in data if _is(one, username=str))]:
            if isinstance(user, dict):
                yield _bio(user.get("description"), user.get("id"))
        return
    others = included.get("tweets")
    by_id = {post.get("id"): post for post in (others if isinstance(others, list) else []) if _is(post, id=str)}
    for post in data:
        if isinstance(post, dict):
            yield _v2_record(post, by_id, reading)


def _is_v2_flat(item: Item) -> bool:
    return _is_v2_post(item) and "data" not in item


def _v2_flat(item: Item, reading: Reading) -> Iterator[Record]:
    if reading.bios:
        author = _inner(item, "author")
        account = author.get("id") or item.get("author_id")
        yield _bio(author.get("description"), account, languages(item.get("lang")))
        return
    yield _v2_record(item, {}, reading)


def _v2_record(post: Item, others: dict[Any, Item], reading: Reading) -> Record:
    """Return the text of a post; for a repost, the text of the post that it repeats, which comes with it."""
    references = post.get("referenced_tweets")
    references = references if isinstance(references, list) else []
    repeated = next((one for one in references if _is(one, type=str) and one["type"] == "retweeted"), None)
    whole = post
    if repeated is not None:
        whole = repeated if _text(repeated.get("text")) else others.get(str(repeated.get("id")), post)
    text = _text(_inner(whole, "note_tweet").get("text"))
    if text is not None or whole is not post:
        reading.report.remarks["cut off, replaced by the full text"] += 1
    text = text or _text(whole.get("text"))
    return _record(
        None if text is None else unescape(text), languages=languages(post.get("lang")), repost=repeated is not None
    )


# ----------------------------------------------------------------------------------------- X, archives


def archive_records(items: Iterable[Any], part: str, reading: Reading) -> Iterator[Record] | None:
    """Return the records of one file of an X archive, called ``part`` in it; None if it has none that were asked for.

    Full texts of long posts are in a file of their own that comes first; they are kept for the posts.
    """
    if part in ("note_tweet", "note_tweets"):
        for item in items:
            _add_note(_inner(item, "noteTweet") if isinstance(item, dict) else {}, reading)
        return iter(())
    if part == "profile" and reading.bios:
        return (_archive_bio(item) for item in items)
    if part in ("tweet", "tweets") and not reading.bios:
        return (_archive_post(item, reading) for item in items)
    return None


def _add_note(note: Item, reading: Reading) -> None:
    text = _text(_inner(note, "core").get("text")) or _text(_inner(note, "noteTweetResults").get("text"))
    if text is not None and isinstance(note.get("tweetId"), str):
        reading.notes_by_post[note["tweetId"]] = unescape(text)
    elif text is not None:
        reading.notes.append(unescape(text))


def _archive_bio(item: Any) -> Record:
    profile = _inner(item, "profile") if isinstance(item, dict) else {}
    return _bio(_inner(profile, "description").get("bio"), None)


def _archive_post(item: Any, reading: Reading) -> Record:
    item = item if isinstance(item, dict) else {}
    post = _inner(item, "tweet") or item
    repeated = _inner(post, "retweeted_status")  # only in the oldest archives
    text = _full_text(repeated or post, reading)
    repost = bool(repeated) or post.get("retweeted") is True or (text or "").startswith(REPOST)
    if text is not None and (note := _note(post, text, reading)) is not None:
        reading.report.remarks["cut off, replaced by the full text"] += 1
        text = note
    return _record(text, languages=languages(post.get("lang")), repost=repost)


def _note(post: Item, text: str, reading: Reading) -> str | None:
    """Return the full text of a long post: the one for its id, or the only one with the same beginning."""
    if (known := reading.notes_by_post.get(str(post.get("id_str") or post.get("id")))) is not None:
        return known
    if len(text) < _SHORTEST_BEGINNING or not reading.notes:
        return None
    beginning = _CUT_OFF.sub("", text)
    longer = [note for note in reading.notes if len(note) > len(beginning) and note.startswith(beginning)]
    return longer[0] if len(longer) == 1 and len(beginning) >= _SHORTEST_BEGINNING else None


# ----------------------------------------------------------------------------------------- Bluesky


def _is_jetstream(item: Item) -> bool:
    return _is(item, did=str, time_us=int) and ("kind" in item or "commit" in item)


def _jetstream(item: Item, reading: Reading) -> Iterator[Record]:
    if not isinstance(item.get("commit"), dict):
        yield Record(None, f"events that are no posts: {_word(item.get('kind'))}")
        return
    yield _commit(item["commit"], item.get("did"), reading)


def _is_jetstream_2(item: Item) -> bool:
    if item.get("$type") == "error":
        return isinstance(item.get("error"), str)
    return item.get("$type") == "message" and "#" in str(_inner(item, "payload").get("$type"))


def _jetstream_2(item: Item, reading: Reading) -> Iterator[Record]:
    payload = _inner(item, "payload")
    kind = str(payload.get("$type", item.get("$type"))).rpartition("#")[2]
    if kind != "commit":
        yield Record(None, f"events that are no posts: {_word(kind)}")
        return
    yield _commit(payload, payload.get("did"), reading)


def _commit(commit: Item, account: Any, reading: Reading) -> Record:
    """Return the text in a change to a person's records on Bluesky."""
    kind, operation = commit.get("collection"), commit.get("operation", "create")
    record = _inner(commit, "record")
    if operation == "delete":
        return Record(None, "deletions")
    if reading.bios:
        if kind != "app.bsky.actor.profile":
            return Record(None, f"records that are no profiles: {_word(kind)}")
        return _record(_text(record.get("description")), _NO_BIO, author=str(account))
    if kind != "app.bsky.feed.post":
        return Record(None, f"records that are no posts: {_word(kind)}")
    if operation != "create":
        return Record(None, "changes of posts")
    return _record(_text(record.get("text")), languages=languages(record.get("langs")))


def _word(value: Any) -> str:
    """Return a kind as written in the file, short and on one line."""
    return re.sub(r"[^\w.#-]", "", str(value))[:60] or "unknown"


# ----------------------------------------------------------------------------------------- Mastodon


def _is_status(item: Item) -> bool:
    return _is(item, content=str, account=dict) and ("visibility" in item or "uri" in item or "reblog" in item)


def _status(item: Item, reading: Reading) -> Iterator[Record]:
    repeated = _inner(item, "reblog")
    tongue = languages((repeated or item).get("language"))
    if reading.bios:
        account = _inner(item, "account")
        yield _bio(account.get("note"), account.get("url") or account.get("id"), tongue, is_html=True)
    elif item.get("visibility", "public") not in ("public", "unlisted"):
        yield Record(None, "posts that are not public")
    else:
        text = html_text(str((repeated or item).get("content") or ""))
        yield _record(text or None, languages=tongue, repost=bool(repeated))


def _is_activity(item: Item) -> bool:
    return item.get("type") in ("Create", "Announce") and "object" in item and "actor" in item


def _is_outbox(item: Item) -> bool:
    kind = item.get("type")
    return kind in ("OrderedCollection", "OrderedCollectionPage") and isinstance(item.get("orderedItems"), list)


def _outbox(item: Item, reading: Reading) -> Iterator[Record]:
    for activity in item["orderedItems"]:
        if isinstance(activity, dict):
            yield from _activity(activity, reading)
        else:
            yield Record(None, "entries of a collection that are no posts")


def _activity(item: Item, reading: Reading) -> Iterator[Record]:
    post = _inner(item, "object")
    if reading.bios:
        yield Record(None, "posts, where bios were asked for")
    elif item.get("type") == "Announce":
        yield Record(None, "reposts, whose text is elsewhere")
    elif not post:
        yield Record(None, _NO_TEXT)
    elif not _is_public(post if "to" in post else item):
        yield Record(None, "posts that are not public")
    else:
        text = html_text(str(post.get("content") or ""))
        tongues = tuple(_inner(post, "contentMap")) or languages(post.get("language"))
        yield _record(text or None, languages=tongues)


def _is_public(post: Item) -> bool:
    readers = [post.get("to"), post.get("cc")]
    if readers == [None, None]:
        return True
    named = [name for value in readers for name in (value if isinstance(value, list) else [value])]
    return any(name in (PUBLIC, "as:Public", "Public") for name in named)


def _is_actor(item: Item) -> bool:
    return item.get("type") in ("Person", "Service") and "outbox" in item and "preferredUsername" in item


def _actor(item: Item, reading: Reading) -> Iterator[Record]:
    if reading.bios:
        yield _bio(item.get("summary"), item.get("id"), is_html=True)
    else:
        yield Record(None, "profiles, where posts were asked for")


FORMS = (
    Form("Bluesky Jetstream", _is_jetstream, _jetstream),
    Form("Bluesky Jetstream 2", _is_jetstream_2, _jetstream_2),
    Form("X API v1.1", _is_v1, _v1),
    Form("X API v2, pages", _is_v2_page, _v2_page),
    Form("X API v2, posts", _is_v2_flat, _v2_flat),
    Form("Mastodon statuses", _is_status, _status),
    Form("ActivityPub activities", _is_activity, _activity),
    Form("ActivityPub collection", _is_outbox, _outbox),
    Form("ActivityPub profile", _is_actor, _actor),
)
"""Every form, in the order in which they are tried."""
