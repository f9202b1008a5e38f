"""A storage that is a folder of this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytrain.storage.base import NotFoundError, Storage, StorageError, checked_key
from raytrain.utils.files import PARTIAL, complete_file, sync

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Error codes of file systems without hard links."""


class FolderStorage(Storage):
    """A folder of this machine, or a folder shared by all machines."""

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.abspath(root))

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderStorage, (self._root,)

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._errors("write", path), complete_file(path) as partial:
            partial.write_bytes(data)

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with self._errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(PARTIAL + secrets.token_hex(8))
            try:
                partial.write_bytes(data)
                sync(partial)
                _link(partial, path)
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

    def read_range(self, key: str, start: int, size: int) -> bytes:
        path = self._path(key)
        with self._errors("read", path), open(path, "rb") as stream:
            stream.seek(start)
            return stream.read(size)

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
                found = (Path(folder, name) for name in names if not name.startswith(PARTIAL))
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


def _link(partial: Path, path: Path) -> None:
    """Give a complete file the name ``path``, which must be free.

    Raises:
        FileExistsError: it is taken.
    """
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # on such file systems, the file gets its name before its content
        with open(path, "xb") as file:
            file.write(partial.read_bytes())


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
