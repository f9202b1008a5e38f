"""An MLflow server for a cluster, whose database outlives the machine that it runs on.

It listens on one private address, for the workers, and on 127.0.0.1, to which ssh forwards a browser. Artifacts go to
the storage. The database is a sqlite file with a copy in the storage, unless ``MLFLOW_BACKEND_STORE_URI`` names another
database.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

from raytrain.storage import ARTIFACTS
from raytrain.storage.base import NotFoundError, Storage, StorageError
from raytrain.utils.errors import UserError
from raytrain.utils.files import locked

STOP_S = 10.0
"""Seconds that the server has to shut down before it is killed."""
_log = logging.getLogger("raytrain.tracking")


def serve(host: str, port: int, folder: Path, storage: Storage, interval_s: float) -> None:
    """Run the server until SIGTERM; copy its database every ``interval_s`` seconds, and at the end.

    Raises:
        UserError: the address is reachable from everywhere, the folder cannot be created, the copy is damaged, or the
            storage does not answer.
        SystemExit: the server ended by itself; status 1.
    """
    check_host(host)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder {folder} cannot be made: {error.strerror}") from None
    try:
        with locked(folder / "lock", wait=False):
            _serve(host, port, folder, storage, interval_s)
    except BlockingIOError:
        _log.info("a server is running in %s already", folder)


def check_host(host: str) -> None:
    """Make sure that ``host`` is one private address.

    Raises:
        UserError: it is not.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise UserError(f"--host {host}: give the machine's private address, in digits") from None
    if address.is_unspecified or not address.is_private:
        raise UserError(f"--host {host}: MLflow asks no one for a password, so give a private address of this machine")


def _serve(host: str, port: int, folder: Path, storage: Storage, interval_s: float) -> None:
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    copy = None if "MLFLOW_BACKEND_STORE_URI" in os.environ else DatabaseCopy(folder / "mlflow.db", storage)
    try:
        if copy is not None and copy.fetch():
            _log.info("the database is the one that %s had", storage.uri())
    except StorageError as error:
        raise UserError(f"whether there is a database already cannot be found out: {error}") from None
    if host != "127.0.0.1":
        threading.Thread(target=lambda: asyncio.run(relay(host, port)), daemon=True).start()
    server = subprocess.Popen(command(host, port, storage), env=environment(folder), start_new_session=True)
    try:
        due = time.monotonic() + interval_s
        while not stopped.wait(1.0) and server.poll() is None:
            if copy is not None and time.monotonic() >= due:
                _save(copy)
                due = time.monotonic() + interval_s
    finally:
        ended = server.poll()
        _end(server)
        if copy is not None:
            _save(copy)
    if ended is not None:
        _log.error("mlflow server has ended with status %d", ended)
        raise SystemExit(1)


def command(host: str, port: int, storage: Storage) -> list[str]:
    """Return the command line of the server, without anything that may hold a password."""
    # ssh may forward from another port
    names = ",".join(f"{name}{end}" for name in dict.fromkeys((host, "localhost", "127.0.0.1")) for end in ("", ":*"))
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"),
        *("--artifacts-destination", storage.uri(ARTIFACTS), "--allowed-hosts", names),
    ]


def environment(folder: Path) -> dict[str, str]:
    """Return the server's environment variables: docs/guides/mlflow.md explains them."""
    settings = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder.resolve() / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "40",
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "40",
    }
    own = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return {**settings, **own}


def _save(copy: DatabaseCopy) -> None:
    try:
        copy.save()
    except StorageError as error:
        _log.warning("the database is not copied: %s", " ".join(str(error).split()))


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_S)


async def relay(host: str, port: int) -> None:
    """Relay connections to 127.0.0.1 to ``host``, same port: ssh forwards to localhost."""

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        except ConnectionError as error:
            _log.debug("a browser has gone: %s", error)
        finally:
            target.close()

    async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection(host, port)
        except OSError:  # the server is still starting
            writer.close()
            return
        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

    server = await asyncio.start_server(lead, "127.0.0.1", port)
    await server.serve_forever()


COPY = "mlflow.db"
"""Key of the copy in the storage."""


class DatabaseCopy:
    """Keeps a copy of ``file`` in ``storage``. Only one machine at a time may do so for a storage."""

    def __init__(self, file: Path, storage: Storage) -> None:
        self._file = file
        self._storage = storage
        self._watching: sqlite3.Connection | None = None
        self._copied: int | None = None

    def fetch(self) -> bool:
        """Put the copy in place if there is no ``file`` yet; return whether it did.

        Raises:
            UserError: the copy is not an intact database.
            raytrain.storage.StorageError: the storage does not answer. The server must not start then: an empty
                database would be copied over the good one.
        """
        if self._file.exists():
            return False
        fetched = self._file.with_name(f"{self._file.name}.fetched")
        try:
            self._storage.download(COPY, fetched)
        except NotFoundError:
            return False
        if not is_whole(fetched):
            fetched.unlink()
            raise UserError(
                f"{self._storage.uri(COPY)} is no whole sqlite database: restore an older version of it, or remove it "
                "to begin with an empty one"
            )
        fetched.rename(self._file)
        return True

    def save(self) -> bool:
        """Copy the database if it has changed since the last copy; return whether it had.

        Raises:
            UserError: the database is damaged.
            raytrain.storage.StorageError: the storage did not accept it; the next call tries again.
        """
        if not self._file.exists():
            return False
        if self._watching is None:
            # one connection, kept open: only then does the number reveal what other connections have written
            self._watching = sqlite3.connect(self._file)
        version = int(self._watching.execute("PRAGMA data_version").fetchone()[0])
        if version == self._copied:
            return False
        with tempfile.TemporaryDirectory(dir=self._file.parent) as folder:
            snapshot = Path(folder) / "snapshot.db"
            # in one step: a copy made in pieces would start again with every write
            with contextlib.closing(sqlite3.connect(snapshot)) as target:
                self._watching.backup(target)
            if not is_whole(snapshot):
                raise UserError(f"{self._file} is damaged: its copy at {self._storage.uri(COPY)} is left as it was")
            self._storage.upload(COPY, snapshot)
        self._copied = version
        return True


def is_whole(file: Path) -> bool:
    """Return whether ``file`` is a sqlite database in which sqlite finds no error."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return bool(connection.execute("PRAGMA quick_check").fetchone()[0] == "ok")
    except sqlite3.DatabaseError:
        return False
