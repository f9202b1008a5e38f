"""``python -m raytrain.storage check URI``: a table of what a storage can do, and what to set if it cannot."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from raytrain.storage import open_storage
from raytrain.storage.base import Storage, StorageError
from raytrain.utils.errors import UserError
from raytrain.utils.output import console

_USAGE = "usage: python -m raytrain.storage check FOLDER|s3://BUCKET/PREFIX"
_LARGE = 9 * 2**20  # bytes; above the 8 MiB from which files are uploaded in parts
_WHEN_REQUIRED = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"


@dataclass(frozen=True)
class Finding:
    """One capability that was tested."""

    tried: str
    works: bool | None
    """None if it was not tested."""
    note: str = ""
    """What to set, or the consequence."""
    needed: bool = True
    """Whether a run needs it."""


def check(storage: Storage) -> list[Finding]:
    """Test everything, in a folder of its own below ``storage``, which is removed afterwards."""
    location = storage.without_retries().child(f".raytrain-check-{secrets.token_hex(8)}")
    small, large = secrets.token_bytes(64), secrets.token_bytes(_LARGE)

    def write() -> None:
        location.write("small/a", small)

    def read() -> None:
        _require(location.read("small/a") == small, "it reads back as something else: use another store")

    def listing() -> None:
        _require(location.list("small") == ["small/a"], "what was written is not listed: use another store")

    def parts() -> None:
        location.write("large/b", large)
        _require(location.read("large/b") == large, "it reads back as something else: use another store")

    def guard() -> None:
        _require(location.create("guard/c", small), "a new key counts as taken")
        _require(
            not location.create("guard/c", b""),
            "ignored: of two commands that take one name at once, the later has it, and the other knows a second later",
        )

    def delete() -> None:
        for folder in ("small", "large", "guard", "arrow"):
            location.delete_prefix(folder)
        _require(not location.list(), "what was deleted is still listed: old checkpoints would stay for ever")

    findings = [_try("write", write)]
    if findings[0].works:
        findings += [_try("read", read), _try("list", listing), _try("upload in parts (9 MiB)", parts)]
        findings += [_try("If-None-Match guard", guard, needed=False), _arrow(location, small), _try("delete", delete)]
    return findings


def main() -> None:
    """Run the command."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(_USAGE)
        return
    if len(arguments) != 2 or arguments[0] != "check":
        raise UserError(_USAGE)
    storage = open_storage(arguments[1])
    findings = check(storage)
    _show(storage, findings)
    for finding in findings:
        if finding.needed and finding.works is False:
            raise UserError(f"storage: {finding.tried}: {finding.note}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise StorageError(what)


def _try(name: str, action: Callable[[], None], needed: bool = True) -> Finding:
    try:
        action()
    except StorageError as error:
        return Finding(name, False, str(error), needed)
    return Finding(name, True, needed=needed)


def _arrow(location: Storage, data: bytes) -> Finding:
    """Write through pyarrow, as Ray does: by default with a trailing checksum, which older servers refuse."""
    name = "pyarrow write (checksum trailer)"
    if not location.uri().startswith("s3://"):
        return Finding(name, None, "folders have none")
    if importlib.util.find_spec("pyarrow") is None:
        return Finding(name, None, "pyarrow is not installed")
    from pyarrow.fs import FileSystem

    try:
        system, path = FileSystem.from_uri(quote(location.uri("arrow/d"), safe=":/"))
        with system.open_output_stream(path) as stream:
            stream.write(data)
        _require(location.read("arrow/d") == data, "it reads back as something else")
    except (OSError, ValueError) as error:  # pyarrow raises both kinds
        note = " ".join(str(error).split())
        if os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "").lower() != "when_required":
            note = f"{_WHEN_REQUIRED}, if this is about checksums or lengths: {note}"
        return Finding(name, False, note)
    return Finding(name, True)


def _show(storage: Storage, findings: list[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    words = {True: "[green]works[/green]", False: "[red]fails[/red]", None: "not tried"}
    table = Table(title=escape(storage.uri()), title_justify="left")
    for column in ("tried", "result", "what to set, or what follows"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.tried, words[finding.works], escape(finding.note))
    console().print(table)


def check_writable(storage: Storage) -> None:
    """Write, read back, list and delete one small object.

    Raises:
        UserError: the first operation that fails and how to fix it, in one line.
    """
    location = storage.without_retries()
    folder = f".raytrain-check-{secrets.token_hex(8)}"
    key, data = f"{folder}/probe", secrets.token_bytes(64)
    try:
        location.write(key, data)
        try:
            _check_consistent(location.read(key) == data, storage, "what was written reads back as something else")
            _check_consistent(location.list(folder) == [key], storage, "what was written is not listed")
        except (StorageError, UserError):
            with contextlib.suppress(StorageError):
                location.delete_prefix(folder)
            raise
        location.delete_prefix(folder)
        _check_consistent(not location.list(folder), storage, "what was deleted is still listed")
    except StorageError as error:
        raise UserError(f"storage: {error}") from None


def _check_consistent(condition: bool, storage: Storage, what: str) -> None:
    if not condition:
        raise UserError(f"storage {storage.uri()}: {what}, and the store reports no error: use another store")
