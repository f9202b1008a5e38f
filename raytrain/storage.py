"""Where things live: a folder, or a prefix in an S3 bucket. Nothing else in the package knows which.

``python -m raytrain.storage check URI`` tries everything that is asked of a storage and prints what to set.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from raytrain.errors import UserError, run_command

_PARTIAL = ".partial-"
"""Start of the name that a file has until it is complete; listings leave such names out."""

_SETTINGS = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "MLFLOW_S3_ENDPOINT_URL",
)


PATIENCE_S = 600.0
"""How long a run or a search that is under way outlives an outage of its storage."""
LONGEST_PAUSE_S = 15.0

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

        Guards an immutable key against being overwritten. It is no lock: a store may ignore the condition.
        """

    @abstractmethod
    def upload(self, key: str, file: Path) -> None:
        """Put the content of ``file`` under ``key``."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """What is under ``key``. Raises ``NotFoundError`` where nothing is."""

    @abstractmethod
    def download(self, key: str, file: Path) -> None:
        """Put what is under ``key`` into ``file``, which appears complete. Raises ``NotFoundError``."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is something under ``key``."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """The keys below ``prefix``, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove what is under ``key``, if anything."""

    @abstractmethod
    def delete_prefix(self, prefix: str) -> None:
        """Remove everything below ``prefix`` (never the whole storage)."""

    @abstractmethod
    def uri(self, key: str = "") -> str:
        """The address of ``key``, or of the storage, as ``open_storage`` reads it."""

    @abstractmethod
    def child(self, prefix: str) -> Storage:
        """The storage below ``prefix``."""

    @property
    def folder(self) -> Path | None:
        """The folder that it is; ``None`` where it is in a store elsewhere."""
        return None

    def impatient(self) -> Storage:
        """The same place for a first try: where the store cannot be reached, that is said soon."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri()!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Reopened where it is unpickled: neither a connection nor keys travel.
        return open_storage, (self.uri(),)


class FolderStorage(Storage):
    """A folder of this machine, or one that all machines share."""

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.abspath(root))

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._errors("write", path), complete_file(path) as partial:
            partial.write_bytes(data)

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with self._errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(_PARTIAL + secrets.token_hex(8))
            try:
                partial.write_bytes(data)
                _sync(partial)
                os.link(partial, path)
            except FileExistsError:
                return False
            finally:
                partial.unlink(missing_ok=True)
        return True

    def upload(self, key: str, file: Path) -> None:
        path = self._path(key)
        with self._errors("write", path), complete_file(path) as partial:
            shutil.copyfile(file, partial)

    def read(self, key: str) -> bytes:
        path = self._path(key)
        with self._errors("read", path):
            return path.read_bytes()

    def download(self, key: str, file: Path) -> None:
        path = self._path(key)
        with self._errors("read", path), complete_file(file) as partial:
            shutil.copyfile(path, partial)

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with self._errors("read", path):
            return path.is_file()

    def list(self, prefix: str = "") -> list[str]:
        top = self._path(prefix) if prefix else self._root
        keys = []
        with self._errors("list", top):
            for folder, _, names in os.walk(top, onerror=_unless_gone):
                found = (Path(folder, name) for name in names if not name.startswith(_PARTIAL))
                keys += [path.relative_to(self._root).as_posix() for path in found]
        return sorted(keys)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._errors("delete", path):
            path.unlink(missing_ok=True)

    def delete_prefix(self, prefix: str) -> None:
        path = self._path(prefix)
        with self._errors("delete", path):
            if path.is_dir():
                shutil.rmtree(path)

    def uri(self, key: str = "") -> str:
        return str(self._path(key) if key else self._root)

    @property
    def folder(self) -> Path:
        return self._root

    def child(self, prefix: str) -> FolderStorage:
        return FolderStorage(self._path(prefix))

    def _path(self, key: str) -> Path:
        return self._root / checked_key(key)

    @contextlib.contextmanager
    def _errors(self, action: str, path: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise NotFoundError(f"cannot {action} {path}: there is no such file") from None
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.EEXIST):
                reason = "a part of the path is a file, not a folder"
            else:
                reason = (error.strerror or str(error)).lower()
            raise StorageError(f"cannot {action} {path}: {reason}") from None


def open_storage(uri: str | Path) -> Storage:
    """The storage at a folder or at ``s3://bucket/prefix``. Nothing is looked at or made yet.

    Raises:
        UserError: an address that is neither, AWS settings that cannot be read, or no boto3.
    """
    text = str(uri)
    if not text or "\0" in text:
        raise UserError("storage: give a folder or s3://bucket/prefix")
    if not re.match(r"(?i)s3:|[a-z0-9+.-]+://", text):
        return FolderStorage(expanded(text))
    match = re.fullmatch(r"(?i:s3)://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/([^?#]*))?", text)
    if match is None:
        # The address is not repeated: it may hold keys.
        raise UserError("storage: the address must be a folder or s3://bucket/prefix, without keys or options in it")
    prefix = "/".join(part for part in (match[2] or "").split("/") if part)
    try:
        from raytrain.s3 import S3Storage
    except ModuleNotFoundError:
        raise UserError("storage: s3:// addresses need boto3: pip install boto3") from None
    try:
        return S3Storage(match[1], checked_key(prefix) if prefix else "")
    except ValueError as error:
        raise UserError(f"storage {text}: {error}") from None


def patiently(action: Callable[[], T]) -> T:
    """Do ``action``, again with growing pauses while the store fails, for about ``PATIENCE_S``.

    For work that is under way; what a command begins with fails soon. ``action`` must be safe to repeat. Every reason
    but "there is no such key" counts, for what ``CheckpointWriter`` says of them.

    Raises:
        NotFoundError: at once.
        StorageError: the last one, when patience ends.
    """
    deadline, pause = time.monotonic() + PATIENCE_S, 0.5
    while True:
        try:
            return action()
        except NotFoundError:
            raise
        except StorageError as error:
            if time.monotonic() + pause > deadline:
                raise
            _log.warning("the storage fails, trying again: %s", error)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def expanded(path: str) -> Path:
    """``path`` with the home folder in place of ``~``.

    Raises:
        UserError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):
        raise UserError(f"{path}: there is no such home folder") from None


def check_output(file: Path) -> Path:
    """``file``, for which nothing is in the way of being written when hours of work are done; leaves nothing behind.

    Raises:
        UserError: it cannot be written.
    """
    try:
        existed = file.exists()
        file.open("a").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise UserError(f"--output {file} cannot be written: {error.strerror}") from None
    return file


def open_file(address: str) -> tuple[Storage, str]:
    """The storage that the file at a path or ``s3://`` address is in, and its key there.

    Raises:
        UserError: not an address of a file.
    """
    folder, slash, name = address.rpartition("/")
    if not name:
        raise UserError(f"{address!r} is no file: give a path, or s3://bucket/prefix/name")
    return open_storage(folder or slash or "."), name


def storage_environment() -> dict[str, str]:
    """Endpoint, region and checksum settings of this process, for workers on other nodes. Never a key.

    boto3 and MLflow read AWS_DEFAULT_REGION and pyarrow AWS_REGION, MLflow has an endpoint variable of its own: what
    is set under one name is given under all.
    """
    settings = {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)}
    endpoint = settings.get("AWS_ENDPOINT_URL_S3") or settings.get("AWS_ENDPOINT_URL")
    region = settings.get("AWS_REGION") or settings.get("AWS_DEFAULT_REGION")
    if endpoint:
        settings = {"AWS_ENDPOINT_URL_S3": endpoint, "MLFLOW_S3_ENDPOINT_URL": endpoint} | settings
    if region:
        settings |= {"AWS_REGION": region, "AWS_DEFAULT_REGION": region}
    for name, value in settings.items():
        if name.endswith(("ENDPOINT_URL", "ENDPOINT_URL_S3")) and "@" in urlsplit(value).netloc:
            raise UserError(f"{name}: an endpoint must not hold a user or a password; keys have variables of their own")
    return settings


def check_writable(storage: Storage) -> None:
    """Write, read back, list and delete one small object.

    Raises:
        UserError: one line with the first thing that does not work and what to do about it.
    """
    place = storage.impatient()
    folder = f".raytrain-check-{secrets.token_hex(8)}"
    key, data = f"{folder}/probe", secrets.token_bytes(64)
    try:
        place.write(key, data)
        try:
            _require(place.read(key) == data, storage, "what was written reads back as something else")
            _require(place.list(folder) == [key], storage, "what was written is not listed")
        except (StorageError, UserError):
            with contextlib.suppress(StorageError):
                place.delete_prefix(folder)
            raise
        place.delete_prefix(folder)
        _require(not place.list(folder), storage, "what was deleted is still listed")
    except StorageError as error:
        raise UserError(f"storage: {error}") from None


def _require(condition: bool, storage: Storage, what: str) -> None:
    if not condition:
        raise UserError(f"storage {storage.uri()}: {what}, and the store reports no error: use another store")


def checked_key(key: str) -> str:
    """``key`` itself, if it stays below the storage; else a ``ValueError``."""
    if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        raise ValueError(f"{key!r} is not a path below a storage")
    return key


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path``, which takes its place at the end and is on the disk then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(_PARTIAL + secrets.token_hex(8))
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


if __name__ == "__main__":
    from raytrain.storage_check import main

    run_command(main)
