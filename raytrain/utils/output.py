"""Output of commands: the one place through which text passes on its way to a terminal, a file or a pipe.

Characters that the output's encoding lacks are escaped. So are control characters, since foreign texts, names and
records must not control a terminal. A reader that closes the pipe (``| head``) ends the command quietly.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
LEAST_COLUMNS, MOST_COLUMNS = 40, 1000
"""Limits on the terminal width for which tables and help are drawn, whatever width the terminal reports."""
READER_GONE = 141
"""Exit status of a command whose reader has gone, as for a program killed by SIGPIPE."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys: control characters except tab and line end, and changes of text direction."""
_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")


def visible(text: str) -> str:
    """Return ``text`` with the characters that a terminal would obey escaped."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class OutputLost(SystemExit):
    """Ends a command whose output can no longer be written."""

    def __init__(self, reason: str) -> None:
        super().__init__(READER_GONE)
        self.reason = reason
        """The reason, as text; empty if the reader has gone."""


class Output:
    """Standard output or error of a command; replaces the stream that it writes to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OutputLost | None = None
        """Set once the stream accepts no more; later output is dropped."""
        self._colours = False
        with contextlib.suppress(AttributeError, ValueError):
            cast(Any, stream).reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``, escaped."""
        parts = _COLOUR.split(text) if self._colours else [text]
        shown = "".join(part if number % 2 else visible(part) for number, part in enumerate(parts))
        self._try(lambda: self._stream.write(shown))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    @contextlib.contextmanager
    def colours(self) -> Iterator[None]:
        """Let colour codes pass unescaped inside the block, and nothing else."""
        self._colours = True
        try:
            yield
        finally:
            self._colours = False

    def write_trusted(self, text: str) -> int:
        """Write text whose untrusted parts have already been escaped."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def _try(self, action: Callable[[], object]) -> None:
        if self.lost is not None:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            reason = "" if isinstance(error, BrokenPipeError) else getattr(error, "strerror", None) or str(error)
            self.lost = OutputLost(reason)
            self._discard()
            if threading.current_thread() is not threading.main_thread():
                _interrupt_main()
                raise SystemExit from None  # a thread can end silently with this, but not with a subclass
            raise self.lost from None

    def _discard(self) -> None:
        """Discard what is still buffered, so that Python does not fail again on exit."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def _interrupt_main() -> None:
    """End the command's main thread from another thread: as Ctrl-C does, or by SIGTERM if that is ignored."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.pthread_kill(cast(int, threading.main_thread().ident), signal.SIGTERM if ignored else signal.SIGINT)


class _Trusted:
    """An output that accepts control characters; for consoles, which escape the texts themselves."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self.write = output.write_trusted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


@contextlib.contextmanager
def guarded_streams() -> Iterator[list[Output]]:
    """Replace standard output and error by ``Output`` inside the block, and draw for a feasible terminal width."""
    columns = shutil.get_terminal_size().columns
    if not LEAST_COLUMNS <= columns <= MOST_COLUMNS:
        os.environ["COLUMNS"] = str(min(max(columns, LEAST_COLUMNS), MOST_COLUMNS))
    before = sys.stdout, sys.stderr
    # None if the command was started with the stream closed
    outputs = [None if stream is None else Output(stream) for stream in before]
    sys.stdout, sys.stderr = (cast(TextIO, output) for output in outputs)
    try:
        yield [output for output in outputs if output is not None]
    finally:
        sys.stdout, sys.stderr = before


def console(stderr: bool = False, **settings: Any) -> Console:
    """Return a rich console on standard output or error; characters that a terminal would obey are escaped in texts."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    stream: Any = sys.stderr if stderr else sys.stdout
    file = _Trusted(stream) if isinstance(stream, Output) else stream
    return SafeConsole(file=cast(Any, file), stderr=stderr, **settings)


@contextlib.contextmanager
def coloured() -> Iterator[None]:
    """Let colour codes pass to standard output inside the block: for libraries that print their own."""
    stream: Any = sys.stdout
    with stream.colours() if isinstance(stream, Output) else contextlib.nullcontext():
        yield
