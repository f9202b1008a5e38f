"""Files of collected posts: JSONL that grows line by line, records each line's origin, and can be continued."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json

ORIGIN = "collected"
"""Field of each line that records its origin and the request that returned it."""
PATIENCE_S = 300.0
"""How long a collection tolerates an outage of the network or the service."""


class Collection:
    """A file of collected objects, one per line, to which one process at a time adds.

    Lines are only ever added. If a process died while writing the last line, that part is removed when the file is
    continued, and the object is collected again.
    """

    def __init__(self, path: Path, origin: dict[str, str], seen: Callable[[dict[str, Any]], None]) -> None:
        """Set the file and the origin of its objects; ``seen`` is called with each object already in the file."""
        self.path = path
        self._origin = origin
        self._seen = seen

    def __enter__(self) -> Self:
        """Open the file and read back its content.

        Raises:
            UserError: it holds something else, cannot be written, or another process adds to it.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise UserError(f"--output {self.path}: {(error.strerror or str(error)).lower()}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read_back()
        except BlockingIOError:
            self._file.close()
            raise UserError(f"--output {self.path}: another process adds to it") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def add(self, values: dict[str, Any]) -> None:
        """Write an object as a line, which survives if the process is killed later."""
        rest = {name: value for name, value in values.items() if name != ORIGIN}
        self._file.write(json.dumps({ORIGIN: self._origin, **rest}).encode() + b"\n")
        self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _read_back(self) -> None:
        beginning = json.dumps({ORIGIN: self._origin}).encode()[:-1]
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n") and line[: len(beginning)] == beginning[: len(line)]:
                break  # a partial last line
            try:
                values = parse_json(line)
            except ValueError:
                values = None
            if not line.endswith(b"\n") or not isinstance(values, dict) or values.get(ORIGIN) != self._origin:
                raise UserError(
                    f"--output {self.path}: line {number} is not from this source and request; choose another file, or "
                    "give the options with which it was begun"
                )
            self._seen(values)
            end += len(line)
        self._file.truncate(end)
