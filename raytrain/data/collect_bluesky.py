"""Posts and profiles of Bluesky from its Jetstream, a public stream of what people write, over websockets.

Each event is stored as a line, as it was sent. A later call continues after the last event in the file, as far back as
the server keeps events.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode, urlsplit

from raytrain.data.collecting import PATIENCE_S, Collection
from raytrain.utils.errors import UserError
from raytrain.utils.text import one_line
from raytrain.utils.validation import parse_json

try:
    from websockets import exceptions
    from websockets.sync.client import connect
except ImportError:  # an optional dependency
    connect = None

Take = Literal["text", "bio"]
WANTED = {"text": ("app.bsky.feed.post", ("create",)), "bio": ("app.bsky.actor.profile", ("create", "update"))}
"""What to take -> the collection of its records, and the operations that write a text."""
SILENCE_S = 60.0
"""Seconds without an event after which the connection is re-established."""
LONGEST_PAUSE_S = 15.0
CLOSING_S = 1.0
"""Longest time to wait, on closing a connection, for data that the server still sends and nobody reads."""
SHOWN = 1000
"""Events between two progress lines."""


class Events:
    """How far a stream has been read, according to the file."""

    def __init__(self, take: Take) -> None:
        self.wanted, self.operations = WANTED[take]
        self.count = 0
        self.cursor = 0
        """Time of the last event, in microseconds, from which the server continues."""

    def take(self, event: dict[str, Any]) -> None:
        """Count an event of the file."""
        self.count += 1
        self.cursor = max(self.cursor, int(event["time_us"]))

    def is_wanted(self, event: Any) -> bool:
        """Return whether an event writes a requested text and was not read before; move the cursor to it."""
        if not isinstance(event, dict) or type(event.get("time_us")) is not int or event["time_us"] <= self.cursor:
            return False
        self.cursor = event["time_us"]
        commit = event.get("commit")
        return (
            isinstance(event.get("did"), str)
            and isinstance(commit, dict)
            and commit.get("collection") == self.wanted
            and commit.get("operation") in self.operations
        )


class NotKeptError(Exception):
    """The file did not accept an event: the disk is full, for example."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def collect(output: Path, most: int, *, take: Take, endpoint: str) -> None:
    """Add events to the file ``output`` until it holds ``most`` posts or profiles.

    Raises:
        UserError: a value or file cannot be used, or the server refuses or does not answer.
    """
    if connect is None:
        raise UserError("collecting from Bluesky needs the package websockets: pip install 'raytrain[collect]'")
    if most < 1:
        raise UserError(f"--most {most}: must be positive")
    if not is_endpoint(endpoint):
        raise UserError(f"--endpoint {one_line(endpoint)}: must be an address such as wss://HOST/subscribe")
    events = Events(take)
    with Collection(output, {"source": endpoint, "take": take}, events.take) as collection:
        had = f"{events.count:,} are there; " if events.count else ""
        print(
            f"Bluesky Jetstream, {endpoint}: {had}up to {max(0, most - events.count):,} more "
            f"{'posts' if take == 'text' else 'profiles'}, as fast as people write them\n"
            "rate limit: none for one reader of the stream; cost: none, and no account\n"
            "terms: those of Bluesky for its services; texts remain their authors'",
            flush=True,
        )
        read(collection, events, most, endpoint)
    print(f"{output}: {events.count:,} events; read them by python -m raytrain.data prepare")


def is_endpoint(address: str) -> bool:
    """Return whether ``address`` can be a Jetstream address: without a user, and without a query."""
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:  # misplaced brackets, or an invalid port
        return False
    return parts.scheme in ("ws", "wss") and bool(parts.hostname) and not parts.query and "@" not in parts.netloc


def read(collection: Collection, events: Events, most: int, endpoint: str) -> None:
    """Read the stream until there are ``most`` events; re-establish a broken connection.

    Raises:
        UserError: the server refuses, or sends nothing new for ``PATIENCE_S``.
        OSError: the file accepts no more.
    """
    last, pause = time.monotonic(), 0.5
    while events.count < most:
        before = events.count
        try:
            read_connection(collection, events, most, endpoint)
        except exceptions.InvalidStatus as error:
            if error.response.status_code < 500:
                raise UserError(f"{endpoint} refuses: status {error.response.status_code}") from None
            reason: Exception = error
        except NotKeptError as error:
            raise error.reason from None
        except (exceptions.WebSocketException, OSError) as error:
            reason = error
        if events.count >= most:
            return
        if events.count > before:
            last, pause = time.monotonic(), 0.5
        if time.monotonic() > last + PATIENCE_S:
            said = one_line(str(reason) or type(reason).__name__)
            raise UserError(f"{endpoint} does not answer: {said}; the same command continues")
        print(f"the stream broke off, trying again: {one_line(str(reason) or type(reason).__name__)}", flush=True)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def read_connection(collection: Collection, events: Events, most: int, endpoint: str) -> None:
    """Read one connection until there are ``most`` events, or it breaks.

    Raises:
        NotKeptError: the file accepts no more.
        OSError, websockets.exceptions.WebSocketException: the connection broke.
    """
    asked = {"wantedCollections": events.wanted} | ({"cursor": events.cursor} if events.cursor else {})
    with connect(f"{endpoint}?{urlencode(asked)}", close_timeout=CLOSING_S) as socket:
        while events.count < most:
            try:
                event = parse_json(socket.recv(timeout=SILENCE_S))
            except ValueError:
                continue  # not a readable event
            if not events.is_wanted(event):
                continue
            try:
                collection.add(event)
            except OSError as error:  # from the file, not from the connection
                raise NotKeptError(error) from error
            events.take(event)
            if events.count % SHOWN == 0:
                print(f"{events.count:,} of {most:,}", flush=True)
