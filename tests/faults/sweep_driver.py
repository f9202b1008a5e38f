"""``raytrain.tune`` that notes each write to its storage and each call by which it changes MLflow, and dies at one.

    SWEEP_POINTS=points.txt SWEEP_AT=17 python -m tests.faults.sweep_driver hybrid --space space.py --name s

A line is appended to the file for each point that is reached. At the point ``SWEEP_AT``, counted from 1, the process is
killed before it does what the line says; at 0 never. A file is written in two points: before there is a part of it, and
when all of it is there, but not under its name.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from mlflow import MlflowClient

from raytrain.storage import local
from raytrain.utils import files

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


if __name__ == "__main__":
    from raytrain.tune import main
    from raytrain.utils.errors import run_command

    watch_all(Points(os.environ["SWEEP_POINTS"], int(os.environ["SWEEP_AT"])))
    run_command(main)
