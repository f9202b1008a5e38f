"""Commands of raytrain that note each write to their storage and each call by which they change MLflow, and die at one.

    python -m tests.faults.sweep_driver

reads a ``Drive`` as one line of JSON from its input, runs it and prints its status, again and again. The commands are
forks of this process: it has imported what they need, which takes longer than the rest of a short search.

A line is appended to a file for each point that is reached. At the fatal point, counted from 1, the process is killed
before it does what the line says; at 0 never. A file is written in two points: before there is a part of it, and
when all of it is there, but not under its name.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient

from raytrain.search import finish, runner
from raytrain.storage import local
from raytrain.utils import files

TIMEOUT_S = 300.0
HUNG = 124
"""Status of a command that has not ended in time, as that of ``timeout``."""
IMPORTED = (finish, runner)
STORAGE = ("write", "create", "upload", "delete", "delete_prefix")
MLFLOW = (
    "create_experiment",
    "create_logged_model",
    "create_model_version",
    "create_registered_model",
    "create_run",
    "delete_logged_model",
    "delete_model_version_tag",
    "delete_registered_model_alias",
    "delete_tag",
    "finalize_logged_model",
    "log_artifact",
    "log_batch",
    "log_inputs",
    "log_model_artifacts",
    "log_outputs",
    "log_text",
    "set_experiment_tag",
    "set_model_version_tag",
    "set_registered_model_alias",
    "set_registered_model_tag",
    "set_terminated",
    "update_run",
)
"""Every method of MLflow's client by which raytrain changes something, except metrics, which workers send."""


@dataclass(frozen=True)
class Drive:
    """A command to run: ``arguments`` of ``python -m module`` in a folder, and the point at which it dies."""

    module: str
    arguments: list[str]
    folder: str
    variables: dict[str, str]
    points: str
    fatal: int
    output: str


class Points:
    """Counts the points that this process reaches, and ends it at one."""

    def __init__(self, file: str, fatal: int) -> None:
        self._file = file
        self._fatal = fatal
        self._count = 0
        self._lock = threading.Lock()

    def reach(self, what: str) -> None:
        with self._lock:
            self._count += 1
            with open(self._file, "a") as file:
                file.write(f"{what}\n")
            if self._count == self._fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Reach a point before each call of a function."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def counted(*arguments: Any, **named: Any) -> Any:
            self.reach(" ".join([label, *(str(value)[-60:] for value in arguments[:2] if isinstance(value, str))]))
            return function(*arguments, **named)

        setattr(owner, name, counted)


def watch_all(points: Points) -> None:
    for name in STORAGE:
        points.watch(local.FolderStorage, name, f"storage {name}")
    for module in (local, files):
        points.watch(module, "sync", "storage, the file is there under another name")
    for name in MLFLOW:
        points.watch(MlflowClient, name, f"mlflow {name}")


def become(drive: Drive) -> None:
    """Turn this process into the command that ``drive`` describes."""
    output = os.open(drive.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(drive.folder)
    os.environ.update(drive.variables)
    sys.argv[1:] = drive.arguments
    watch_all(Points(drive.points, drive.fatal))
    runpy.run_module(drive.module, run_name="__main__", alter_sys=True)


def wait(process: int) -> int:
    """Return the status of a fork that has ended, or ``HUNG`` of one that had to be killed."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return HUNG


def main() -> None:
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            become(Drive(**json.loads(line)))
            return
        print(wait(process), flush=True)


if __name__ == "__main__":
    main()
