"""Lease of a search or run: one driver at a time drives it, and late writes by an earlier driver are fenced off.

A driver takes a search or run by creating its next lease, ``leases/00000003.json``. If several drivers do so at once,
one succeeds. The newest lease counts. Its driver writes a heartbeat into it, and every process that writes for that
driver first checks for a newer lease. A released lease is free at once, and so is the lease of a dead process of this
host. A driver on another host has ``TAKEOVER_S`` to give a heartbeat, so no clocks are compared.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raytrain.storage import open_storage
from raytrain.storage.base import NotFoundError, Storage, StorageError
from raytrain.utils.errors import UserError
from raytrain.utils.process import is_alive, started, user_name, visible_processes
from raytrain.utils.validation import parse_json, validate_object

LEASES = "leases"
"""Folder of a search's or run's leases. They are kept, as a record of who has driven it, and when."""
HEARTBEAT_S = 5.0
"""Seconds between two heartbeats."""
TAKEOVER_S = 30.0
"""Seconds without a heartbeat after which the driver on another host counts as gone."""
SETTLE_S = 1.0
"""Seconds after which a lease in a remote store is read back. Several drivers may have created it if the store ignores
conditional writes; only the last of them is the holder."""
_KEY = re.compile(LEASES + r"/(\d{8})\.json")
_log = logging.getLogger(__name__)


class LeaseHeldError(UserError):
    """Somebody else drives the search or run; the message says who, and since when."""


class LeaseLostError(UserError):
    """Another driver has taken the search or run over; this one must write nothing more."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A driver, as its lease describes it."""

    token: str
    """Drawn for this lease: distinguishes it from a lease that another driver created under the same number."""
    host: str
    user: str
    pid: int
    machine: str
    """Boot and process namespace: equal to the reader's if the reader can look this process up."""
    started: str
    """Start of the process: distinguishes it from a later process with the same number."""
    since: float
    """Unix time at which the driver took the lease."""
    heartbeat: float
    """Unix time of its last heartbeat, by its own clock."""
    released: bool = False

    @classmethod
    def here(cls) -> Holder:
        """Return this process as the holder of a new lease."""
        pid, now = os.getpid(), time.time()
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            user=user_name(),
            pid=pid,
            machine=visible_processes(),
            started=started(pid),
            since=now,
            heartbeat=now,
        )

    def __str__(self) -> str:
        return (
            f"user {self.user} on host {self.host} (process {self.pid}) since {_time(self.since)}, "
            f"last heartbeat {_time(self.heartbeat)}"
        )

    @property
    def is_local(self) -> bool:
        """Return whether this process can look the holder's process up."""
        # a machine that was cloned while running has the same boot id
        return (self.host, self.machine) == (socket.gethostname(), visible_processes())

    @property
    def has_ended(self) -> bool:
        """Return whether the lease was released, or belongs to a process of this host that is gone."""
        return self.released or (self.is_local and not is_alive(self.pid, self.started))


@dataclass(frozen=True)
class Fence:
    """The lease under which a process writes, in any process of the driver or its workers."""

    location: Storage
    """Storage of the search or run."""
    number: int
    """Number of the lease."""

    @classmethod
    def at(cls, address: dict[str, Any]) -> Fence:
        """Return the fence that ``address`` describes."""
        return cls(open_storage(address["location"]), address["number"])

    def address(self) -> dict[str, Any]:
        """Return it as plain values, which can be sent to workers on any node."""
        return {"location": self.location.uri(), "number": self.number}

    def check(self) -> None:
        """Make sure that no newer driver has taken the search or run over.

        Raises:
            LeaseLostError: one has.
            StorageError: the store does not answer.
        """
        if self.location.exists(_key(self.number + 1)):
            raise LeaseLostError(_lost(self.location, self.number + 1))

    def guard(self, storage: Storage) -> Storage:
        """Return a view of ``storage`` that refuses changes once a newer driver has taken over."""
        return FencedStorage(storage, self)


class FencedStorage(Storage):
    """A storage that checks the fence before each change.

    A store cannot make a change conditional on another object's key, so the check and the change are two requests. A
    change that is in flight at the moment of the takeover still arrives.
    """

    def __init__(self, storage: Storage, fence: Fence) -> None:
        self._storage = storage
        self._fence = fence

    def __reduce__(self) -> tuple[Any, ...]:
        return FencedStorage, (self._storage, self._fence)

    def write(self, key: str, data: bytes) -> None:
        self._fence.check()
        self._storage.write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self._fence.check()
        return self._storage.create(key, data)

    def upload(self, key: str, file: Path) -> None:
        self._fence.check()
        self._storage.upload(key, file)

    def read(self, key: str) -> bytes:
        return self._storage.read(key)

    def read_range(self, key: str, start: int, size: int) -> bytes:
        return self._storage.read_range(key, start, size)

    def download(self, key: str, file: Path) -> None:
        self._storage.download(key, file)

    def exists(self, key: str) -> bool:
        return self._storage.exists(key)

    def list(self, prefix: str = "") -> list[str]:
        return self._storage.list(prefix)

    def delete(self, key: str) -> None:
        self._fence.check()
        self._storage.delete(key)

    def delete_prefix(self, prefix: str) -> None:
        self._fence.check()
        self._storage.delete_prefix(prefix)

    def uri(self, key: str = "") -> str:
        return self._storage.uri(key)

    def child(self, prefix: str) -> Storage:
        return FencedStorage(self._storage.child(prefix), self._fence)

    @property
    def folder(self) -> Path | None:
        return self._storage.folder

    def without_retries(self) -> Storage:
        return FencedStorage(self._storage.without_retries(), self._fence)


class Lease:
    """A lease that this process holds, with a thread that writes its heartbeat."""

    def __init__(self, location: Storage, number: int, holder: Holder) -> None:
        self.fence = Fence(location, number)
        self.lost = False
        """Whether the heartbeat has found that another driver has taken over."""
        self._holder = holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_ended, name="lease", daemon=True)

    def start(self) -> None:
        """Start the heartbeat."""
        self._thread.start()

    def check(self) -> None:
        """Make sure that the last heartbeat found this process to be the driver, without contacting the store.

        Raises:
            LeaseLostError: it found that another driver has taken over.
        """
        if self.lost:
            raise LeaseLostError(_lost(self.fence.location, self.fence.number + 1))

    def confirm(self) -> None:
        """Make sure that this process is the driver, before it reports how something ended.

        If the store does not answer, the process counts as the driver: its writes are fenced in any case.

        Raises:
            LeaseLostError: another driver has taken over.
        """
        try:
            self.fence.check()
        except LeaseLostError:
            self.lost = True
            raise
        except StorageError as error:
            _log.info("whether this is still the driver is not known: %s", error)
        self.check()

    def release(self) -> None:
        """Stop the heartbeat and free the lease for the next driver; if the lease is lost, free nothing."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(2 * HEARTBEAT_S)
        # a heartbeat that still hangs could undo the release
        if self.lost or self._thread.is_alive():
            return
        try:
            self._write(released=True)
        except StorageError as error:
            _log.warning("the lease could not be released, and is free once this process is gone: %s", error)

    def _beat_until_ended(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                self.fence.check()
                if read_holder(self.fence.location, self.fence.number).token != self._holder.token:
                    self.lost = True
                else:
                    self._write()
            except (UserError, NotFoundError):  # taken over, altered or deleted
                self.lost = True
            except StorageError as error:
                _log.info("no heartbeat: %s", error)
            if self.lost:
                return

    def _write(self, released: bool = False) -> None:
        holder = dataclasses.replace(self._holder, heartbeat=time.time(), released=released)
        self.fence.location.write(_key(self.fence.number), _to_json(holder))


def find_free(location: Storage, what: str) -> int:
    """Return the number of the newest lease of a search or run if its driver has ended; 0 if it never had a lease.

    Nothing is changed. If the driver is on another host, this waits for a heartbeat. Error messages start with
    ``what``.

    Raises:
        LeaseHeldError: a driver is at work.
        StorageError: the store does not answer.
    """
    number = max((int(match[1]) for key in location.list(LEASES) if (match := _KEY.fullmatch(key))), default=0)
    if number == 0:
        return 0
    holder = read_holder(location, number)
    if holder.has_ended or (not holder.is_local and _stays_silent(location, number, holder, what)):
        return number
    raise _held(location, number, what)


def _stays_silent(location: Storage, number: int, holder: Holder, what: str) -> bool:
    """Return whether the driver on another host writes no heartbeat for ``TAKEOVER_S``, or releases its lease."""
    print(f"{what} was last driven by {holder}; waiting {TAKEOVER_S:g} s for a sign of life", flush=True)
    deadline = time.monotonic() + TAKEOVER_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, TAKEOVER_S))
        now = read_holder(location, number)
        if now != holder:
            return now.released
    return True


def take(location: Storage, number: int, what: str) -> Lease:
    """Take a search or run after the lease ``number``, which ``find_free`` returned, and start the heartbeat.

    Raises:
        LeaseHeldError: another driver was faster.
        StorageError: the store does not answer.
    """
    own = Holder.here()
    location.create(_key(number + 1), _to_json(own))
    if location.folder is None:
        time.sleep(SETTLE_S)
    # read back even if the key existed already: a client that repeats a lost request finds its own lease
    if read_holder(location, number + 1).token != own.token:
        raise _held(location, number + 1, what)
    lease = Lease(location, number + 1, own)
    lease.start()
    return lease


@contextmanager
def driving(location: Storage, number: int, what: str) -> Iterator[Lease]:
    """Hold a lease, as returned by ``take``, and release it at the end."""
    lease = take(location, number, what)
    try:
        yield lease
    finally:
        lease.release()


def read_holder(location: Storage, number: int) -> Holder:
    """Return the driver that holds, or held, a lease.

    Raises:
        UserError: the file holds something else.
        StorageError: it cannot be read.
    """
    try:
        holder = validate_object(Holder, parse_json(location.read(_key(number))))
        str(holder)  # a time may be invalid
        return holder
    except (ValueError, OverflowError, OSError) as error:
        if isinstance(error, StorageError):
            raise
        raise UserError(f"{location.uri(_key(number))} is not a lease ({error}): delete it") from None


def _held(location: Storage, number: int, what: str) -> LeaseHeldError:
    return LeaseHeldError(
        f"{what} is driven by {read_holder(location, number)}; wait for its end, or stop that process first"
    )


def _lost(location: Storage, number: int) -> str:
    try:
        holder = str(read_holder(location, number))
    except NotFoundError:
        return f"{location.uri()}: the lease of this driver was altered or deleted; it writes nothing more"
    except (StorageError, UserError):
        holder = "another driver"
    return f"{location.uri()} was taken over by {holder}; this driver writes nothing more"


def _key(number: int) -> str:
    return f"{LEASES}/{number:08d}.json"


def _to_json(holder: Holder) -> bytes:
    return json.dumps(dataclasses.asdict(holder), indent=1).encode()


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
