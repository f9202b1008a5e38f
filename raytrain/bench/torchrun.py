"""Worker groups under ``torchrun`` that wait between blocks, so that several groups can take turns."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

START_S = 300.0
"""Longest time that the workers may take to start, in seconds."""


class TorchrunGroup:
    """Processes of ``raytrain.bench.worker``, each with its own cores."""

    def __init__(self, workers: int, threads: int, cores: list[int], torchrun: bool = True) -> None:
        """Start ``workers`` of ``threads`` threads each, which share ``cores``.

        One worker without ``torchrun`` is an ordinary process.
        """
        self.workers = workers
        self.threads = threads
        self._folder = tempfile.TemporaryDirectory(prefix="raytrain-bench-")
        self._log = Path(self._folder.name, "log")
        address = str(Path(self._folder.name, "socket"))
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(address)
        self._server.listen(workers)
        self._server.settimeout(0.5)
        launcher = ["-m", "raytrain.bench.worker"]
        if torchrun:
            launcher = [
                *("-m", "torch.distributed.run", "--nproc-per-node", str(workers)),
                *("--master-addr", "127.0.0.1", "--master-port", str(free_port()), *launcher),
            ]
        command = [sys.executable, *launcher, address, ",".join(map(str, cores))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self._streams: list[Any] = []

    def __enter__(self) -> TorchrunGroup:
        deadline = time.monotonic() + START_S
        while len(self._streams) < self.workers:
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__(None, None, None)
                    raise self._dead() from None
                continue
            connection.settimeout(None)
            self._streams.append(connection.makefile("rw"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.close()
        self._server.close()
        if kind is not None or not self._streams:
            self._process.terminate()
        self._process.wait()
        self._folder.cleanup()

    def ask(self, command: dict[str, Any]) -> list[dict[str, Any]]:
        """Let every worker do ``command``; return their answers in any order."""
        for stream in self._streams:
            stream.write(json.dumps(command) + "\n")
            stream.flush()
        answers = [stream.readline() for stream in self._streams]
        if not all(answers):
            raise self._dead()
        return [json.loads(answer) for answer in answers]

    def _dead(self) -> RuntimeError:
        log = self._log.read_text(errors="replace") if self._log.exists() else ""
        return RuntimeError(f"a worker of the benchmark has died:\n{log[-4000:]}")


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
