"""A real S3 server for the tests: ``pytest_plugins = ["tests.support.s3_server"]`` makes the fixture known.

The server (OpenStack Swift, ``s3_swift.py``) has a virtual environment of its own, built once from the package index
into a cache folder: ``RAYTRAIN_TEST_CACHE``, or ``~/.cache/raytrain-tests``. It listens on 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.s3_swift import REGION, USERS

_HERE = Path(__file__).resolve().parent
_AWS = ("AWS_", "MLFLOW_S3_")


class S3Server:
    """One server on one folder; it can be killed and started again, and the data stays.

    Users are ``test:writer``, ``test:reader`` (may read the same buckets, not write) and ``other:owner`` (an account
    of its own: another bucket space).
    """

    def __init__(self, folder: Path, region: str = REGION) -> None:
        self._folder = folder
        self._region = region
        self._process: subprocess.Popen[str] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start, and return when requests are answered."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_AWS)}
        environment |= {"TZ": "UTC", "PYTHONWARNINGS": "ignore", "PYTHONPATH": ""}
        command = [str(interpreter()), str(_HERE / "s3_swift.py"), str(self._folder), str(self._port), self._region]
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, env=environment
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.endpoint}/healthcheck", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"the S3 server did not start:\n{(self._folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def environment(self, user: str = "test:writer", **changes: str) -> dict[str, str]:
        """The variables by which clients reach the server as ``user``."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": self._region,
            "AWS_ACCESS_KEY_ID": user,
            "AWS_SECRET_ACCESS_KEY": self.secret(user),
            "AWS_EC2_METADATA_DISABLED": "true",
            **changes,
        }

    def secret(self, user: str = "test:writer") -> str:
        """The secret key of ``user``."""
        return USERS[user.replace(":", "_")].split()[0]

    def credentials(self, user: str = "test:writer", token: str = "") -> str:
        """The keys of ``user`` as AWS's file of credentials holds them."""
        session = f"aws_session_token={token}\n" if token else ""
        return f"[default]\naws_access_key_id={user}\naws_secret_access_key={self.secret(user)}\n{session}"

    @contextlib.contextmanager
    def tokens(self) -> Iterator[Callable[[str], None]]:
        """What is called inside with a session token makes the server refuse every other; one without passes."""
        file = self._folder / "etc" / "token"

        def accept(token: str) -> None:
            new = file.with_suffix(".new")
            new.write_text(token)
            new.replace(file)

        try:
            yield accept
        finally:
            file.unlink(missing_ok=True)

    def use(self, monkeypatch: pytest.MonkeyPatch, user: str = "test:writer", **changes: str) -> None:
        """Set ``environment`` for one test, and nothing else that clients read."""
        for name in os.environ:
            if name.startswith(_AWS):
                monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        for name, value in self.environment(user, **changes).items():
            monkeypatch.setenv(name, value)

    def client(self) -> Any:
        """A boto3 client as ``test:writer``, whatever the environment says."""
        import boto3

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self._region,
            aws_access_key_id="test:writer",
            aws_secret_access_key=self.secret(),
        )


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A running server with one bucket, ``raytrain``. A test that kills it starts it again."""
    folder = _data_folder()
    server = S3Server(folder)
    try:
        server.start()
        server.client().create_bucket(Bucket="raytrain")
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _cache() -> Path:
    folder = Path(os.environ.get("RAYTRAIN_TEST_CACHE", "~/.cache/raytrain-tests")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _data_folder() -> Path:
    """A new folder on a file system with user extended attributes, where Swift keeps what it knows of an object."""
    for parent in (Path(tempfile.gettempdir()), _cache()):
        folder = Path(tempfile.mkdtemp(prefix="raytrain-s3-", dir=parent))
        try:
            os.setxattr(folder, "user.raytrain", b"1")
            return folder
        except OSError:
            folder.rmdir()
    pytest.skip("no file system with user extended attributes: set RAYTRAIN_TEST_CACHE to a folder on one")


def interpreter() -> Path:
    """The interpreter of the server's environment, built once for each version of the requirements and of Python."""
    requirements = _HERE / "s3_requirements.txt"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = _cache() / f"swift-{digest}"
    python = folder / "bin" / "python"
    with (_cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)]
            subprocess.run(install, check=True)
            (folder / "ready").touch()
    return python
