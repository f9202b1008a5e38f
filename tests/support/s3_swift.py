"""OpenStack Swift with its S3 interface, in one process: what ``s3_server`` runs in a virtual environment of its own.

``python s3_swift.py FOLDER PORT REGION`` serves on 127.0.0.1 and keeps everything below FOLDER: started again, the data
is back. It prints one line when it is ready. Needs a file system with user extended attributes.
"""

from __future__ import annotations

import copy
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

USERS = {
    "test_writer": "writer-secret-7f3a .admin",
    "test_reader": "reader-secret-51bd .reseller_reader",
    "other_owner": "owner-secret-c09e .admin",
}
"""Account and user -> secret and role. The access key of ``test_writer`` is ``test:writer``."""

REGION = "us-east-1"

_DEFAULTS = """
    [DEFAULT]
    swift_dir = {folder}/etc
    devices = {folder}/devices
    mount_check = false
    disable_fallocate = true
    fallocate_reserve = 0
    log_level = WARNING
    conn_timeout = 10
    node_timeout = 60
    client_timeout = 60
    """

_BACKEND = """
    [pipeline:main]
    pipeline = {name}-server
    [app:{name}-server]
    use = egg:swift#{name}
    """

_PROXY = """
    [pipeline:main]
    pipeline = catch_errors gatekeeper healthcheck tokens guard cache listing_formats bulk s3api tempauth copy slo dlo \
versioned_writes proxy-server
    [app:proxy-server]
    use = egg:swift#proxy
    account_autocreate = true
    error_suppression_limit = 1000000
    [filter:guard]
    paste.filter_factory = s3_swift:guard_factory
    [filter:tokens]
    paste.filter_factory = s3_swift:tokens_factory
    file = {folder}/etc/token
    [filter:cache]
    paste.filter_factory = s3_swift:cache_factory
    [filter:s3api]
    use = egg:swift#s3api
    location = {region}
    [filter:tempauth]
    use = egg:swift#tempauth
    {users}
    [filter:slo]
    use = egg:swift#slo
    rate_limit_after_segment = 10000
    {filters}
    """

_PLAIN_FILTERS = (
    "catch_errors",
    "gatekeeper",
    "healthcheck",
    "listing_formats",
    "bulk",
    "copy",
    "dlo",
    "versioned_writes",
)


class _Cache:
    """What memcached is to Swift, for a proxy that is one process."""

    def __init__(self) -> None:
        self._items: dict[str, tuple[Any, float]] = {}

    def set(self, key: str, value: Any, serialize: bool = True, time: float = 0, **_: Any) -> None:
        self._items[key] = (copy.deepcopy(value), _now() + time if time else float("inf"))

    def get(self, key: str, **_: Any) -> Any:
        value, expires = self._items.get(key, (None, float("inf")))
        return copy.deepcopy(value) if _now() < expires else None

    def incr(self, key: str, delta: int = 1, time: float = 0, **_: Any) -> int:
        count = max(0, int(self.get(key) or 0) + int(delta))
        self.set(key, count, time=time)
        return count

    def delete(self, key: str, **_: Any) -> None:
        self._items.pop(key, None)

    def set_multi(self, values: dict[str, Any], server_key: str, time: float = 0, **_: Any) -> None:
        for key, value in values.items():
            self.set(key, value, time=time)

    def get_multi(self, keys: list[str], server_key: str, **_: Any) -> list[Any]:
        return [self.get(key) for key in keys]


def _now() -> float:
    return time.monotonic()


def cache_factory(_global: dict[str, str], **_local: str) -> Any:
    """Paste filter: gives every request the same cache."""
    cache = _Cache()

    def wrap(app: Any) -> Any:
        def serve(environment: dict[str, Any], start_response: Any) -> Any:
            environment["swift.cache"] = cache
            return app(environment, start_response)

        return serve

    return wrap


def tokens_factory(_global: dict[str, str], **local: str) -> Any:
    """Paste filter: while ``file`` is there, requests with another session token than it holds are of expired keys."""
    file = local["file"]

    def wrap(app: Any) -> Any:
        def serve(environment: dict[str, Any], start_response: Any) -> Any:
            token = environment.get("HTTP_X_AMZ_SECURITY_TOKEN")
            if token is None or not os.path.exists(file) or token == Path(file).read_text():
                return app(environment, start_response)
            environment["wsgi.input"].read()
            body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
            start_response("400 Bad Request", [("Content-Length", str(len(body)))])
            return [b"" if environment["REQUEST_METHOD"] == "HEAD" else body]

        return serve

    return wrap


def guard_factory(_global: dict[str, str], **_local: str) -> Any:
    """Paste filter: one conditional write at a time.

    Swift looks at If-None-Match only before it takes the body, so that of several writers more than one can win.
    """
    from eventlet.semaphore import Semaphore

    turn = Semaphore(1)

    def wrap(app: Any) -> Any:
        def serve(environment: dict[str, Any], start_response: Any) -> Any:
            if environment["REQUEST_METHOD"] == "PUT" and "HTTP_IF_NONE_MATCH" in environment:
                with turn:
                    return [b"".join(app(environment, start_response))]
            return app(environment, start_response)

        return serve

    return wrap


def _write_settings(folder: Path, ports: dict[str, int], region: str) -> None:
    """Write the settings of the four servers and the rings that say where each listens."""
    from swift.common.ring import RingBuilder

    (folder / "etc").mkdir(parents=True, exist_ok=True)
    (folder / "devices" / "disk").mkdir(parents=True, exist_ok=True)
    filters = "".join(f"\n    [filter:{name}]\n    use = egg:swift#{name}" for name in _PLAIN_FILTERS)
    users = "\n    ".join(f"user_{name} = {secret}" for name, secret in USERS.items())
    texts = {
        "swift": "[swift-hash]\nswift_hash_path_suffix = tests\n[storage-policy:0]\nname = plain\ndefault = yes\n",
        "proxy": _DEFAULTS.format(folder=folder)
        + _PROXY.format(folder=folder, region=region, users=users, filters=filters),
    }
    for name in ("account", "container", "object"):
        texts[name] = _DEFAULTS.format(folder=folder) + _BACKEND.format(name=name)
        ring = RingBuilder(part_power=2, replicas=1, min_part_hours=1)
        location = {"ip": "127.0.0.1", "port": ports[name], "device": "disk", "region": 1, "zone": 1, "weight": 1.0}
        ring.add_dev(
            {"id": 0, "replication_ip": location["ip"], "replication_port": location["port"], "meta": "", **location}
        )
        ring.rebalance()
        ring.get_ring().save(str(folder / "etc" / f"{name}.ring.gz"))
    for name, text in texts.items():
        (folder / "etc" / f"{name}.conf").write_text(textwrap.dedent(text))


def main(folder: Path, port: int, region: str) -> None:
    import eventlet
    import eventlet.wsgi

    eventlet.patcher.monkey_patch(all=False, socket=True, select=True, thread=True)
    sys.modules.setdefault("s3_swift", sys.modules["__main__"])
    from swift.common import utils, wsgi
    from swift.common.storage_policy import reload_storage_policies

    names = ("account", "container", "object", "proxy")
    listeners = {name: eventlet.listen(("127.0.0.1", port if name == "proxy" else 0)) for name in names}
    _write_settings(folder, {name: listener.getsockname()[1] for name, listener in listeners.items()}, region)
    utils.set_swift_dir(str(folder / "etc"))
    utils.validate_hash_conf()
    reload_storage_policies()
    for name, listener in listeners.items():
        app = wsgi.loadapp(str(folder / "etc" / f"{name}.conf"), {"log_name": name})
        # S3 clients look for an "ETag" header, which eventlet would rewrite as "Etag".
        eventlet.spawn(
            eventlet.wsgi.server,
            listener,
            app,
            log=wsgi.NullLogger(),
            protocol=wsgi.SwiftHttpProtocol,
            capitalize_response_headers=False,
        )
    print("ready", flush=True)
    # The tests hold the other end of standard input: when they are gone, so is the server.
    eventlet.tpool.execute(os.read, sys.stdin.fileno(), 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3])
