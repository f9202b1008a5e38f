"""User errors: mistakes made by the user, and how a command ends with one."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from raytrain.utils.output import OutputLost, guarded_streams


class UserError(Exception):
    """A mistake made by the user: one line that says what is wrong, where, and how to fix it.

    Commands print the line to standard error and exit with status 2; there is never a traceback.
    """


def check_text(text: str, what: str) -> None:
    """Make sure that ``text`` can be written and used as a name: it must be valid UTF-8 without null characters.

    Raises:
        UserError: it cannot; the message calls it ``what``.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not valid UTF-8: {ascii(text)[:100]}") from None
    if "\0" in text:
        raise UserError(f"{what} has a null character in it: {ascii(text)[:100]}")


def run_command(main: Callable[[], None]) -> None:
    """Run the body of a command and end it cleanly, be it by a mistake, a signal or a closed pipe.

    A ``UserError`` becomes one line and exit status 2. SIGTERM and SIGHUP unwind the command like Ctrl-C, so that
    nothing half-written is left. A reader that closes the pipe (``| head``) ends the command quietly.

    Raises:
        SystemExit: with the command's status, unless it ends by itself.
    """
    status: Any = None
    with guarded_streams() as outputs:
        try:
            with _ended_by_signals():
                _check_arguments()
                main()
        except OutputLost:
            pass  # reported below
        except UserError as error:
            _say(f"error: {' '.join(str(error).split())}")
            status = 2
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _say(f"error: the disk is full: {error.filename or ''}".rstrip(": "))
            status = 2
        except KeyboardInterrupt:
            if not any(output.lost for output in outputs):
                _say("interrupted")
            status = 130
        except SystemExit as ended:
            status = ended.code
        for output in outputs:
            with contextlib.suppress(OutputLost):
                output.flush()
        lost = next((output.lost for output in outputs if output.lost is not None), None)
        if lost is not None and lost.reason:
            _say(f"error: the output cannot be written: {lost.reason}")
            status = 2
        elif lost is not None:
            status = lost.code
    if status is not None:
        raise SystemExit(status)


def _say(line: str) -> None:
    """Print a line to standard error, if it is open."""
    if sys.stderr is not None:  # None if the command was started with the stream closed
        with contextlib.suppress(OutputLost):
            print(line, file=sys.stderr, flush=True)


def _check_arguments() -> None:
    for argument in sys.argv[1:]:
        if argument.isascii():
            continue
        if (encoding := sys.getfilesystemencoding()) != "utf-8":
            raise UserError(f"the locale reads names as {encoding}, not as UTF-8: set PYTHONUTF8=1 or LC_ALL=C.UTF-8")
        check_text(argument, "an argument")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn signals that would end the process at once into ``SystemExit`` inside the block, unless they are handled."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # SIGHUP stays ignored under nohup; a thread cannot set signal handlers
    changed = []
    with contextlib.suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
                changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)
