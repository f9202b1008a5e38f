"""Addresses of stores: a mistake in one is a line at once, and no password in one is shown."""

from __future__ import annotations

import builtins
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, RESOURCE_DOES_NOT_EXIST
from sqlalchemy.exc import OperationalError

from raytrain.data.corpus import Corpus
from raytrain.runs import workspace
from raytrain.runs.workspace import open_workspace
from raytrain.tracking import client
from raytrain.tracking.client import (
    check_address,
    check_tracking,
    explain,
    is_usable,
    older_store,
    retry_tracking,
    shown,
    tracking_uri,
    ui_hint,
)
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config

PASSWORDS = ["secret", *(f"secret{character}secret" for character in "#/?@: %&"), "secret#/@?secret"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("error", "looks"),
    [
        (ClientError({"Error": {"Code": "ExpiredToken"}}, "PutObject"), True),
        (S3UploadFailedError("Failed to upload: An error occurred (403)"), True),
        (MlflowException("downloading failed: An error occurred (400) when calling HeadObject: Bad Request"), True),
        (MlflowException("no", PERMISSION_DENIED), True),
        (MlflowException("Run 'x4003' not found", RESOURCE_DOES_NOT_EXIST), False),
        (OperationalError("insert", {}, Exception("database is locked")), False),
        (ConnectionError("refused"), False),
    ],
)
def test_keys_are_looked_up_where_they_may_be_what_is_wrong(
    error: Exception, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(client, "take_up_keys", lambda: looked.append(1))

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        retry_tracking(fail, patience_s=0)
    assert bool(looked) == looks


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("scheme", ["postgresql+psycopg2", "mysql", "http", "https", "postgres", "nonsense"])
def test_a_password_is_not_shown(scheme: str, password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{scheme}://user:{password}@127.0.0.1:9/mlflow"
    said = [shown(uri), ui_hint(uri, "1"), explain(OSError(f"cannot connect to {uri.replace(' ', '%20')}"))]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for check in (tracking_uri, lambda: check_tracking(uri)):
        try:
            check()
        except UserError as error:
            said.append(str(error))
    assert len(said) >= 4
    for line in said:
        assert "\n" not in line
        assert "secret" not in line
    assert shown(uri) == f"{scheme}://127.0.0.1:9/mlflow"


def test_a_password_among_the_options_is_not_shown() -> None:
    uri = "postgresql+psycopg2://127.0.0.1:9/mlflow?user=me&password=made-up&sslpassword=made-up"
    assert shown(uri) == "postgresql+psycopg2://127.0.0.1:9/mlflow"
    assert "made-up" not in explain(OSError(f"cannot connect to {uri}")) + explain(OSError("password=made-up host=h"))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://[::1", "no address of a server: write http://HOST:PORT"),
        ("http:///x", "no address of a server"),
        ("http://host:port", "no address of a server"),
        ("http://host:99999", "no address of a server"),
        ("http:/host:5000", "no longer keeps runs in a plain folder|no address of a store"),
        ("postgres://u@h/d", "no address of a store that MLflow knows: give sqlite:///FILE"),
        ("redis://h", "no address of a store"),
        ("u:pw@host/db", "no address of a store"),
        ("sqlite://x.db", "no address of a store"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///$HOME/x.db", "a variable that no shell has replaced"),
        ("postgresql+nothing://u@h/d", "cannot be parsed"),
        ("postgresql+psycopg2://u@h:port/d", "cannot be parsed"),
    ],
)
def test_an_address_that_is_none_is_one_line(uri: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=words):
        tracking_uri()


@pytest.mark.parametrize(
    ("uri", "package"),
    [("postgresql+psycopg2", "psycopg2-binary"), ("mysql", "mysqlclient"), ("mysql+pymysql", "pymysql")],
)
def test_a_missing_driver_is_named(uri: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_drivers(name: str, *arguments: Any, **settings: Any) -> Any:
        if name in ("psycopg2", "MySQLdb", "pymysql"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without_drivers)
    with pytest.raises(UserError, match=f"driver is missing: pip install {package}, or name the one"):
        check_address(f"{uri}://u@127.0.0.1:1/mlflow")


def test_a_database_that_does_not_answer_is_one_line_at_once() -> None:
    pytest.importorskip("psycopg2")
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError, match=f"tracking: postgresql.psycopg2://127.0.0.1:{port}/d cannot be used"):
        check_tracking(f"postgresql+psycopg2://u:pw@127.0.0.1:{port}/d")
    assert not is_usable(f"postgresql+psycopg2://u:pw@127.0.0.1:{port}/d")
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("kind", ["folder", "text", "home"])
def test_a_sqlite_file_that_is_something_else_is_one_line(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "text":
        (folder / "db").write_text("no database")
    else:
        (folder / ("home/db" if kind == "home" else "db")).mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///~/db" if kind == "home" else f"sqlite:///{folder}/db")
    expected = (
        "db is not a database; remove it" if kind == "text" else "is a folder: name a file in it, such as sqlite:///"
    )
    uri = tracking_uri()
    assert uri == f"sqlite:///{folder}/{'home/' * (kind == 'home')}db"
    with pytest.raises(UserError, match=expected):
        check_tracking(uri)
    assert not is_usable(uri)


def test_runs_of_an_older_mlflow_beside_are_said(
    folder: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain ``mlflow ui`` takes them for its store."""
    monkeypatch.setattr(workspace, "check_tracking", lambda uri: None)
    monkeypatch.setattr(workspace, "prepare", lambda *arguments, **settings: corpus)
    (folder / "mlruns" / "models").mkdir(parents=True)
    open_workspace(tiny_config("byte_lstm"), str(folder / "runs"))
    assert capsys.readouterr().out == ""
    (folder / "mlruns" / "0").mkdir()
    (folder / "mlruns" / "0" / "meta.yaml").touch()
    open_workspace(tiny_config("byte_lstm"), str(folder / "runs"))
    said = capsys.readouterr().out
    assert f"{folder}/mlruns holds runs of an older MLflow" in said
    assert f"mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db" in said
    assert older_store("http://host:5000") is None
    assert older_store(f"sqlite:///{folder}/elsewhere/mlflow.db") is None
