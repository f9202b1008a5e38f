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
"""Start of the name that a file has until it is complete; listings leave such names out."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock at ``path``, a file that is made if need be and stays; the system frees it if the holder dies.

    Raises:
        BlockingIOError: without ``wait``, another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # neither through a link that somebody else has put there, nor cut short where it is a file with something in it
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def private_folder() -> Path:
    """Return this user's own folder among the temporary files, where no one else can hold or redirect a name.

    Raises:
        UserError: what is there is somebody else's, or others may write to it.
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
    """Return ``path`` with the home folder in place of ``~``.

    Raises:
        UserError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):
        raise UserError(f"{path}: there is no such home folder; write the path out, or set HOME") from None


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/|s3:|s3//", re.IGNORECASE)
"""Start of an address; of one that has lost a slash, a colon or a bucket, too."""
_VARIABLE = re.compile(r"(?:^|/)\$[A-Za-z_{(]")


def is_address(text: str) -> bool:
    """Return whether ``text`` is or was meant to be an address such as s3://bucket/prefix, not a path."""
    return _ADDRESS.match(text) is not None


def local_path(path: str | Path, what: str) -> Path:
    """Return the file or folder of this machine that ``path`` names, with the home folder in place of ``~``.

    For what will be made if it is not there: a slip must not become a folder of that name.

    Raises:
        UserError: an address, or what a shell would have taken away: quotes, a variable, white space, control
            characters, or a home that there is not. The line calls it ``what``.
    """
    text = str(path)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if quoted or text != text.strip() or any(ord(character) < 32 or ord(character) == 127 for character in text):
        # not repeated, nor is an address: it may hold keys
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


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Give a temporary path for the file that a command writes to ``path``, where it appears complete or not at all.

    A device or pipe, and a file in a folder that takes no other, are written in place. A link stays a link.

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
    """Return when the file or folder at ``path`` is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
