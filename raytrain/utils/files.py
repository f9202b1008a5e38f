"""Files of one machine: locks between its processes, paths with ``~``, and files that appear complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raytrain.utils.errors import UserError

PARTIAL = ".partial-"
"""Prefix of a file's name until the file is complete; listings leave such names out."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file at ``path``, which is created if needed and kept; the system frees it if the holder dies.

    Raises:
        BlockingIOError: without ``wait``, another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # do not follow a link that somebody else has put there, and do not truncate an existing file
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def private_folder() -> Path:
    """Return this user's own folder among the temporary files, in which nobody else can claim or redirect a name.

    Raises:
        UserError: the folder belongs to somebody else, or others may write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"raytrain-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(
            f"{folder} is not a folder that only this user may write to: remove it, or set TMPDIR to one of your own"
        )
    return folder


def expanded(path: str | Path) -> Path:
    """Return ``path`` with ``~`` replaced by the home folder.

    Raises:
        UserError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):
        raise UserError(f"{path}: there is no such home folder; write the path out, or set HOME") from None


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/|s3:|s3//", re.IGNORECASE)
"""Start of an address, also of one that lacks a slash, a colon or a bucket."""
_VARIABLE = re.compile(r"(?:^|/)\$[A-Za-z_{(]")


def is_address(text: str) -> bool:
    """Return whether ``text`` is, or was meant to be, an address such as s3://bucket/prefix rather than a path."""
    return _ADDRESS.match(text) is not None


def local_path(path: str | Path, what: str) -> Path:
    """Return the local file or folder that ``path`` names, with ``~`` replaced by the home folder.

    Use it for paths that are created if they do not exist: a typing error must not become a folder of that name.

    Raises:
        UserError: it is an address; or it has something that a shell should have removed: quotes, a variable, white
            space or control characters; or there is no such home folder. The message calls it ``what``.
    """
    text = str(path)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if quoted or text != text.strip() or any(ord(character) < 32 or ord(character) == 127 for character in text):
        # the message repeats neither this nor an address, as these may hold keys
        raise UserError(f"{what}: there are quotes or white space around it, or a control character in it: remove them")
    if is_address(text):
        raise UserError(
            f"{what}: this is an address, not a file or folder of this machine; write ./ before such a name"
        )
    if _VARIABLE.search(text) and not os.path.lexists(text):
        raise UserError(f"{what}: {text} holds a variable that no shell has replaced; write the path out")
    return expanded(path)


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; at the end it replaces ``path`` and is synced to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(PARTIAL + secrets.token_hex(8))
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a command's output file ``path``, which then appears complete or not at all.

    A device, a pipe, or a file in a folder that cannot be written to, is written in place. A link stays a link.

    Raises:
        UserError: it cannot be written.
    """
    try:
        target = path.resolve()
        in_place = target.exists() and not (target.is_file() and os.access(target.parent, os.W_OK))
        with contextlib.nullcontext(target) if in_place else complete_file(target) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def sync(path: Path) -> None:
    """Block until the file or folder at ``path`` is synced to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
