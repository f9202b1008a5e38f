"""Spot watcher: tells Ray that EC2 will take a spot instance, so that the runs on it save and leave in time.

    python -m raytrain.spot
    python -m raytrain.spot --address 10.0.0.5:6379 --rebalance

Run one on each worker node of a cluster on EC2. It asks the instance's metadata service every two seconds; EC2 gives
notice two minutes before it takes an instance. On a machine without that service it says so and ends, and has not
imported Ray: so Ray is imported inside functions here.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import psutil

from raytrain.config.cli import OneLineParser
from raytrain.utils.errors import UserError, run_command

ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
"""Environment variable by which AWS's own tools find the metadata service as well."""
TOKEN_SECONDS = 21600
"""Lifetime of a token: the longest that EC2 allows."""
REQUEST_TIMEOUT_S = 2.0
LONGEST_INTERVAL_S = 5.0
"""Longest time between two polls: no more of EC2's two minutes of notice may be lost before Ray is told."""
TRIES = 3
"""Attempts to reach the metadata service before it counts as missing."""
REQUEST_ERRORS = (OSError, http.client.HTTPException)
"""Failures of a request to the metadata service: no connection, no answer in time, an error status."""
_log = logging.getLogger("raytrain.spot")


@dataclass(frozen=True)
class Notice:
    """A preemption notice: EC2's announcement that the instance will end."""

    what: str
    at: str
    """The time that it gives, as EC2 writes it; empty if it gives none."""
    certain: bool
    """True if the instance will be taken, False if it only may be."""

    def __str__(self) -> str:
        return f"{self.what} at {self.at}" if self.at else self.what

    def seconds_left(self, now: datetime) -> float | None:
        """Return the seconds until the instance is taken; ``None`` if it only may be, or if the time is unreadable."""
        try:
            at = datetime.fromisoformat(self.at)
        except ValueError:
            return None
        return max(1.0, (at - now).total_seconds()) if self.certain and at.tzinfo is not None else None


class Metadata:
    """Client of the instance metadata service, version 2, in which every request carries a token."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._token: str | None = None
        # the service answers only the instance itself, so never use a proxy
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def notice(self) -> Notice | None:
        """Return the notice of the instance's end, or else the recommendation to leave it; ``None`` if there is none.

        Raises:
            OSError, http.client.HTTPException: the service does not answer, or answers with an error.
        """
        if (found := self._read_object("spot/instance-action")) is not None:
            return Notice(f"EC2 will {found.get('action', 'take')} this instance", str(found.get("time", "")), True)
        if (found := self._read_object("events/recommendations/rebalance")) is not None:
            return Notice("EC2 may soon take this instance, noticed", str(found.get("noticeTime", "")), False)
        return None

    def check(self) -> None:
        """Get a token.

        Raises:
            OSError, http.client.HTTPException: as for ``notice``.
        """
        self._token = self._request("PUT", "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)})

    def _read_object(self, path: str) -> dict[str, object] | None:
        text = self._read(f"meta-data/{path}")
        if text is None:
            return None
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise http.client.HTTPException(f"{path} is no JSON object")
        return value

    def _read(self, path: str) -> str | None:
        """Return the text at ``path``; ``None`` if there is none."""
        if self._token is None:
            self.check()
        for last in (False, True):
            try:
                return self._request("GET", path, {"X-aws-ec2-metadata-token": str(self._token)})
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or last:
                    raise
                self.check()  # the token has expired
        raise AssertionError("the second answer ends it")

    def _request(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(f"{self.endpoint}/latest/{path}", method=method, headers=headers)
        with self._opener.open(request, timeout=REQUEST_TIMEOUT_S) as answer:
            return str(answer.read(1 << 16).decode(errors="replace"))


class Watcher:
    """State of the watch: passes each notice on once, and logs each change once."""

    def __init__(self, metadata: Metadata, rebalance: bool, drain: Callable[[Notice], None]) -> None:
        """``drain`` tells Ray; if it raises one of ``passing_ray_errors``, it is called again at the next poll."""
        self._metadata = metadata
        self._rebalance = rebalance
        self._drain = drain
        self._seen: Notice | None = None
        self._drained: Notice | None = None
        self._errors: dict[str, str] = {}

    def look(self) -> None:
        """Poll the metadata service once; drain the node if there is a new notice."""
        try:
            notice = self._metadata.notice()
        except REQUEST_ERRORS as error:
            # the last answer stands: a notice is obeyed even if the service no longer answers
            self._log_change("the metadata service", f"does not answer: {error}")
            notice = self._seen
        else:
            self._log_change("the metadata service", "")
            if notice != self._seen:
                _log.warning("%s", notice if notice is not None else "EC2 has taken its notice back")
            self._seen = notice
        if notice is None or notice == self._drained or not (notice.certain or self._rebalance):
            return
        try:
            self._drain(notice)
        except passing_ray_errors() as error:
            self._log_change("Ray", f"cannot be told yet: {error}")
        else:
            self._drained = notice

    def _log_change(self, who: str, error_text: str) -> None:
        """Log an error if it has changed, and when it is over; an empty text means no error."""
        if error_text != self._errors.get(who, ""):
            _log.warning("%s %s", who, " ".join(error_text.split()) or "answers again")
        self._errors[who] = error_text


def passing_ray_errors() -> tuple[type[Exception], ...]:
    """Return Ray's transient errors: it is not up yet or away for a while, or the node has not joined yet."""
    from ray.exceptions import RayError

    return (RayError, ConnectionError, LookupError)


def main() -> None:
    """Watch until the instance is taken."""
    options = read_options()
    logging.basicConfig(format="%(asctime)s raytrain.spot: %(message)s", level=logging.INFO)
    metadata = Metadata(os.environ.get(ENDPOINT) or "http://169.254.169.254")
    if not has_metadata_service(metadata, options.interval):
        return

    def drain_own(notice: Notice) -> None:
        from raytrain.cluster.draining import drain

        left = notice.seconds_left(datetime.now(UTC))
        seconds = options.deadline if left is None else min(options.deadline, left)
        for node in own_nodes(options.address, options.node_id):
            drain(options.address, node, str(notice), seconds)
            _log.warning("node %s is drained: its work has %.0f s to save and leave", node, seconds)

    try:
        _log.info("watching node %s for a preemption notice", ", ".join(own_nodes(options.address, options.node_id)))
    except passing_ray_errors() as error:
        _log.warning("watching, though Ray does not know this node yet: %s", " ".join(str(error).split()))
    watcher = Watcher(metadata, options.rebalance, drain_own)
    while True:
        watcher.look()
        time.sleep(options.interval)


def read_options() -> argparse.Namespace:
    """Return the options of the command line.

    Raises:
        UserError: one of them is out of range.
    """
    description = "Tell Ray that EC2 will take this spot instance."
    parser = OneLineParser(prog="python -m raytrain.spot", description=description)
    parser.add_argument("--address", help="the cluster, as HOST:PORT; default: the one that runs here")
    parser.add_argument("--node-id", help="Ray's id of this node; default: that of each node on this host")
    parser.add_argument("--deadline", type=float, default=25.0, help="seconds that runs have to save and leave")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two requests, at most 5")
    parser.add_argument("--rebalance", action="store_true", help="leave already on EC2's rebalance recommendation")
    options = parser.parse_args(sys.argv[1:])
    if not 0 < options.interval <= LONGEST_INTERVAL_S:
        raise UserError(f"--interval is {options.interval:g}: must be above 0 and at most {LONGEST_INTERVAL_S:g}")
    if not 0 < options.deadline <= 120:
        raise UserError(f"--deadline is {options.deadline:g}: must be above 0 and at most 120, EC2's notice")
    return options


def has_metadata_service(metadata: Metadata, pause: float) -> bool:
    """Return whether EC2's metadata service is there; log the reason if not."""
    reason: object = None
    for _ in range(TRIES):
        try:
            metadata.check()
            return True
        except urllib.error.HTTPError as error:
            if error.code not in (404, 405, 501):
                return True  # a transient error
            reason = error  # the metadata service of another cloud
            break
        except REQUEST_ERRORS as error:
            reason = error
            time.sleep(pause)
    _log.info("nothing to watch: no EC2 metadata service at %s (%s)", metadata.endpoint, reason)
    return False


def own_nodes(address: str | None, node_id: str | None) -> list[str]:
    """Return the ids of the nodes on this host: ``node_id`` if it is in the cluster, or all at this host's addresses.

    Raises:
        ConnectionError, ray.exceptions.RayError: no cluster answers.
        LookupError: it has no such node.
    """
    from raytrain.cluster.draining import alive_nodes

    nodes = alive_nodes(address)
    if node_id is not None:
        here = [node for node in nodes if node == node_id]
    else:
        families = (socket.AF_INET, socket.AF_INET6)
        own = {entry.address for card in psutil.net_if_addrs().values() for entry in card if entry.family in families}
        here = sorted(node for node, location in nodes.items() if location in own)
    if not here:
        raise LookupError(f"the cluster has no node {node_id or 'on this host'} among its {len(nodes)}")
    return here


if __name__ == "__main__":
    run_command(main)
