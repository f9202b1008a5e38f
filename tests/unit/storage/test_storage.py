"""Folder and S3 storage do the same; what goes wrong is said in one line."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest

from raytrain.storage import base, check, open_storage, s3, storage_environment
from raytrain.storage.base import NotFoundError, Storage, StorageError, retry_storage
from raytrain.storage.check import check_writable
from raytrain.storage.local import FolderStorage
from raytrain.utils import retry as retry_module
from raytrain.utils.errors import UserError

if TYPE_CHECKING:
    from tests.support.s3_server import S3Server


WHEN_REQUIRED = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}


@pytest.fixture(params=["folder", "s3", "s3-when-required"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "store")
    server = request.getfixturevalue("s3_server")
    server.use(monkeypatch, **(WHEN_REQUIRED if request.param == "s3-when-required" else {}))
    return open_storage(f"s3://raytrain/{tmp_path.name}")


# ------------------------------------------------------------------------------------------ surface


def test_what_is_written_is_read_listed_and_deleted(storage: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.write_bytes(os.urandom(9 * 2**20))
    storage.write("a/x", b"1")
    storage.write("a/x", b"\0two")
    storage.write("ab", b"")
    storage.upload("a/deep/y", source)
    assert storage.read("a/x") == b"\0two"
    assert storage.read("ab") == b""
    storage.download("a/deep/y", target)
    assert target.read_bytes() == source.read_bytes() == storage.read("a/deep/y")
    assert storage.list() == ["a/deep/y", "a/x", "ab"]
    assert storage.list("a") == ["a/deep/y", "a/x"]
    assert storage.child("a").list() == ["deep/y", "x"]
    assert storage.list("nothing") == []
    assert storage.exists("a/x")
    assert not storage.exists("a")
    assert not storage.exists("a/z")
    assert open_storage(storage.child("a").uri()).read("x") == b"\0two"
    assert not storage.create("a/x", b"other")
    assert storage.read("a/x") == b"\0two"
    assert storage.create("a/new", b"new")
    assert storage.read("a/new") == b"new"
    storage.delete("a/x")
    storage.delete("a/x")
    assert storage.list("a") == ["a/deep/y", "a/new"]
    storage.delete_prefix("a")
    storage.delete_prefix("a")
    assert storage.list() == ["ab"]
    assert [entry.name for entry in target.parent.iterdir()] == ["target"]


def test_a_missing_key_is_told_from_a_broken_store(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="missing/key"):
        storage.read("missing/key")
    with pytest.raises(NotFoundError):
        storage.download("missing/key", tmp_path / "x" / "file")
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize("key", ["", "/etc/x", "../x", "a/../../x", "a//b", "a/", "./a", "a\0"])
def test_a_key_cannot_leave_its_storage(tmp_path: Path, key: str) -> None:
    storage = open_storage(tmp_path)
    with pytest.raises(ValueError):
        storage.read(key)
    with pytest.raises(ValueError):
        storage.delete_prefix(key)


def test_a_part_is_read_alone(storage: Storage) -> None:
    storage.write("a/key", b"0123456789")
    assert storage.read_range("a/key", 0, 4) == b"0123"
    assert storage.read_range("a/key", 3, 1) == b"3"
    assert storage.read_range("a/key", 7, 100) == b"789"
    with pytest.raises(NotFoundError):
        storage.read_range("none", 0, 1)
    with pytest.raises(ValueError, match="not a path below"):
        storage.read_range("../key", 0, 1)


def test_it_can_be_pickled_and_holds_no_keys(storage: Storage, s3_server: S3Server) -> None:
    storage.write("k", b"v")
    data = pickle.dumps(storage)
    assert pickle.loads(data).read("k") == b"v"
    assert s3_server.secret().encode() not in data
    assert s3_server.secret() not in repr(storage)


def test_check_writable_leaves_nothing(storage: Storage) -> None:
    check_writable(storage)
    assert storage.list() == []


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    contents = [bytes([value]) * 2**20 for value in range(2)]
    storage.write("k", contents[0])
    seen: set[bytes] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(storage.read("k"))

    reader = threading.Thread(target=look)
    reader.start()
    for turn in range(20):
        storage.write("k", contents[turn % 2])
    done.set()
    reader.join()
    assert seen <= set(contents)
    (tmp_path / ".partial-left-by-a-crash").write_bytes(b"x")
    assert storage.list() == ["k"]


# ---------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address",
    [
        "",
        "s3:/bucket/x",
        "S3:bucket",
        "s3://",
        "s3:///x",
        "gs://bucket/x",
        "https://host/x",
        "s3://b:ucket/x",
        "file:///x",
        "s3//bucket/x",
        "http:/host/x",
        "s3://bucket/x\r",
        "s3://bucket/x ",
        "s3://bucket/a\tb",
    ],
)
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"s3://bucket/prefix"):
        open_storage(address)


def test_keys_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError) as caught:
        open_storage("s3://AKIAKEY:very-secret@bucket/x")
    assert "very-secret" not in str(caught.value)


def test_an_address_is_normalised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("runs").uri() == str(tmp_path / "runs")
    assert open_storage("S3://bucket//a//b/").uri("c") == "s3://bucket/a/b/c"
    assert open_storage("s3://bucket").uri() == "s3://bucket"
    with pytest.raises(UserError, match="not a path"):
        open_storage("s3://bucket/a/../b")


@pytest.mark.parametrize("prefix", ["my prefix", "50%25", "a%2/ü+[dt=2026-01-01]&b;c"])
def test_any_prefix_passes_the_check(
    prefix: str, moto_bucket: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["storage", "check", f"s3://bucket/{prefix}"])
    monkeypatch.setattr(check, "_LARGE", 1000)
    check.main()
    shown = capsys.readouterr().out
    assert shown.count("works") == 7
    assert "hecksum" not in shown.replace("checksum trailer", "")
    assert open_storage(f"s3://bucket/{prefix}").list() == []


@pytest.fixture(scope="module")
def moto_bucket() -> Iterator[None]:
    """A bucket ``bucket`` in moto's server, reached through the AWS_* variables alone."""
    server = pytest.importorskip("moto.server", reason="needs moto[s3,server]").ThreadedMotoServer(
        "127.0.0.1", 0, False
    )
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("no_proxy", "*")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        yield
    server.stop()


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, raytrain.storage; print([m for m in ('boto3', 'torch', 'pyarrow', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_environment_of_workers_holds_settings_and_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_S3")):
            monkeypatch.delenv(name)
    assert storage_environment() == {}
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    assert storage_environment() == {
        "AWS_ENDPOINT_URL": "http://store:9000",
        "AWS_ENDPOINT_URL_S3": "http://store:9000",
        "MLFLOW_S3_ENDPOINT_URL": "http://store:9000",
        "AWS_REGION": "eu-west-1",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:very-secret@store")
    with pytest.raises(UserError) as caught:
        storage_environment()
    assert "very-secret" not in str(caught.value)


# ----------------------------------------------------------------------------------------- mistakes


def _refusal(uri: str) -> str:
    with pytest.raises(UserError) as caught:
        check_writable(open_storage(uri))
    line = str(caught.value)
    assert "\n" not in line
    assert uri.split("/")[2] in line
    return line


def test_each_s3_mistake_has_its_line(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.use(monkeypatch)
    assert "there is no bucket 'elsewhere'" in _refusal("s3://elsewhere/x")
    s3_server.use(monkeypatch, AWS_SECRET_ACCESS_KEY="not-the-secret")
    line = _refusal("s3://raytrain/x")
    assert "wrong secret" in line
    assert "not-the-secret" not in line
    s3_server.use(monkeypatch, AWS_ACCESS_KEY_ID="test:nobody")
    assert "AWS_ACCESS_KEY_ID" in _refusal("s3://raytrain/x")
    s3_server.use(monkeypatch, user="test:reader")
    assert "no permission" in _refusal("s3://raytrain/x")
    s3_server.use(monkeypatch, user="other:owner")
    assert "no bucket" in _refusal("s3://raytrain/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "no AWS keys found" in _refusal("s3://raytrain/x")


def test_a_read_only_user_can_read(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3_server.use(monkeypatch)
    address = f"s3://raytrain/{tmp_path.name}"
    open_storage(address).write("k", b"v")
    s3_server.use(monkeypatch, user="test:reader")
    reader = open_storage(address)
    assert reader.read("k") == b"v"
    assert reader.list() == ["k"]
    with pytest.raises(StorageError, match="no permission"):
        reader.delete("k")


def test_an_unreachable_server_is_told_soon(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.use(monkeypatch, AWS_ENDPOINT_URL_S3="http://127.0.0.1:9")
    begin = time.monotonic()
    line = _refusal("s3://raytrain/x")
    assert "127.0.0.1:9 cannot be reached" in line
    assert "AWS_ENDPOINT_URL_S3" in line
    assert time.monotonic() - begin < 10
    s3_server.use(monkeypatch, AWS_ENDPOINT_URL_S3="no scheme")
    with pytest.raises(UserError, match="AWS settings"):
        open_storage("s3://raytrain/x")


class _Answer(BaseHTTPRequestHandler):
    """Refuses everything with the status and the code in the server's ``answer``."""

    answer = (400, "")

    def do_PUT(self) -> None:
        status, code = self.answer
        body = f"<Error><Code>{code}</Code><Message>first\nsecond</Message></Error>".encode() if code else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "RequestTimeTooSkewed", "clock"),
        (403, "SignatureDoesNotMatch", "wrong secret"),
        (403, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        (400, "AuthorizationHeaderMalformed", "wrong region: set AWS_REGION"),
        (501, "NotImplemented", "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
        (411, "MissingContentLength", "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
        (411, "", "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
        (400, "ExpiredToken", "renew"),
        (400, "Unheard", "first second (Unheard from"),
    ],
)
def test_each_refusal_of_a_server_has_its_line(
    s3_server: S3Server,
    refusing: str,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    words: str,
) -> None:
    s3_server.use(monkeypatch, AWS_ENDPOINT_URL_S3=refusing, AWS_MAX_ATTEMPTS="1")
    monkeypatch.setattr(_Answer, "answer", (status, code))
    assert words in _refusal("s3://raytrain/x")


def test_each_folder_mistake_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file, not a folder"):
            check_writable(open_storage(path))
    with pytest.raises(UserError, match="file name too long"):
        check_writable(open_storage(tmp_path / ("x" * 300)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_has_its_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="permission denied"):
        check_writable(open_storage(tmp_path / "store"))


class _Liar(FolderStorage):
    """A store that reports success and does nothing, as some S3 servers do."""

    def __init__(self, root: Path, lie: str) -> None:
        super().__init__(root)
        self.lie = lie

    def read(self, key: str) -> bytes:
        return b"other" if self.lie == "read" else super().read(key)

    def list(self, prefix: str = "") -> list[str]:
        return [] if self.lie == "list" else super().list(prefix)

    def delete_prefix(self, prefix: str) -> None:
        if self.lie != "delete":
            super().delete_prefix(prefix)


@pytest.mark.parametrize(("lie", "words"), [("read", "reads back"), ("list", "not listed"), ("delete", "still listed")])
def test_a_store_that_lies_is_found_out(tmp_path: Path, lie: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_writable(_Liar(tmp_path, lie))


# ------------------------------------------------------------------------------------------ command


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return subprocess.run(
        [sys.executable, "-m", "raytrain.storage", *arguments],
        capture_output=True,
        text=True,
        env={**clean, "COLUMNS": "120", **environment},
        timeout=60,
    )


def test_the_command_shows_what_works(s3_server: S3Server, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    result = _command("check", f"s3://raytrain/{tmp_path.name}", **s3_server.environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("works") == 7
    assert "fails" not in result.stdout
    assert s3_server.client().list_objects_v2(Bucket="raytrain", Prefix=tmp_path.name)["KeyCount"] == 0
    result = _command("check", str(tmp_path / "store"))
    assert result.returncode == 0
    assert result.stdout.count("works") == 6


def test_the_command_says_what_is_wrong(s3_server: S3Server) -> None:
    result = _command("check", "s3://elsewhere/x", **s3_server.environment())
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "there is no bucket 'elsewhere'" in result.stderr
    assert s3_server.secret() not in result.stdout + result.stderr
    for arguments in ((), ("check",), ("look", "x"), ("check", "gs://x/y")):
        result = _command(*arguments)
        assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, "")


def test_the_server_is_what_it_says(s3_server: S3Server) -> None:
    assert urllib.request.urlopen(f"{s3_server.endpoint}/healthcheck", timeout=5).read() == b"OK"


class Away(FolderStorage):
    """A store that does not answer until it was asked so many times."""

    refusals = 0

    def read(self, key: str) -> bytes:
        self.answer()
        return super().read(key)

    def list(self, prefix: str = "") -> list[str]:
        self.answer()
        return super().list(prefix)

    def exists(self, key: str) -> bool:
        self.answer()
        return super().exists(key)

    def child(self, prefix: str) -> FolderStorage:
        return Away(self.folder / prefix)

    def answer(self) -> None:
        Away.refusals -= 1
        if Away.refusals >= 0:
            raise StorageError("nobody answers")


def test_work_that_is_under_way_waits_for_a_store_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retry_module.time, "sleep", pauses.append)
    monkeypatch.setenv(base.PATIENCE, "60")
    location = Away(tmp_path)
    location.write("a", b"1")
    Away.refusals = 7
    assert retry_storage(lambda: location.read("a")) == b"1"
    assert pauses == [0.5, 1, 2, 4, 8, 15, 15]
    with pytest.raises(NotFoundError):
        retry_storage(lambda: location.read("b"))
    assert len(pauses) == 7
    monkeypatch.setenv(base.PATIENCE, "0")
    Away.refusals = 1
    with pytest.raises(StorageError, match="nobody answers"):
        retry_storage(lambda: location.read("a"))


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_patience_that_is_no_number_of_seconds_is_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(base.PATIENCE, text)
    with pytest.raises(UserError, match=r"RAYTRAIN_STORAGE_PATIENCE is '.*': give a number of seconds of at least 0"):
        base.patience()


@pytest.mark.parametrize("size", [0, 2**20, 9 * 10**9, 10**12])
def test_a_file_has_as_few_parts_as_every_server_takes(size: int) -> None:
    settings = s3._transfer(size)
    assert -(-size // settings.multipart_chunksize) <= 1000
    assert settings.multipart_chunksize * settings.max_concurrency <= max(
        s3._SENT_AT_ONCE, settings.multipart_chunksize
    )
    assert settings.max_concurrency >= 1


def test_a_large_file_is_sent_in_few_parts(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.use(monkeypatch)
    monkeypatch.setattr(s3, "_MOST_PARTS", 2)
    content = os.urandom(2**20) * 25
    (tmp_path / "large").write_bytes(content)
    storage = open_storage(f"s3://raytrain/{tmp_path.name}")
    storage.upload("large", tmp_path / "large")
    assert storage.read("large") == content
    assert storage.read_range("large", 13 * 2**20 - 7, 2**20) == content[13 * 2**20 - 7 : 14 * 2**20 - 7]
    assert storage.read_range("large", len(content) - 3, 10) == content[-3:]
    found = s3_server.client().head_object(Bucket="raytrain", Key=f"{tmp_path.name}/large")
    assert found["ETag"].strip('"').endswith("-2")
