"""Files of one machine: locks between its processes, paths with ``~``, and files that appear complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from raytrain.utils.errors import UserError

PARTIAL = ".partial-"
"""Start of the name that a file has until it is complete; listings leave such names out."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock at ``path``, a file that is made if need be and stays; the system frees it if the holder dies.

    Raises:
        BlockingIOError: without ``wait``, another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def expanded(path: str) -> Path:
    """Return ``path`` with the home folder in place of ``~``.

    Raises:
        UserError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):
        raise UserError(f"{path}: there is no such home folder") from None


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of ``path``; at the end it replaces ``path`` and is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(PARTIAL + secrets.token_hex(8))
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when the file or folder at ``path`` is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
