"""Storage: bytes under keys, in a folder or below a prefix of an S3 bucket. No other package knows which.

``python -m raytrain.storage check URI`` tries everything that is asked of a storage and prints what to set.
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
"""Environment variable: seconds that a run or search under way outlives an outage of its storage."""
DEFAULT_PATIENCE_S = 600.0
_log = logging.getLogger(__name__)
T = TypeVar("T")


class StorageError(OSError):
    """A storage did not do what it was asked; one line says what, where and why."""


class NotFoundError(StorageError):
    """There is nothing under the key."""


class Storage(ABC):
    """Bytes under keys: relative paths with ``/``, below one folder or S3 prefix.

    A key is there with all of its bytes or not at all. A ``prefix`` is a folder-like path: ``a`` covers ``a/b``, not
    ``ab``; ``""`` covers everything. Every method raises ``StorageError`` where the store fails, and ``ValueError``
    for a key that leaves the storage.
    """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put ``data`` under ``key``, replacing what was there."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Put ``data`` under ``key`` unless something is there; False, and nothing done, where there is.

        Of several callers at once, one is told True: a folder creates a link, S3 holds the request against
        ``If-None-Match``. A store that ignores that header may tell several, and one that refuses it is asked before.
        """

    @abstractmethod
    def upload(self, key: str, file: Path) -> None:
        """Put the content of ``file`` under ``key``."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Return what is under ``key``. Raises ``NotFoundError`` where nothing is."""

    @abstractmethod
    def download(self, key: str, file: Path) -> None:
        """Put what is under ``key`` into ``file``, which appears complete. Raises ``NotFoundError``."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether there is something under ``key``."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Return the keys below ``prefix``, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove what is under ``key``, if anything."""

    @abstractmethod
    def delete_prefix(self, prefix: str) -> None:
        """Remove everything below ``prefix`` (never the whole storage)."""

    @abstractmethod
    def uri(self, key: str = "") -> str:
        """Return the address of ``key``, or of the storage, as ``open_storage`` reads it."""

    @abstractmethod
    def child(self, prefix: str) -> Storage:
        """Return the storage below ``prefix``."""

    @property
    def folder(self) -> Path | None:
        """The folder that it is; ``None`` where it is in a store elsewhere."""
        return None

    def without_retries(self) -> Storage:
        """Return the same storage for a first try: a store that cannot be reached fails soon."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri()!r})"

    @abstractmethod
    def __reduce__(self) -> tuple[Any, ...]:
        """Reopens the storage where it is unpickled: neither a connection nor keys travel."""


def patience() -> float:
    """Return how long, in seconds, a run or search that is under way outlives an outage of its storage.

    Raises:
        UserError: ``RAYTRAIN_STORAGE_PATIENCE`` is no number of seconds.
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
    """Return what ``action`` returns; while the store fails, try again for about ``patience()`` seconds.

    For work that is under way; what a command begins with fails soon. ``action`` must be safe to repeat. Every failure
    but "there is no such key" counts as passing, for the reasons that ``CheckpointWriter`` gives.

    Raises:
        NotFoundError: at once.
        StorageError: the last failure, when patience ends.
    """
    return retry(
        action,
        StorageError,
        seconds=patience(),
        log=lambda error: _log.warning("the storage fails, trying again: %s", error),
        transient=lambda error: not isinstance(error, NotFoundError),
    )


def checked_key(key: str) -> str:
    """``key`` itself, if it stays below the storage; else a ``ValueError``."""
    if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        raise ValueError(f"{key!r} is not a path below a storage")
    return key
