"""Locks between the processes of one machine; the system frees one when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from raytrain.utils.errors import UserError


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock at ``path``, a file that is made if need be and stays.

    Raises:
        BlockingIOError: without ``wait``, another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


_PARTIAL = ".partial-"
"""Start of the name that a file has until it is complete; listings leave such names out."""


def expanded(path: str) -> Path:
    """``path`` with the home folder in place of ``~``.

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
