"""User errors: mistakes of the user's, and how a command ends with one."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user's: one line that names what, where and how to fix it.

    Commands print the line to standard error and exit with status 2; there is never a traceback.
    """


def check_text(text: str, what: str) -> None:
    """Make sure that ``text`` can be written and name things: bytes of a name that are not UTF-8 are no text.

    Raises:
        UserError: it cannot; the line calls it ``what``.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not valid UTF-8: {ascii(text)[:100]}") from None
    if "\0" in text:
        raise UserError(f"{what} has a null character in it: {ascii(text)[:100]}")


def run_command(main: Callable[[], None]) -> None:
    """Run the body of a command, turning a ``UserError`` into one line and exit status 2."""
    try:
        for argument in sys.argv[1:]:
            if not argument.isascii():
                check_text(argument, "an argument")
        main()
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
