"""Machines of their own, as far as a command can tell, for tests that kill one and go on with another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mlflow_server import MlflowServer
from tests.support.s3_server import S3Server


class Machine:
    """Stands for a machine of its own: nothing but a working directory, an empty cache, and variables."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder = folder
        self.home = folder.with_name(f"{folder.name}-home")
        for location in (folder, self.home):
            location.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_S3", "RAY_"))}
        self.environment = {
            **kept,
            "HOME": str(self.home),
            "RAYTRAIN_CACHE": str(self.home / "cache"),
            "RAY_ADDRESS": "local",  # not what may run beside
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            **variables,
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own, its output in ``output.txt``."""
        output = (self.folder / "output.txt").open("w")
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, env=self.environment, text=True,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments: str, status: int = 0, timeout: float = 300) -> str:
        """Run a command to its end; returns what it said."""
        process = self.start(*arguments)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            kill(process)
            pytest.fail(f"{arguments} hangs:\n{self.output()[-3000:]}")
        assert code == status, self.output()[-3000:]
        return self.output()

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()


def kill(process: subprocess.Popen[str]) -> None:
    """As when the machine goes away: the command and the Ray instance that it has started."""
    children = subprocess.run(["ps", "-o", "pid=", "--sid", str(process.pid)], capture_output=True, text=True).stdout
    for pid in [process.pid, *map(int, children.split())]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s still not: {what}"
        time.sleep(0.2)


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, reached by this process too."""
    s3_server.use(monkeypatch)
    return s3_server


@pytest.fixture
def machines(s3: S3Server, mlflow_server: MlflowServer, tmp_path: Path) -> Callable[..., Machine]:
    """Makes machines that reach both servers."""

    def make(name: str, **changes: str) -> Machine:
        return Machine(
            tmp_path / name,
            {
                **s3.environment(),
                "MLFLOW_TRACKING_URI": mlflow_server.uri,
                "RAYTRAIN_STORAGE": "s3://raytrain/home",
                **changes,
            },
        )

    return make
