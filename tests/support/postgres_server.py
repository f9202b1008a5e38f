"""A real PostgreSQL server for the tests: the fixture ``postgres_server``.

It is Debian's package, on a new cluster in a temporary folder, and listens on a free port of 127.0.0.1 only.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DRIVER = "postgresql+psycopg2"
"""Named, since a plain ``postgresql`` means psycopg2 in SQLAlchemy 2.0 and psycopg in 2.1."""
REQUIRE_ALL = "RAYTRAIN_TESTS_REQUIRE_ALL"
"""Set where every server must be there: what is missing fails instead of being skipped."""


class PostgresServer:
    """One server on a folder of its own; its superuser is ``raytrain``, with ``password``."""

    def __init__(self, programs: Path, parent: str = "/tmp") -> None:
        self._programs = programs
        # PostgreSQL's user must get there, and the path of a socket has 107 bytes at most: not pytest's folder.
        self._folder = Path(tempfile.mkdtemp(prefix="raytrain-pg-", dir=parent))
        self.password = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # neither initdb nor the server runs as root
            user = pwd.getpwnam("postgres")
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]

    @property
    def pid(self) -> int | None:
        """The server's first process, the parent of the others."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Make the cluster, start, and return when connections are taken."""
        data = self._folder / "data"
        password = self._folder / "password"
        password.write_text(self.password)
        password.chmod(0o644)  # in a folder that only PostgreSQL's user can enter
        initialise = ["--username", "raytrain", "--auth", "scram-sha-256", "--pwfile", str(password), "--no-sync"]
        self._run("initdb", "--pgdata", str(data), "--encoding", "UTF8", "--locale", "C.UTF-8", *initialise)
        password.unlink()
        settings = {"listen_addresses": "127.0.0.1", "port": self._port, "unix_socket_directories": self._folder}
        command = [str(self._programs / "postgres"), "-D", str(data)]
        command += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, **self._as_user)
        deadline = time.monotonic() + 60
        ready = [str(self._programs / "pg_isready"), "--quiet", "--host", "127.0.0.1", "--port", str(self._port)]
        while subprocess.run(ready).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("PostgreSQL did not start:\n" + (self._folder / "server.log").read_text()[-2000:])
            time.sleep(0.05)

    def create_database(self, name: str) -> str:
        """A new empty database; returns its address as SQLAlchemy takes it."""
        address = ["--host", "127.0.0.1", "--port", str(self._port), "--username", "raytrain"]
        self._run("createdb", *address, name, PGPASSWORD=self.password)
        return f"{DRIVER}://raytrain:{self.password}@127.0.0.1:{self._port}/{name}"

    def remove(self) -> None:
        """End the server, and remove its folder."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # ends its connections, writes what it must, and goes
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGQUIT)
                self._process.wait()
            self._process = None
        shutil.rmtree(self._folder)

    def _run(self, program: str, *arguments: str, **variables: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            capture_output=True,
            text=True,
            cwd=self._folder,
            env={**os.environ, **variables},
            **self._as_user,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed:\n{done.stderr[-2000:]}")


def find_programs() -> Path | None:
    """The folder of the newest PostgreSQL of this machine, ``None`` where there is none."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if found:
        return max(found, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0))
    initdb = shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb is not None else None


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One running server for the session; each test makes databases of its own in it."""
    programs = find_programs()
    if programs is None:
        reason = "there is no PostgreSQL on this machine: apt-get install postgresql"
        if os.environ.get(REQUIRE_ALL):
            pytest.fail(f"{reason} ({REQUIRE_ALL} is set)")
        pytest.skip(reason)
    server = PostgresServer(programs)
    try:
        server.start()
        yield server
    finally:
        server.remove()
