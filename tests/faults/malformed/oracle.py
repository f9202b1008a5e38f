"""What may come of an input: a line for each mistake and status 2, or a correct result; in 5 seconds of its own, and no
file is altered."""

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

from raytrain.utils.errors import run_command

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
    if not wrong and code == 2 and not all(line.startswith("error: ") for line in said.splitlines() or [""]):
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
    """End what takes more than ``LIMIT_S``."""
    watch, began = Stopwatch(), time.monotonic()

    def look(*_: object) -> None:
        left = LIMIT_S - watch.seconds()
        if left < 0:
            raise TooSlow
        # not soon: where there is little time to be had, looking would take all of it
        signal.setitimer(signal.ITIMER_REAL, max(1.0, left))

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
        if time.monotonic() - began > LIMIT_S:
            look()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Stopwatch:
    """How long a process has been at something: on processors, or waiting for anything but a processor.

    The first grows in what has no end, the second in what is blocked; while others have the processors, neither does.
    """

    def __init__(self, process: int | str = "self") -> None:
        self._folder = Path("/proc", str(process))
        self._waited: dict[str, float] = {}
        self._began = (0.0, 0.0)
        self._began = self._now()

    def seconds(self) -> float:
        """The longer of the two. Look now and then: what a thread has waited that ended since is not known."""
        return max(now - before for now, before in zip(self._now(), self._began, strict=True))

    def _now(self) -> tuple[float, float]:
        """Seconds on processors, and of the clock without those for which threads were ready and were not let."""
        used = 0.0
        with contextlib.suppress(OSError):  # it has ended
            fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
            used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for file in self._folder.glob("task/*/schedstat"):
            with contextlib.suppress(OSError):
                self._waited[file.parent.name] = int(file.read_text().split()[1]) / 1e9
        return used, time.monotonic() - sum(self._waited.values())


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
    """Commands stop where they would join or start a cluster, measure or serve: the one thing that is patched."""
    from raytrain.analysis import measure as evaluation
    from raytrain.bench import measure
    from raytrain.cluster import connection
    from raytrain.search import setup
    from raytrain.tracking import server as serve
    from raytrain.training import launch

    joining = [(module, "connect") for module in (connection, launch, setup, evaluation)]
    work = (*joining, (measure, "measure"), (serve, "_serve"))
    with contextlib.ExitStack() as patches:
        for module, name in work:
            patches.enter_context(mock.patch.object(module, name, get_as_far))
        yield


def get_as_far(*_: object) -> None:
    """Stands for what takes resources."""
    raise GotAsFarAsResources


def command(main: Callable[[], None], *arguments: str) -> Callable[[], None]:
    """What runs the main function of a command with these arguments."""

    def act() -> None:
        with mock.patch.object(sys, "argv", ["command", *arguments]):
            main()

    return act
