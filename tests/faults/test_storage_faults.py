"""What a checkpoint does when a store breaks in its middle: a full disk, a refusal, a server's error, a reset."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from raytrain.runs.checkpoint import Snapshot, latest
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.storage import open_storage


class _Store(BaseHTTPRequestHandler):
    """As much of S3 as a checkpoint needs. It keeps the object and breaks once in ``fault``'s way at a tensor file."""

    objects: dict[str, bytes]
    faults: list[str]

    def do_GET(self) -> None:
        if "list-type=2" in self.path:
            names = (name.partition("/")[2] for name in sorted(self.objects))
            listed = "".join(f"<Contents><Key>{name}</Key></Contents>" for name in names)
            self._answer(200, f"<ListBucketResult>{listed}</ListBucketResult>".encode())
        elif self.path.lstrip("/") in self.objects:
            self._answer(200, self.objects[self.path.lstrip("/")])
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("model.safetensors") and self.faults:
            fault = self.faults.pop()
            if fault == "reset":
                # closed with a reset instead of an end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
            else:
                status, code = fault.split()
                self._answer(int(status), f"<Error><Code>{code}</Code><Message>told</Message></Error>".encode())
            return
        self.objects[self.path.lstrip("/")] = data
        self._answer(200, b"")

    def do_DELETE(self) -> None:
        self.objects.pop(self.path.lstrip("/"), None)
        self._answer(204, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Store]]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1", "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    _Store.objects, _Store.faults = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Store) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield _Store
        server.shutdown()


def _snapshot() -> Snapshot:
    return Snapshot(3, {"model": {"w": torch.arange(4.0)}}, {"best": None}, {"seed": 1})


@pytest.mark.slow  # it waits as a retry does
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("403 AccessDenied", "no permission"),
        ("403 ExpiredToken", "the session token has expired"),
        ("500 InternalError", "InternalError"),
        ("503 SlowDown", "SlowDown"),
        ("reset", "cannot be reached"),
    ],
)
def test_a_store_that_breaks_half_way_is_tried_again(
    store: type[_Store], caplog: pytest.LogCaptureFixture, fault: str, said: str
) -> None:
    storage = open_storage("s3://bucket/run")
    store.faults = [fault]
    with CheckpointWriter(storage) as writer:
        writer.save(_snapshot())
    assert f"the checkpoint of step 3 is not saved yet, trying again: cannot write {storage.uri()}" in caplog.text
    assert said in caplog.text
    found = latest(storage)
    assert found is not None
    assert torch.equal(found.tensors("model")["w"], torch.arange(4.0))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_full_disk_is_tried_again_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    write, faults = Path.write_bytes, [number]

    def full(path: Path, data: bytes) -> int:
        if len(data) > 40 and faults:
            write(path, data[:40])
            raise OSError(faults.pop(), os.strerror(number))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with CheckpointWriter(open_storage(tmp_path)) as writer:
        writer.save(_snapshot())
    assert f"is not saved yet, trying again: cannot write {tmp_path}" in caplog.text
    assert os.strerror(number).lower() in caplog.text
    assert len(list(tmp_path.rglob("*"))) == 5  # the folder and its four files, and nothing partial
    assert latest(open_storage(tmp_path)) is not None
