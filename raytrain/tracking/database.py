"""The sqlite database of an MLflow server, and its copy in a storage that outlives the machine."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from pathlib import Path

from raytrain.errors import UserError
from raytrain.storage import NotFoundError, Storage

COPY = "mlflow.db"
"""Key of the copy."""


class DatabaseCopy:
    """Keeps the copy of ``file`` in ``storage``. One machine at a time may do so for a storage."""

    def __init__(self, file: Path, storage: Storage) -> None:
        self._file = file
        self._storage = storage
        self._watching: sqlite3.Connection | None = None
        self._copied: int | None = None

    def fetch(self) -> bool:
        """Where there is no ``file`` yet, put the copy there; returns whether there was one to put.

        Raises:
            UserError: the copy is no whole database.
            raytrain.storage.StorageError: the storage cannot be asked. Nothing may be served then: an empty
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
            raise UserError(
                f"{self._storage.uri(COPY)} is no whole sqlite database: restore an older version of it, or remove it "
                "to begin with an empty one"
            )
        fetched.rename(self._file)
        return True

    def save(self) -> bool:
        """Copy the database if it has changed since the last time; returns whether it had.

        Raises:
            raytrain.storage.StorageError: the storage did not take it; the next call tries again.
        """
        if not self._file.exists():
            return False
        if self._watching is None:
            # asked over one connection for ever: the number tells of what others have written
            self._watching = sqlite3.connect(self._file)
        version = int(self._watching.execute("PRAGMA data_version").fetchone()[0])
        if version == self._copied:
            return False
        with tempfile.TemporaryDirectory(dir=self._file.parent) as folder:
            snapshot = Path(folder) / "snapshot.db"
            # in one step: a copy in pieces begins again with every write
            with contextlib.closing(sqlite3.connect(snapshot)) as target:
                self._watching.backup(target)
            if not is_whole(snapshot):
                raise UserError(f"{self._file} is damaged: its copy at {self._storage.uri(COPY)} is left as it was")
            self._storage.upload(COPY, snapshot)
        self._copied = version
        return True


def is_whole(file: Path) -> bool:
    """Whether ``file`` is a sqlite database that sqlite finds nothing wrong with."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return bool(connection.execute("PRAGMA quick_check").fetchone()[0] == "ok")
    except sqlite3.DatabaseError:
        return False
