"""MLflow's database on the head of a cluster: it outlives the head."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from raytrain.storage import open_storage
from raytrain.storage.base import Storage, StorageError
from raytrain.storage.local import FolderStorage
from raytrain.tracking.server import COPY, DatabaseCopy, check_host, is_whole
from raytrain.utils.errors import UserError
from tests.support.machine import wait_for
from tests.support.mlflow_server import new_store
from tests.support.s3_server import S3Server


def write(file: Path, value: str) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS t (v TEXT)")
        connection.execute("INSERT INTO t VALUES (?)", (value,))
    connection.close()


def values(file: Path) -> list[str]:
    connection = sqlite3.connect(file)
    found = [value for (value,) in connection.execute("SELECT v FROM t")]
    connection.close()
    return found


def test_the_copy_follows_the_database_and_the_next_machine_gets_it(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "storage")
    file = tmp_path / "head" / "mlflow.db"
    file.parent.mkdir()
    copy = DatabaseCopy(file, storage)
    assert not copy.fetch()
    assert not copy.save()  # nothing there yet
    write(file, "a")
    assert copy.save()
    assert not copy.save()  # nothing new
    write(file, "b")
    assert copy.save()

    other = tmp_path / "next" / "mlflow.db"
    other.parent.mkdir()
    assert DatabaseCopy(other, storage).fetch()
    assert values(other) == ["a", "b"]
    assert sorted(path.name for path in file.parent.iterdir()) == ["mlflow.db"]


def test_what_is_there_is_not_replaced_by_the_copy(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "storage")
    file = tmp_path / "mlflow.db"
    write(file, "old")
    DatabaseCopy(file, storage).save()
    write(file, "new")
    assert not DatabaseCopy(file, storage).fetch()
    assert values(file) == ["old", "new"]


def test_a_writer_in_the_middle_of_a_transaction_is_not_copied(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "storage")
    file = tmp_path / "mlflow.db"
    write(file, "a")
    writer = sqlite3.connect(file, isolation_level=None)
    writer.execute("BEGIN")
    writer.execute("INSERT INTO t VALUES ('half')")
    DatabaseCopy(file, storage).save()
    writer.execute("COMMIT")
    writer.close()
    storage.download(COPY, tmp_path / "copy.db")
    assert values(tmp_path / "copy.db") == ["a"]


def test_a_damaged_copy_is_refused_and_a_damaged_database_does_not_replace_a_good_copy(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "storage")
    file = tmp_path / "mlflow.db"
    write(file, "a")
    with sqlite3.connect(file) as connection:
        connection.executemany("INSERT INTO t VALUES (?)", [(f"{number:0100d}",) for number in range(2000)])
    connection.close()
    DatabaseCopy(file, storage).save()
    good = storage.read(COPY)

    with file.open("r+b") as raw:
        raw.seek(8192)
        raw.write(b"\xff" * 8192)
    assert not is_whole(file)
    with pytest.raises(UserError, match="is damaged"):
        DatabaseCopy(file, storage).save()
    assert storage.read(COPY) == good

    storage.write(COPY, good[: len(good) // 2])
    with pytest.raises(UserError, match="is no whole sqlite database"):
        DatabaseCopy(tmp_path / "other.db", storage).fetch()
    assert not (tmp_path / "other.db").exists()


def test_no_empty_database_is_begun_while_the_storage_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FolderStorage(tmp_path / "storage")

    def away(key: str, file: Path) -> None:
        raise StorageError("no answer")

    monkeypatch.setattr(storage, "download", away)
    with pytest.raises(StorageError):
        DatabaseCopy(tmp_path / "mlflow.db", storage).fetch()
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "8.8.8.8", "head.example"])
def test_an_address_that_all_reach_is_refused(host: str) -> None:
    with pytest.raises(UserError, match="private address"):
        check_host(host)


class Head:
    """A machine that serves MLflow, as far as the server can tell."""

    def __init__(self, folder: Path, port: int, storage: str) -> None:
        # 127.0.0.2 stands for the private address
        command = [sys.executable, "-m", "raytrain.tracking", "serve", "--host", "127.0.0.2", "--port", str(port)]
        command += ["--folder", str(folder), "--storage", storage, "--interval", "1"]
        self.log = folder.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.port = port

    def answers(self, host: str) -> bool:
        import urllib.error
        import urllib.request

        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://{host}:{self.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def die(self) -> None:
        """As when the machine goes: all processes at once."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            process.kill()
        self.process.wait()


def test_the_next_head_serves_what_the_last_one_had(s3: S3Server, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    storage = open_storage("s3://raytrain/head")
    new_store(tmp_path / "a")  # saves MLflow the making of its tables
    head = Head(tmp_path / "a", port, storage.uri())
    try:
        wait_for(lambda: head.answers("127.0.0.2"), 120, "MLflow answers")
        assert head.answers("127.0.0.1")
        MlflowClient(f"http://127.0.0.1:{port}").create_experiment("first")
        wait_for(lambda: copied(storage, "first", tmp_path), 60, "a copy with the experiment")
    finally:
        head.die()

    head = Head(tmp_path / "b", port, storage.uri())
    try:
        wait_for(lambda: head.answers("127.0.0.2"), 120, "MLflow answers again")
        second = subprocess.run(  # a second one in the same folder ends at once
            [sys.executable, "-m", "raytrain.tracking", "serve", "--folder", str(tmp_path / "b"), "--port", str(port)],
            timeout=60, env={**os.environ, "RAYTRAIN_STORAGE": storage.uri()}, check=False,
        )  # fmt: skip
        assert second.returncode == 0
        client = MlflowClient(f"http://127.0.0.2:{port}")
        assert client.get_experiment_by_name("first") is not None
        client.create_experiment("last")
        head.process.send_signal(signal.SIGTERM)
        assert head.process.wait(60) == 0
    finally:
        if head.process.poll() is None:
            head.die()
    assert copied(storage, "last", tmp_path)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", port)) != 0


def copied(storage: Storage, experiment: str, folder: Path) -> bool:
    if not storage.exists(COPY):
        return False
    storage.download(COPY, folder / "look.db")
    connection = sqlite3.connect(folder / "look.db")
    found = connection.execute("SELECT count(*) FROM experiments WHERE name = ?", (experiment,)).fetchone()[0]
    connection.close()
    return bool(found)
