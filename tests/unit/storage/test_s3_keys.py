"""Keys of an S3 storage that change while a process uses it: the new ones are taken up, whatever gives them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from raytrain.config.schema import to_dict
from raytrain.data.files import find
from raytrain.runs import checkpoint
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.storage import open_storage, s3
from raytrain.storage.base import StorageError
from raytrain.storage.s3 import S3Storage
from raytrain.tracking.client import connect, patience
from raytrain.tracking.queries import download
from raytrain.tracking.runs import Experiment
from tests.conftest import tiny_config
from tests.support.metadata_server import MetadataServer
from tests.support.mlflow_server import new_store
from tests.support.s3_server import S3Server

ROLE = "/latest/meta-data/iam/security-credentials/"
FAR = "2099-01-01T00:00:00Z"
"""An end of keys: the server refuses them long before, and boto3 does not renew them by itself."""
Rotate = Callable[[str], None]


def without_keys(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables by which clients reach the server, but for the keys."""
    server.use(monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)


@pytest.fixture
def accept(s3_server: S3Server) -> Iterator[Callable[[str], None]]:
    """Makes the server refuse all session tokens but one, from now on."""
    with s3_server.tokens() as accept:
        yield accept


@pytest.fixture
def file(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rotate:
    """Writes the keys with a token into the shared credentials file, where clients then find them."""
    without_keys(s3_server, monkeypatch)
    credentials = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))

    def rotate(token: str) -> None:
        new = tmp_path / "credentials.new"
        new.write_text(s3_server.credentials(token=token))
        new.replace(credentials)

    return rotate


@pytest.fixture
def process(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rotate:
    """Lets a program give the keys with a token."""
    without_keys(s3_server, monkeypatch)
    answer, config = tmp_path / "answer.json", tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = cat {answer}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))

    def rotate(token: str) -> None:
        answer.write_text(json.dumps({"Version": 1} | given(s3_server, token, "Session")))

    return rotate


@pytest.fixture
def instance(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, metadata_server: MetadataServer) -> Rotate:
    """Lets the metadata service give the keys with a token."""
    without_keys(s3_server, monkeypatch)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata_server.uri)
    metadata_server.pages[ROLE] = "role"

    def rotate(token: str) -> None:
        metadata_server.pages[f"{ROLE}role"] = {"Code": "Success"} | given(s3_server, token, "")

    return rotate


def given(server: S3Server, token: str, prefix: str) -> dict[str, Any]:
    """The keys with a token as a program or the metadata service says them."""
    return {
        "AccessKeyId": "test:writer",
        "SecretAccessKey": server.secret(),
        f"{prefix}Token": token,
        "Expiration": FAR,
    }


@pytest.mark.parametrize("source", ["file", "process", "instance"])
def test_every_request_takes_up_the_keys_that_there_are_now(
    request: pytest.FixtureRequest, accept: Rotate, source: str, tmp_path: Path
) -> None:
    """From a file, a program and the metadata service, whose keys are refused before the end that they name."""
    rotate: Rotate = request.getfixturevalue(source)
    rotate("token-0")
    accept("token-0")
    root = open_storage(f"s3://raytrain/{tmp_path.name}-{source}")
    storage, sent = root.child("deep"), tmp_path / "sent"
    sent.write_bytes(b"sent")
    storage.write("a", b"1")
    requests: list[tuple[Callable[[], Any], Any]] = [
        (lambda: storage.write("b", b"2"), None),
        (lambda: storage.read("b"), b"2"),
        (lambda: storage.exists("b"), True),
        (lambda: storage.exists("c"), False),
        (lambda: storage.create("c", b"3"), True),
        (lambda: storage.create("c", b"4"), False),
        (lambda: storage.upload("d", sent), None),
        (lambda: storage.download("c", tmp_path / "got"), None),
        (storage.list, ["a", "b", "c", "d"]),
        (lambda: storage.delete("a"), None),
        (lambda: storage.delete_prefix("b"), None),
        (root.list, ["deep/b", "deep/c", "deep/d"]),
    ]
    for number, (act, expected) in enumerate(requests, 1):
        rotate(f"token-{number}")
        accept(f"token-{number}")
        assert act() == expected
    assert (tmp_path / "got").read_bytes() == b"3"


def test_a_checkpoint_writer_goes_on_with_new_keys(file: Rotate, accept: Rotate, tmp_path: Path) -> None:
    file("first")
    accept("first")
    location = open_storage(f"s3://raytrain/{tmp_path.name}-run")
    config = to_dict(tiny_config("hybrid"))
    with CheckpointWriter(location.child("checkpoints"), retry_seconds=20.0) as writer:
        writer.save(Snapshot(10, {"model": {}}, {}, config), 2.0)
        deadline = time.monotonic() + 20
        while not location.list("checkpoints") and time.monotonic() < deadline:
            time.sleep(0.05)
        accept("second")
        # renewed a moment after the old ones have ended
        threading.Timer(1.0, file, ["second"]).start()
        writer.save(Snapshot(20, {"model": {}}, {}, config), 1.0)
    newest = checkpoint.latest(location.child("checkpoints"))
    assert newest is not None
    assert newest.step == 20


def test_keys_that_are_not_renewed_are_one_line(
    s3_server: S3Server, file: Rotate, accept: Rotate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file("first-secret-token")
    accept("another")
    storage = open_storage(f"s3://raytrain/{tmp_path.name}-x")
    made: list[Any] = []
    session = boto3.session.Session
    monkeypatch.setattr(boto3.session, "Session", lambda **kind: (made.append(kind), session(**kind))[1])
    with pytest.raises(StorageError) as refused:
        storage.write("k", b"v")
    assert "the session token has expired or is wrong: renew it at its source (profile, program or role)" in str(
        refused.value
    )
    assert len(made) == 1
    file("second-secret-token")  # as wrong as the first
    with pytest.raises(StorageError, match="renew it at its source") as refused:
        storage.write("k", b"v")
    assert "secret" not in str(refused.value)

    s3_server.use(monkeypatch, AWS_SESSION_TOKEN="third-secret-token")
    with pytest.raises(StorageError, match="it is in AWS_SESSION_TOKEN, which a process keeps") as refused:
        open_storage("s3://raytrain/x").write("k", b"v")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("error", ["program", "role"])
def test_keys_that_cannot_be_looked_up_hide_no_refusal(
    process: Rotate, accept: Rotate, error: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A program gives keys whose end has passed; the service that gives those of a role refuses."""
    process("first")
    accept("first")
    storage = open_storage(f"s3://raytrain/{tmp_path.name}-{error}")
    storage.write("k", b"v")
    answer = tmp_path / "answer.json"
    if error == "program":
        answer.write_text(answer.read_text().replace(FAR, "2020-01-01T00:00:00Z"))
    else:
        denied = ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "AssumeRole")
        monkeypatch.setattr(s3, "_keys", lambda _: (_ for _ in ()).throw(denied))
    accept("second")
    with pytest.raises(StorageError, match="the session token has expired or is wrong: renew it at its source"):
        storage.write("k", b"v")
    with pytest.raises(StorageError, match="the session token may have expired"):
        storage.exists("k")
    if error == "program":
        with pytest.raises(StorageError, match="the session token has expired or is wrong: renew it at its source"):
            open_storage("s3://raytrain/x").write("k", b"v")  # keys whose end has passed from the beginning


def test_a_mistake_in_a_program_is_no_failure_of_the_storage(
    process: Rotate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process("first")
    storage = open_storage(f"s3://raytrain/{tmp_path.name}")

    def fail(*_: Any) -> None:
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(s3._Connection, "run", fail)
    with pytest.raises(RuntimeError, match="futures"):
        storage.write("k", b"v")


def test_a_source_is_read_with_new_keys(
    file: Rotate, accept: Rotate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    file("first")
    accept("first")
    open_storage(f"s3://raytrain/{tmp_path.name}-source").write("a.txt", b"a line\n")
    for token in ("first", "second", "third"):
        file(token)
        accept(token)
        (found,) = find(f"s3://raytrain/{tmp_path.name}-source")
        file(f"{token} again")
        accept(f"{token} again")
        with found.local() as path:
            assert path.read_bytes() == b"a line\n"


def test_threads_take_up_new_keys_together(file: Rotate, accept: Rotate, tmp_path: Path) -> None:
    file("first")
    accept("first")
    storage = open_storage(f"s3://raytrain/{tmp_path.name}-t")
    assert isinstance(storage, S3Storage)
    storage.write("k", b"v")
    file("second")
    accept("second")
    read: list[bytes] = []
    threads = [threading.Thread(target=lambda: read.append(storage.read("k"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [b"v"] * 8


def test_artifacts_of_mlflow_take_up_new_keys(
    file: Rotate, accept: Rotate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without an MLflow server, artifacts go to the bucket by a session that boto3 keeps for the process."""
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL_S3"])
    file("first")
    accept("first")
    experiment = Experiment.open(new_store(tmp_path), "keys", f"s3://raytrain/{tmp_path.name}-artifacts")
    run = experiment.open_run("r", "r", parameters={}, tags={})
    run.log_text("one", "first.txt")
    file("second")
    accept("second")
    with patience(0):  # as the ends of runs are said
        run.log_text("two", "second.txt")
        assert sorted(entry.path for entry in connect(run.uri).list_artifacts(run.run_id)) == [
            "first.txt",
            "second.txt",
        ]
    file("third")
    accept("third")
    assert download(run, "first.txt", tmp_path) == tmp_path / "first.txt"
    names = open_storage(f"s3://raytrain/{tmp_path.name}-artifacts").list()
    assert [name.rpartition("/")[2] for name in names] == ["first.txt", "second.txt"]
