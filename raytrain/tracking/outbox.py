"""The outbox of a driver: how runs have ended, sent to MLflow in the background and kept while it is away."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from raytrain.tracking.client import (
    LOG,
    TRACKING_ERRORS,
    connect,
    explain,
    is_deleted,
    is_transient,
    patience,
    retry_tracking,
)
from raytrain.tracking.runs import REASON, Run, Status
from raytrain.utils.text import one_line

SAMPLES = "samples.txt"
"""Artifact of runs: texts that the model writes, one a line."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
"""Pauses between attempts while MLflow is away."""


class Outbox:
    """Sends what is said of runs in its order, from a background thread; the driver never waits for MLflow.

    What MLflow does not take before ``close`` is handed back, as records for ``tracking send``. What is said of a run
    that somebody has deleted is dropped.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._queue: deque[dict[str, Any]] = deque()
        self._description: dict[str, Any] | None = None
        """The newest description that waits; it is sent after all else."""
        self._refused: list[dict[str, Any]] = []
        self._closing = self._abandoned = self._away = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._send_until_closed, name="raytrain-outbox", daemon=True)
        self._thread.start()

    def end(self, run_id: str, status: Status, reason: str | None = None, ended_at: float | None = None) -> None:
        """Say that a run has ended (now, or at a Unix time), and why if it did not reach its end."""
        ended_ms = int(1000 * (time.time() if ended_at is None else ended_at))
        self.put({"run_id": run_id, "status": status, "reason": reason, "ended_ms": ended_ms})

    def log_samples(self, run_id: str, samples: list[str]) -> None:
        """Store texts that the model of a run writes as an artifact of it."""
        self.put({"run_id": run_id, "text": "".join(one_line(text) + "\n" for text in samples), "name": SAMPLES})

    def describe(self, run_id: str, markdown: str) -> None:
        """Set the description of a run as it is for now. One that still waits is replaced, and none is handed back."""
        with self._changed:
            self._description = {"run_id": run_id, "description": markdown}
            self._changed.notify_all()

    def put(self, record: dict[str, Any]) -> None:
        """Queue a record that ``close`` gave."""
        with self._changed:
            self._queue.append(record)
            self._changed.notify_all()

    def close(self, timeout_s: float) -> list[dict[str, Any]]:
        """Send what waits, for at most ``timeout_s``; return the records that were not sent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
            return [*self._refused, *self._queue]

    def _send_until_closed(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._description or self._closing)
                record = self._queue[0] if self._queue else self._description
                if self._abandoned or record is None:
                    return
            sent = self._sent(record)
            with self._changed:
                # nobody waits at the end for what was only so meanwhile
                if record is self._description and (sent or self._closing):
                    self._description = None
                elif sent and "description" not in record and not self._abandoned:
                    self._queue.popleft()
            if sent:
                pause = FIRST_PAUSE_S
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._abandoned or (self._closing and not self._queue), pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _sent(self, record: dict[str, Any]) -> bool:
        """Send a record; return whether it is done with. Say once that MLflow has gone."""
        try:
            with patience(0):
                send_record(self._uri, record)
        except TRACKING_ERRORS as error:
            if "description" in record and not is_transient(error):
                LOG.info("MLflow refuses the description of run %s: %s", record["run_id"], explain(error))
            elif is_deleted(self._uri, record["run_id"], error):
                LOG.warning("the MLflow run %s has been deleted: its end is not recorded", record["run_id"])
            elif is_transient(error):
                if not self._away:
                    LOG.warning("MLflow cannot be used now (%s); ends of runs are kept and sent later", explain(error))
                self._away = True
                return False
            else:
                LOG.error("MLflow refuses the end of run %s: %s", record["run_id"], explain(error))
                self._refused.append(record)
        self._away = False
        return True


def send_record(uri: str, record: dict[str, Any]) -> None:
    """Say to MLflow what a record of an outbox says."""
    run = Run(uri, "", record["run_id"], 0)
    if "description" in record:
        run.describe(record["description"])
        return
    if "status" not in record:
        run.log_text(record["text"], record["name"])
        return
    if record["reason"] is not None:
        run.set_tags({REASON: record["reason"]})
    retry_tracking(lambda: connect(uri).set_terminated(run.run_id, record["status"], record["ended_ms"]))
