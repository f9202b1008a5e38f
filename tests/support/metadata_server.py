"""A local server that answers as EC2's instance metadata service does, and misbehaves when it is told to."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


class MetadataServer:
    """Gives out tokens, and what is in ``pages`` to those who show one."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.pages: dict[str, dict[str, Any] | str] = {}
        self.status: int | None = None
        """Answered to everything, if set."""
        self.hang_s = 0.0
        self.requests: list[tuple[str, str, int]] = []
        """Method, path and status of each."""
        self._tokens: set[str] = set()
        self._numbers = itertools.count()
        self._server = ThreadingHTTPServer((host, port), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def uri(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def count(self, method: str, path: str, status: int) -> int:
        return self.requests.count((method, path, status))

    def expire(self) -> None:
        """Every token that was given out is worth nothing from now on."""
        self._tokens.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def page(self, path: str, client: str) -> dict[str, Any] | str | None:
        """What is at ``path`` for the client at an address, ``None`` if nothing is."""
        return self.pages.get(path)

    def _answer(self, method: str, path: str, headers: Any, client: str) -> tuple[int, str]:
        time.sleep(self.hang_s)
        if self.status is not None:
            return self.status, ""
        if method == "PUT":
            if path != "/latest/api/token" or not 1 <= int(headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600:
                return 400, ""
            token = f"token-{next(self._numbers)}"
            self._tokens.add(token)
            return 200, token
        if headers.get("X-aws-ec2-metadata-token") not in self._tokens:
            return 401, ""
        page = self.page(path, client)
        return (404, "") if page is None else (200, page if isinstance(page, str) else json.dumps(page))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, text = server._answer(self.command, self.path, self.headers, self.client_address[0])
                server.requests.append((self.command, self.path, status))
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:
                    return  # the client has not waited

            do_PUT = do_GET

            def log_message(self, *arguments: Any) -> None:
                """Not to the tests' output."""

        return Handler


@pytest.fixture
def metadata_server() -> Iterator[MetadataServer]:
    server = MetadataServer()
    yield server
    server.close()
