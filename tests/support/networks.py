"""Local servers that speak as the API of X and Bluesky's Jetstream do, and fail when they are told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "AAAAsecret%2Ftoken"


class XServer:
    """Answers recent searches with its posts, the newest first, as X does."""

    def __init__(self, num_posts: int) -> None:
        self.posts = [
            {
                "id": str(1_800_000_000_000_000_000 + number),
                "text": f"post {number} &amp; more é",
                "author_id": str(number % 7),
                "lang": "en",
                "edit_history_tweet_ids": [str(1_800_000_000_000_000_000 + number)],
            }
            for number in reversed(range(num_posts))
        ]
        self.queries: list[dict[str, str]] = []
        """Parameters of each search that was answered with posts."""
        self.answers: list[Callable[[Any], tuple[int, dict[str, str], Any]]] = []
        """What is answered to the next requests instead: status, headers and JSON, given their headers."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, headers: Any) -> tuple[int, dict[str, str], Any]:
        if self.answers:
            return self.answers.pop(0)(headers)
        if headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {}, {"title": "Unauthorized", "status": 401, "detail": "Unauthorized"}
        parts = urlsplit(path)
        if parts.path != "/2/tweets/search/recent":
            return 404, {}, {"title": "Not Found"}
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        size = int(query["max_results"])
        if not 10 <= size <= 100:
            return 400, {}, {"errors": [{"message": "max_results must be between 10 and 100"}], "title": "Invalid"}
        self.queries.append(query)
        below = int(query.get("until_id", 1 << 63))
        page = [post for post in self.posts if int(post["id"]) < below][:size]
        if not page:
            return 200, {}, {"meta": {"result_count": 0}}
        wanted = {"id", "text", *query["tweet.fields"].split(",")}
        found: dict[str, Any] = {
            "data": [{name: value for name, value in post.items() if name in wanted} for post in page],
            "meta": {"result_count": len(page), "newest_id": page[0]["id"], "oldest_id": page[-1]["id"]},
        }
        if query.get("expansions") == "author_id":
            fields = query["user.fields"].split(",")
            values = {"description": "bio of", "username": "user"}
            found["includes"] = {
                "users": [
                    {"id": author, "name": "n"} | {name: f"{values[name]} {author}" for name in fields}
                    for author in sorted({post["author_id"] for post in page})
                ]
            }
        return 200, {}, found

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, values = outer.answer(self.path, self.headers)
                body = json.dumps(values).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def event(number: int, collection: str = "app.bsky.feed.post", operation: str = "create") -> dict[str, Any]:
    """An event of Jetstream, version 1."""
    record = {"$type": collection, "createdAt": "2026-11-29T00:00:00Z"}
    record |= (
        {"text": f"post {number} 🦋", "langs": ["en"]} if "post" in collection else {"description": f"bio {number}"}
    )
    commit = {"rev": f"r{number}", "operation": operation, "collection": collection, "rkey": f"k{number}", "cid": "c"}
    if operation != "delete":
        commit["record"] = record
    return {"did": f"did:plc:{number % 7}", "time_us": 1_000_000 + number, "kind": "commit", "commit": commit}


class Jetstream:
    """Sends its events from the cursor on, that one included, then waits for more."""

    def __init__(self, events: list[dict[str, Any] | str], *, breaks_after: int | None = None) -> None:
        from websockets.sync.server import serve

        self.events = events
        self.breaks_after = breaks_after
        """Messages after which each connection is closed."""
        self.queries: list[dict[str, list[str]]] = []
        self.status = 101
        """Answered to a request for a connection, if it is another one."""
        self._closed = threading.Event()
        self._server = serve(self._send, "127.0.0.1", 0, process_request=self._refuse)
        self.uri = f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}/subscribe"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()

    def _refuse(self, connection: Any, request: Any) -> Any:
        return None if self.status == 101 else connection.respond(self.status, "no\n")

    def _send(self, connection: Any) -> None:
        query = parse_qs(urlsplit(connection.request.path).query)
        self.queries.append(query)
        cursor = int(query.get("cursor", ["0"])[0])
        wanted = query["wantedCollections"]
        sent = 0
        for each in self.events:
            if isinstance(each, dict) and each["time_us"] < cursor:
                continue
            if isinstance(each, dict) and each["kind"] == "commit" and each["commit"]["collection"] not in wanted:
                continue
            connection.send(each if isinstance(each, str) else json.dumps(each))
            sent += 1
            if sent == self.breaks_after:
                return
        while not self._closed.is_set():
            time.sleep(0.01)
