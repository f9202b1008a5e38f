"""Compressed files, read in place: gzip, bzip2, xz, Zstandard, and the members of a zip archive."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import lzma
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from raytrain.utils.errors import UserError

CODECS = ("gz", "bz2", "xz", "zst")
"""Endings of files that are compressed one by one."""
_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst", b"PK\x03\x04": "zip"}


class DamagedError(Exception):
    """Compressed content cannot be decompressed."""


@dataclass(frozen=True)
class Content:
    """One text file, decompressed when it is opened; each opening starts at the beginning."""

    name: str
    """Its path or address, as shown to the user; for an archive's member, preceded by the name of the archive."""
    opened: Callable[[], BinaryIO]
    """Opens the stored bytes, compressed or not."""
    codec: str | None
    """How the stored bytes are compressed; ``None`` if they are not."""
    found: bool
    """Whether it was found in a folder or archive, rather than named by the user."""
    plain: Path | None = None
    """The file itself, if it is on this machine and not compressed."""
    span: tuple[int, int] | None = None
    """Bytes [first, last) of an uncompressed file of lines: only lines that start there are read; None: all."""
    lines_before: int = 0
    """Lines before the span, for messages."""

    @property
    def kind(self) -> str:
        """The ending of its name, in lower case and without that of a codec; empty if it has none."""
        parts = self.name.rpartition("/")[2].lower().split(".")[1:]
        if parts and parts[-1] in CODECS:
            parts.pop()
        return parts[-1] if parts else ""

    def open(self) -> BinaryIO:
        """Return a stream of decompressed bytes; reading it raises ``DamagedError`` if they cannot be decompressed."""
        return cast(BinaryIO, _Reader(self.opened, self.codec))

    @contextlib.contextmanager
    def seekable(self) -> Iterator[Path]:
        """Yield the decompressed content as a file of its own, for formats that are not read sequentially."""
        if self.plain is not None:
            yield self.plain
            return
        with tempfile.TemporaryDirectory(prefix="raytrain-") as folder:
            path = Path(folder) / "content"
            with self.open() as source, open(path, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            yield path


def contents(path: Path, name: str, found: bool, readable: Callable[[str], bool]) -> Iterator[Content]:
    """Yield the contents of a file: itself, decompressed, or the members of a zip archive with ``readable`` names.

    Raises:
        UserError: an archive is damaged, locked by a password, or has no such member.
    """
    with open(path, "rb") as file:
        magic = file.read(6)
    codec = _codec(name, magic)
    if codec != "zip":
        opened = cast("Callable[[], BinaryIO]", functools.partial(open, path, "rb"))
        yield Content(name, opened, codec, found, path if codec is None else None)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted((item for item in archive.infolist() if _counts(item)), key=lambda item: item.filename)
            chosen = [item for item in members if readable(item.filename)]
            if not chosen:
                raise UserError(f"{name}: no text in this archive of {len(members)} files")
            for item in chosen:
                if item.flag_bits & 1:
                    raise UserError(f"{name}/{item.filename} is locked by a password: unpack the archive first")
                opened = cast("Callable[[], BinaryIO]", functools.partial(archive.open, item))
                yield Content(f"{name}/{item.filename}", opened, _codec(item.filename, b""), found=True)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{name} is damaged: {error}") from None


def _counts(item: zipfile.ZipInfo) -> bool:
    """Return whether a member is a file that a person put there."""
    parts = item.filename.split("/")
    return not item.is_dir() and parts[0] != "__MACOSX" and not any(part.startswith(".") for part in parts)


def _codec(name: str, magic: bytes) -> str | None:
    """Return how a file is compressed, by its name or else by its first bytes."""
    ending = name.lower().rpartition(".")[2]
    if ending in (*CODECS, "zip"):
        return ending
    return next((codec for start, codec in _MAGIC.items() if magic.startswith(start)), None)


def _unpacked(file: BinaryIO, codec: str | None) -> BinaryIO:
    if codec == "gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if codec == "bz2":
        return cast(BinaryIO, bz2.BZ2File(file))
    if codec == "xz":
        return cast(BinaryIO, lzma.LZMAFile(file))
    if codec == "zst":
        import pyarrow

        return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))
    return file


class _Reader:
    """A file that raises the same error whichever way its compressed content is damaged."""

    def __init__(self, opened: Callable[[], BinaryIO], codec: str | None) -> None:
        self._stored: BinaryIO = self._checked(opened)
        self._file: BinaryIO = self._checked(lambda: _unpacked(self._stored, codec))

    def read(self, size: int = -1) -> bytes:
        return cast(bytes, self._checked(lambda: self._file.read(size)))

    def seek(self, position: int) -> None:
        """Go to a byte of an uncompressed file."""
        self._file.seek(position)

    def close(self) -> None:
        self._file.close()
        self._stored.close()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _checked(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
            raise DamagedError(str(error)) from None
        except OSError as error:
            if error.errno is not None:
                raise  # an error of the disk
            raise DamagedError(str(error).strip()) from None
