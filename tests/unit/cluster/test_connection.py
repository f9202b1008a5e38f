"""The Ray cluster that a command joins: where its address is from, and whether a cluster answers there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2_grpc

from raytrain.cluster import connection
from raytrain.cluster.connection import check_answers, connect, find_cluster
from raytrain.utils.errors import UserError


@contextmanager
def grpc_server(answers: dict[str, Callable[[bytes, Any], bytes]]) -> Iterator[str]:
    """A server of gRPC with these methods, by path; gives its address."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            answer = answers.get(details.method)
            return None if answer is None else grpc.unary_unary_rpc_method_handler(answer)

    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads, handlers=[Handler()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment that names no cluster; gives the file in which `ray start` keeps the last one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_the_directory_of_a_cluster_answers_and_so_does_one_that_wants_a_token() -> None:
    def refuse(request: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        return b""

    for answer in (lambda request, context: b"", refuse):
        with grpc_server({connection.CHECK_ALIVE: answer}) as address:
            check_answers(address, "--address")


def test_rays_directory_still_has_the_method() -> None:
    class Paths:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def unary_unary(self, path: str, **how: Any) -> None:
            self.seen.append(path)

    paths = Paths()
    gcs_service_pb2_grpc.NodeInfoGcsServiceStub(paths)
    assert connection.CHECK_ALIVE in paths.seen, f"Ray {ray.__version__} has renamed it: every cluster would be refused"


def test_where_nothing_listens_there_is_no_cluster() -> None:
    with pytest.raises(UserError, match=r"answers at 127\.0\.0\.1:1 \(RAY_ADDRESS\): Connection refused; correct RAY"):
        check_answers("127.0.0.1:1", "RAY_ADDRESS")


def test_a_server_that_is_no_cluster_is_told_from_one() -> None:
    web = ThreadingHTTPServer(("127.0.0.1", 0), type("Quiet", (BaseHTTPRequestHandler,), {"log_message": print}))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        with grpc_server({}) as other:  # as Ray Client's port is
            for address in (other, f"127.0.0.1:{web.server_port}"):
                with pytest.raises(UserError, match="what listens there is something else; correct --address"):
                    check_answers(address, "--address")
    finally:
        web.shutdown()
        web.server_close()


def test_what_takes_connections_and_says_nothing_is_waited_for_a_stated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(UserError, match=r"no answer in 0\.5 s"):
            check_answers(f"127.0.0.1:{silent.getsockname()[1]}", "--address")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("address", ["host", "host:", "host:0", "host:99999", "a b:1", "http://host:80", "host:6379/x"])
def test_what_is_no_address_is_not_asked(address: str) -> None:
    with pytest.raises(UserError, match=r"^RAY_ADDRESS is '.*': write HOST:PORT"):
        check_answers(address, "RAY_ADDRESS")


def test_an_address_for_ray_client_is_refused_with_what_to_do(nothing_known: Path) -> None:
    with pytest.raises(UserError, match=r"--address is ray://127\.0\.0\.1:1, an address for Ray Client.*ray exec"):
        connect("ray://127.0.0.1:1")


def test_a_cluster_is_found_where_ray_finds_it(nothing_known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_cluster(None)[0] is None
    nothing_known.write_text("10.0.0.1:6379")
    found, source = find_cluster(None)
    assert (found, "ray start" in source) == ("10.0.0.1:6379", True)
    assert find_cluster("auto")[0] == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert find_cluster(None) == ("10.0.0.2:6379", "RAY_ADDRESS")
    assert find_cluster("10.0.0.3:6379") == ("10.0.0.3:6379", "--address")
    assert find_cluster("local")[0] is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert find_cluster(None)[0] is None


def test_a_cluster_that_has_died_with_its_machine_is_said_with_what_forgets_it(nothing_known: Path) -> None:
    nothing_known.write_text("127.0.0.1:1")
    with pytest.raises(
        UserError, match=r"answers at 127\.0\.0\.1:1 \(the last one that `ray start`.*`ray stop` forget"
    ):
        connect(None)


def test_a_home_that_cannot_be_written_is_said_with_what_needs_it(tmp_path: Path) -> None:
    """In a process of its own: Ray keeps in mind that tokens are in use."""
    code = "from raytrain.cluster.connection import connect; connect('local')"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        env={**environment, "HOME": "/proc/nowhere", "RAY_TMPDIR": str(tmp_path)},
    )  # fmt: skip
    line = done.stderr.splitlines()[-1]
    assert "Ray cannot be started here: " in line
    assert line.endswith("'/proc/nowhere'; set HOME to a folder that can be written: Ray keeps its token there")


def test_the_limit_of_the_cache_holds_on_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(connection.ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(connection, "find_cluster", lambda address: (None, ""))
    monkeypatch.setenv("RAYTRAIN_CACHE_BYTES", "1000000000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never")
    connect(None)
    settings = asked["runtime_env"]["env_vars"]
    assert settings["RAYTRAIN_CACHE_BYTES"] == "1000000000"
    assert "never" not in settings.values()
