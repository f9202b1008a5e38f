"""Posts and profiles of Bluesky from its Jetstream, a public stream of what people write, by websockets.

An event is a line, as it was sent. A later call continues after the last event in the file, as far back as the server
keeps events.
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
"""What is taken -> the collection of its records, and the operations that write a text."""
SILENCE_S = 60.0
"""After so long without an event the connection is made anew."""
LONGEST_PAUSE_S = 15.0
CLOSING_S = 1.0
"""How long the end of a connection waits for what the server still sends, and nobody will read."""
SHOWN = 1000
"""Events between two lines of progress."""


class Events:
    """How far a stream has been read: what the file holds."""

    def __init__(self, take: Take) -> None:
        self.wanted, self.operations = WANTED[take]
        self.count = 0
        self.cursor = 0
        """Time of the last event, in microseconds: the server goes on after it."""

    def take(self, event: dict[str, Any]) -> None:
        """Count an event of the file."""
        self.count += 1
        self.cursor = max(self.cursor, int(event["time_us"]))

    def is_wanted(self, event: Any) -> bool:
        """Return whether an event writes a text that was asked for, and was not read before; move the cursor to it."""
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
    """The file took no event: the disk is full, for example."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def collect(output: Path, most: int, *, take: Take, endpoint: str) -> None:
    """Add events to the file ``output`` until it holds ``most`` posts or profiles.

    Raises:
        UserError: a value or a file that cannot be used, or a server that refuses or does not answer.
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
    """Return whether ``address`` can be one of Jetstream: without a user, and without a query."""
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:  # brackets that are not of an address, or a port that is none
        return False
    return parts.scheme in ("ws", "wss") and bool(parts.hostname) and not parts.query and "@" not in parts.netloc


def read(collection: Collection, events: Events, most: int, endpoint: str) -> None:
    """Read the stream until ``most`` events are there; a connection that breaks is made anew.

    Raises:
        UserError: the server refuses, or sends nothing new for ``PATIENCE_S``.
        OSError: the file takes no more.
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
    """Read one connection until ``most`` events are there, or it breaks.

    Raises:
        NotKeptError: the file takes no more.
        OSError, websockets.exceptions.WebSocketException: the connection broke.
    """
    asked = {"wantedCollections": events.wanted} | ({"cursor": events.cursor} if events.cursor else {})
    with connect(f"{endpoint}?{urlencode(asked)}", close_timeout=CLOSING_S) as socket:
        while events.count < most:
            try:
                event = parse_json(socket.recv(timeout=SILENCE_S))
            except ValueError:
                continue  # no event that anybody could read
            if not events.is_wanted(event):
                continue
            try:
                collection.add(event)
            except OSError as error:  # of the file, not of the connection
                raise NotKeptError(error) from error
            events.take(event)
            if events.count % SHOWN == 0:
                print(f"{events.count:,} of {most:,}", flush=True)
