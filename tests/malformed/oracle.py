"""What may come of an input: one line and status 2, or a correct result; in 5 seconds, and no file is altered."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

from raytrain.errors import run_command

LIMIT_S = 5.0

Result = Literal["clean", "correct", "slow", "failure"]


@dataclass(frozen=True)
class Verdict:
    """What came of one input."""

    result: Result
    detail: str
    """The line of a clean error; of a failure, what was wrong."""


class GotAsFarAsResources(BaseException):
    """A command has accepted everything: it would take the resources of a cluster now."""


class TooSlow(BaseException):
    """The time of an input was up."""


@dataclass(frozen=True)
class Case:
    """One malformed input."""

    folder: Path
    """``in`` in it is what must not change; ``work`` is the working directory, where a command may write."""
    act: Callable[[], None]
    """Reads the input. An ``AssertionError`` says that the result is not the right one."""


def judge(case: Case) -> Verdict:
    """Do what the case asks, in its working directory."""
    given = sums(case.folder / "in")
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")
    stderr = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign, assignment]
    home = Path.cwd()
    wrong = ""
    code: object = None
    os.chdir(case.folder / "work")
    logging.getLogger().addHandler(handler)
    try:
        with redirected(stdout, stderr), limited():
            run_command(case.act)
    except SystemExit as ended:
        code = ended.code
    except GotAsFarAsResources:
        pass
    except TooSlow:
        return Verdict("slow", f"more than {LIMIT_S:g} s")
    except BaseException:
        wrong = traceback.format_exc()
    finally:
        logging.getLogger().removeHandler(handler)
        os.chdir(home)
    stdout.flush()
    stderr.flush()
    said = stderr.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]
    if not wrong and sums(case.folder / "in") != given:
        wrong = "a file that was given has changed, or there is a new one beside it"
    if not wrong and any(record.exc_info for record in logged):
        wrong = "a traceback was logged"
    if not wrong and code in (None, 0) and said.strip():
        wrong = f"it succeeded and said: {said!r}"
    if not wrong and code not in (None, 0, 2):
        wrong = f"exit status {code}"
    if not wrong and code == 2 and not (said.startswith("error: ") and len(said.splitlines()) == 1):
        wrong = f"not one line: {said!r}"
    if wrong:
        return Verdict("failure", wrong)
    return Verdict("clean", said.strip()) if code == 2 else Verdict("correct", "")


@contextlib.contextmanager
def redirected(stdout: io.TextIOWrapper, stderr: io.TextIOWrapper) -> Iterator[None]:
    """As a terminal has them: what cannot be written to the first is an error, the second escapes it."""
    with mock.patch.object(sys, "stdout", stdout), mock.patch.object(sys, "stderr", stderr):
        yield


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """End what takes more than ``LIMIT_S``, the time left out for which others had the processor."""
    began, waited = time.monotonic(), _waited_s()

    def stop(*_: object) -> None:
        left = LIMIT_S - (time.monotonic() - began) + (_waited_s() - waited)
        if left <= 0:
            raise TooSlow
        signal.setitimer(signal.ITIMER_REAL, max(0.05, left))

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _waited_s() -> float:
    """Seconds for which this thread was ready to run and was not let."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def sums(folder: Path) -> dict[bytes, str]:
    """The SHA-256 sum of every file below a folder, links as where they lead; by path."""
    found: dict[bytes, str] = {}
    for parent, folders, names in os.walk(os.fsencode(folder)):
        for name in (*folders, *names):
            path = os.path.join(parent, name)
            if os.path.islink(path):
                found[path] = f"link {os.fsdecode(os.readlink(path))!r}"
            elif os.path.isfile(path):
                found[path] = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
            else:
                found[path] = "no file"
    return found


@contextlib.contextmanager
def no_cluster() -> Iterator[None]:
    """Commands stop where they would join or start a cluster: the one thing that is patched."""
    from raytrain import resources, train, tune

    def stop(address: str | None) -> None:
        raise GotAsFarAsResources

    with contextlib.ExitStack() as patches:
        for module in (resources, train, tune):
            patches.enter_context(mock.patch.object(module, "connect", stop))
        yield


def command(main: Callable[[], None], *arguments: str) -> Callable[[], None]:
    """What runs the main function of a command with these arguments."""

    def act() -> None:
        with mock.patch.object(sys, "argv", ["command", *arguments]):
            main()

    return act
