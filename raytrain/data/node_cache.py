"""Cache of a machine: folders that its processes share, each filled once and evicted when the cache is full."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import os
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from raytrain.data.files import default_cache
from raytrain.storage.base import StorageError
from raytrain.utils.errors import UserError
from raytrain.utils.files import locked, sync

LIMIT = 50 * 2**30
"""Bytes that the cache of a machine keeps, unless ``RAYTRAIN_CACHE_BYTES`` says otherwise."""
ROOM_S = 10.0
"""Seconds to wait for other processes to stop reading what has to be evicted."""
_PARTIAL = ".partial-"
"""Prefix of a folder that does not count: one that is being filled or removed."""
_NEED = "need"
"""File beside a folder in the making: the bytes that it will take."""
T = TypeVar("T")
_log = logging.getLogger(__name__)


class NodeCache:
    """Folders by name, below one folder of this machine. The least recently used that no process holds are evicted."""

    def __init__(self, root: Path | None = None) -> None:
        """Open the cache below ``root``; ``None`` means that of ``RAYTRAIN_CACHE``.

        Raises:
            UserError: ``RAYTRAIN_CACHE_BYTES`` is not a number of bytes.
        """
        self.root = (root or default_cache()) / "fetched"
        self.limit = _limit()

    def hold(self, name: str) -> int:
        """Keep other processes from evicting the folder ``name`` until the returned descriptor is closed.

        Raises:
            OSError: the cache cannot be written.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / f"{name}.used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def open(
        self,
        name: str,
        fill: Callable[[Path], None],
        read: Callable[[Path], T],
        need: int = 0,
        is_whole: Callable[[Path], bool] = Path.is_dir,
    ) -> T:
        """Return what ``read`` makes of the folder ``name``, which is held as long as that lives: see ``folder``.

        Raises:
            UserError: the cache cannot be written.
            StorageError: what ``fill`` raises.
        """
        try:
            held = self.hold(name)
            try:
                found = read(self.folder(name, fill, need, is_whole))
            except BaseException:
                os.close(held)
                raise
        except StorageError:
            raise
        except OSError as error:
            raise UserError(f"cannot write to the cache {self.root}: {error}; set RAYTRAIN_CACHE") from None
        weakref.finalize(found, os.close, held)
        return found

    def folder(
        self, name: str, fill: Callable[[Path], None], need: int = 0, is_whole: Callable[[Path], bool] = Path.is_dir
    ) -> Path:
        """Return the folder ``name``, which the caller holds.

        If it does not exist, or is not whole, ``fill`` is called with the path of a folder to make; it appears under
        its name when it is complete. ``need`` bytes are made free before, and count as taken from then on.

        Raises:
            StorageError: what ``fill`` raises.
            OSError: the cache cannot be written.
        """
        folder = self.root / name
        with locked(self.root / f"{name}.writing"):
            if not is_whole(folder):
                for leftover in [folder, *self.root.glob(f"{_PARTIAL}{glob.escape(name)}-*")]:
                    shutil.rmtree(leftover, ignore_errors=True)  # its maker has died, or its disk
                with tempfile.TemporaryDirectory(dir=self.root, prefix=f"{_PARTIAL}{name}-") as scratch:
                    self._make_room(need, Path(scratch))
                    fill(Path(scratch) / name)
                    _sync_all(Path(scratch) / name)
                    os.replace(Path(scratch) / name, folder)
                    sync(self.root)
        os.utime(folder)
        self.evict()
        return folder

    def evict(self, need: int = 0, scratch: Path | None = None) -> int:
        """Remove folders that no process holds until ``need`` bytes fit; return how many bytes do not.

        If they fit, they count as taken by the folder that is made in ``scratch``.
        """
        with locked(self.root / "evicting"):
            for leftover in self.root.glob(f"{_PARTIAL}*"):
                name = leftover.name.removeprefix(_PARTIAL).rpartition("-")[0]
                with contextlib.suppress(BlockingIOError), locked(self.root / f"{name}.writing", wait=False):
                    shutil.rmtree(leftover, ignore_errors=True)
            folders = [path for path in self.root.glob("[!.]*") if path.is_dir()]
            # files being written have names that start with a dot, and may be gone before their size is read
            sizes = {folder: sum(file.stat().st_size for file in folder.glob("[!.]*")) for folder in folders}
            excess = sum(sizes.values()) + sum(map(_reserved, self.root.glob(f"{_PARTIAL}*"))) + need - self.limit
            for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime):
                if excess <= 0:
                    break
                with contextlib.suppress(BlockingIOError), locked(self.root / f"{folder.name}.used", wait=False):
                    doomed = self.root / f"{_PARTIAL}{folder.name}-{secrets.token_hex(4)}"
                    folder.rename(doomed)  # atomic: half a folder must not be mistaken for a whole one
                    shutil.rmtree(doomed)
                    excess -= sizes[folder]
            if excess <= 0 and scratch is not None:
                (scratch / _NEED).write_text(str(need))
        return max(0, excess)

    def _make_room(self, need: int, scratch: Path) -> None:
        """Evict until ``need`` bytes fit; wait a while for folders that other processes still hold."""
        deadline = time.monotonic() + ROOM_S
        while (excess := self.evict(need, scratch)) and need and time.monotonic() < deadline:
            time.sleep(0.1)
        if excess and need:
            _log.warning(
                "%s holds %d MB more than RAYTRAIN_CACHE_BYTES: all of it is being read", self.root, excess // 10**6
            )


def _reserved(scratch: Path) -> int:
    """Return the bytes that a folder in the making will take."""
    with contextlib.suppress(FileNotFoundError):
        return int((scratch / _NEED).read_text() or 0)
    return 0


def _sync_all(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        sync(path)


def _limit() -> int:
    text = os.environ.get("RAYTRAIN_CACHE_BYTES") or str(LIMIT)
    if not text.isdecimal():
        raise UserError(f"RAYTRAIN_CACHE_BYTES is {text!r}: must be a number of bytes")
    return int(text)
