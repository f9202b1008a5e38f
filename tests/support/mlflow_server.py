"""A real ``mlflow server`` that tests can kill and start again, and empty sqlite stores made quickly."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_TIMEOUT_S = 60.0
"""A server starts in 4 s on a quiet machine; a loaded one takes much longer."""


class MlflowServer:
    """``mlflow server`` on 127.0.0.1 with a store and an artifact folder that outlive its process.

    The store is a sqlite file in ``folder``, or the database at ``store_uri``.
    """

    def __init__(
        self, folder: Path, store_uri: str | None = None, *, workers: int = 1, start_timeout_s: float = START_TIMEOUT_S
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.store_uri = store_uri or new_store(folder)
        self._workers = workers
        self._start_timeout_s = start_timeout_s
        self.artifacts = folder / "artifacts"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's first process, the parent of those that answer."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process, unless it runs, and wait until it answers."""
        if self._process is not None and self._process.poll() is None:
            return  # a second one on its port would end, and this one would be nobody's
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", str(self._workers), "--artifacts-destination", str(self.artifacts)]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        # A log_batch holds two connections: with fewer than two for each of its 40 threads, a burst stops the server.
        environment |= {"MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "40", "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "40"}
        environment["MLFLOW_BACKEND_STORE_URI"] = self.store_uri  # may hold a password: not on the command line
        environment.pop("MLFLOW_TRACKING_URI", None)
        with open(self.folder / "server.log", "ab") as log:
            # A group of its own, so that kill() also reaches the worker that the server starts.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True
            )
        deadline = time.monotonic() + self._start_timeout_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError("mlflow server did not start:\n" + (self.folder / "server.log").read_text()[-3000:])
            time.sleep(0.1)

    def kill(self) -> None:
        """End the processes at once, as a crash does; the data stays."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            # The worker is not our child: it may take a last request while it dies.
            while self._listens():
                time.sleep(0.01)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def running_server(folder: Path) -> Iterator[MlflowServer]:
    """Start a server whose data is in ``folder``, and kill it at the end."""
    server = MlflowServer(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One running server for the session; a test that kills it starts it again."""
    with running_server(tmp_path_factory.mktemp("mlflow_server")) as server:
        yield server


def new_store(folder: Path) -> str:
    """The URI of an empty sqlite store in ``folder``, copied from one made once (MLflow takes seconds)."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_empty_database(), folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


@functools.cache
def _empty_database() -> Path:
    from raytrain.tracking.client import check_tracking

    folder = tempfile.TemporaryDirectory(prefix="raytrain-tests-")
    _KEEP.append(folder)
    path = Path(folder.name) / "mlflow.db"
    check_tracking(f"sqlite:///{path}")
    return path


_KEEP: list[tempfile.TemporaryDirectory[str]] = []
"""Holds the folder until the interpreter ends, which removes it."""
