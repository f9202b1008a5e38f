"""Storage: bytes under keys, in a folder or below a prefix of an S3 bucket. Other packages need not know which.

``python -m raytrain.storage check URI`` tests everything that a storage must do and prints what to set.
"""

from __future__ import annotations

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from raytrain.utils.errors import UserError
from raytrain.utils.retry import retry

PATIENCE = "RAYTRAIN_STORAGE_PATIENCE"
"""Environment variable: seconds for which a running run or search tolerates an outage of its storage."""
DEFAULT_PATIENCE_S = 600.0
_log = logging.getLogger(__name__)
T = TypeVar("T")


class StorageError(OSError):
    """A storage could not do what it was asked; the message says what, where and why, in one line."""


class NotFoundError(StorageError):
    """There is nothing under the key."""


class Storage(ABC):
    """Bytes under keys: relative paths with ``/``, below one folder or S3 prefix.

    A key holds all of its bytes or does not exist. A ``prefix`` is a folder-like path: ``a`` covers ``a/b``, not
    ``ab``; ``""`` covers everything. Every method raises ``StorageError`` if the store fails, and ``ValueError`` for a
    key that leaves the storage.
    """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Store ``data`` under ``key``, replacing any previous content."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Store ``data`` under ``key`` unless the key exists; return False, and change nothing, if it does.

        If several callers do this at once, exactly one gets True: a folder creates a link, S3 checks the request's
        ``If-None-Match``. A store that ignores that header may answer True to several. For one that refuses it, the
        existence of the key is checked first.
        """

    @abstractmethod
    def upload(self, key: str, file: Path) -> None:
        """Store the content of ``file`` under ``key``."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Return the content of ``key``. Raises ``NotFoundError`` if there is none."""

    @abstractmethod
    def read_range(self, key: str, start: int, size: int) -> bytes:
        """Return ``size`` bytes of the content of ``key`` from ``start`` on, fewer at its end.

        Raises ``NotFoundError``.
        """

    @abstractmethod
    def download(self, key: str, file: Path) -> None:
        """Copy the content of ``key`` to ``file``, which appears complete. Raises ``NotFoundError``."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether ``key`` exists."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Return the keys below ``prefix``, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove ``key``, if it exists."""

    @abstractmethod
    def delete_prefix(self, prefix: str) -> None:
        """Remove everything below ``prefix`` (never the whole storage)."""

    @abstractmethod
    def uri(self, key: str = "") -> str:
        """Return the address of ``key``, or of the storage, in the form that ``open_storage`` reads."""

    @abstractmethod
    def child(self, prefix: str) -> Storage:
        """Return the storage below ``prefix``."""

    @property
    def folder(self) -> Path | None:
        """The storage's folder; ``None`` if it is in a remote store."""
        return None

    def without_retries(self) -> Storage:
        """Return the same storage for a first attempt: it fails soon if its store cannot be reached."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri()!r})"

    @abstractmethod
    def __reduce__(self) -> tuple[Any, ...]:
        """Reopen the storage where it is unpickled: neither connections nor keys are pickled."""


def patience() -> float:
    """Return for how many seconds a running run or search tolerates an outage of its storage.

    Raises:
        UserError: ``RAYTRAIN_STORAGE_PATIENCE`` is not a number of seconds.
    """
    text = os.environ.get(PATIENCE, "")
    try:
        seconds = float(text or DEFAULT_PATIENCE_S)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{PATIENCE} is {text!r}: give a number of seconds of at least 0")
    return seconds


def retry_storage(action: Callable[[], T]) -> T:
    """Return what ``action`` returns; while the store fails, retry for about ``patience()`` seconds.

    This is for work in progress; the first requests of a command should fail soon. ``action`` must be safe to repeat.
    Every failure except "there is no such key" counts as transient, for the reasons given in ``CheckpointWriter``.

    Raises:
        NotFoundError: at once.
        StorageError: the last failure, when the time is up.
    """
    return retry(
        action,
        StorageError,
        seconds=patience(),
        log=lambda error: _log.warning("the storage fails, trying again: %s", error),
        transient=lambda error: not isinstance(error, NotFoundError),
    )


def checked_key(key: str) -> str:
    """Return ``key`` itself if it stays below the storage; otherwise raise a ``ValueError``."""
    if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        raise ValueError(f"{key!r} is not a path below a storage")
    return key
