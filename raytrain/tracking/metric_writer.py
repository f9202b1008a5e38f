"""The single writer of a run's metrics: never blocks a step, loses nothing, and sends nothing twice."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from raytrain.tracking.client import LOG, connect, explain, is_deleted, shown

MAX_BATCH = 1000
"""Most metrics that MLflow accepts in one request."""
MAX_PAUSE_S = 10.0
"""Longest pause between two attempts while the store is unavailable."""
SILENCE_S = 30.0
"""A writer that could not send for this long may have been presumed dead and replaced by another writer of the run."""
CAUTION_S = 120.0
"""For this long after a restart, the previous writer may still be alive: unreachable, but not yet ended."""
_KEY = re.compile(r"[/\w.\- :]{1,250}")
_Entry = tuple[int, int, dict[str, float]]
"""Step, timestamp in milliseconds, metrics."""


class MetricWriter:
    """Sends the metrics of one run from a background thread.

    The steps of each metric must increase. A step at or below the last one in the store is a repetition after a restart
    and is dropped. A record is sent with the same timestamp on every attempt, so MLflow absorbs the repetition. As long
    as each checkpoint keeps ``pending()`` and a resumed run passes it to ``replay``, a metric therefore has one value
    per step, whatever is killed when. That also holds if a writer that was presumed dead comes back. While there may be
    two writers, each checks what the store has before it sends. Once somebody has deleted the run in MLflow, everything
    is dropped, and that is logged once.

    Attributes:
        seconds_logging: time spent inside ``log`` so far.
        error: error of the store's last refusal; ``None`` while all is well.
    """

    def __init__(self, uri: str, run_id: str, *, interval_s: float = 5.0) -> None:
        """Start the thread; it contacts the store only when records wait, about every ``interval_s``."""
        self.run_id = run_id
        self.seconds_logging = 0.0
        self.error: str | None = None
        self._uri = uri
        self._interval_s = interval_s
        self._queue: deque[_Entry] = deque()
        self._keys: set[str] = set()
        self._last_step: dict[str, int] | None = None
        self._looked_until = math.inf
        """Time after which the previous writer of a restarted run must have ended; infinite before the first check."""
        self._last_answer = -math.inf
        self._num_queued = 0
        self._num_sent = 0
        self._closing = False
        self._abandoned = False
        self._deleted = False
        self._wake = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._send_until_closed, name="raytrain-metrics", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float], timestamp_ms: int | None = None) -> None:
        """Queue the ``metrics`` of ``step``; takes microseconds. NaN and infinities are allowed.

        Raises:
            ValueError: a name that MLflow does not allow.
        """
        start = time.perf_counter()
        if not self._keys.issuperset(metrics):
            self._learn_keys(metrics)
        values = {key: float(value) for key, value in metrics.items()}
        self._append((step, timestamp_ms if timestamp_ms is not None else time.time_ns() // 1_000_000, values))
        self.seconds_logging += time.perf_counter() - start

    def pending(self) -> list[list[Any]]:
        """Return the records not confirmed by the store, oldest first, ready for JSON; a checkpoint keeps them."""
        with self._changed:
            entries = list(self._queue)
        return [
            [step, timestamp_ms, {key: value if math.isfinite(value) else str(value) for key, value in metrics.items()}]
            for step, timestamp_ms, metrics in entries
        ]

    def replay(self, records: Iterable[Sequence[Any]]) -> None:
        """Queue the records that ``pending`` returned before a restart; call it before the first ``log``.

        Raises:
            ValueError: a record is not one that ``pending`` returns, or has a metric name that MLflow does not allow.
        """
        for record in records:
            entry = parse_record(record)
            self._learn_keys(entry[2])
            self._append(entry)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything logged so far is in the store; return False if that takes longer than ``timeout_s``."""
        with self._changed:
            target = self._num_queued
            self._wake.set()
            return self._changed.wait_for(lambda: self._num_sent >= target, timeout_s)

    def close(self, timeout_s: float = 30.0, unsent: Path | None = None) -> int:
        """Send what waits, for at most ``timeout_s``, end the thread, and return the number of unsent records.

        A record is one call of ``log``. Unsent records are written to ``unsent``, one JSON object per line, for
        ``python -m raytrain.tracking send``.
        """
        self._closing = True
        if self.flush(timeout_s):
            self._thread.join(timeout_s)
            return 0
        self._abandoned = True
        self._wake.set()
        records = self.pending()
        if unsent is not None:
            unsent.parent.mkdir(parents=True, exist_ok=True)
            lines = (
                json.dumps({"run_id": self.run_id, "step": step, "timestamp_ms": timestamp_ms, "metrics": metrics})
                for step, timestamp_ms, metrics in records
            )
            unsent.write_text("".join(line + "\n" for line in lines), "utf-8")
            LOG.error(
                "%d metric records of run %s were not sent: %s. They are in %s; send them with "
                "`python -m raytrain.tracking send %s`",
                *(len(records), self.run_id, self.error or "no answer in time", unsent, unsent),
            )
        return len(records)

    # ------------------------------------------------------------------------------- the background thread

    def _drop_all(self) -> None:
        """Drop all waiting and future records: somebody has deleted the run, so nobody wants them."""
        with self._changed:
            self._deleted = True
            self._queue.clear()
            self._num_sent = self._num_queued
            self._changed.notify_all()
        LOG.warning("the MLflow run %s has been deleted: nothing more of it is recorded", self.run_id)

    def _append(self, entry: _Entry) -> None:
        with self._changed:
            if self._deleted:
                return
            self._queue.append(entry)
            self._num_queued += 1

    def _learn_keys(self, metrics: dict[str, float]) -> None:
        # A name that the store refuses would block everything after it, for ever.
        for key in metrics:
            if not _KEY.fullmatch(key):
                raise ValueError(f"metric name {key!r}: use letters, digits, _ - . : / and spaces, at most 250")
        self._keys.update(metrics)

    def _send_until_closed(self) -> None:
        # Trials that start together, or that one failure stopped together, must get out of step: an mlflow server
        # that receives many requests at one moment can hang (docs/guides/mlflow.md). This does not use the global
        # generator, which may be seeded.
        chance = random.Random()
        pause = self._interval_s
        while not self._abandoned and not (self._closing and not self._queue):
            self._wake.wait(pause * chance.uniform(0.5, 1.5))
            self._wake.clear()
            try:
                self._send_waiting()
            except (MlflowException, SQLAlchemyError, OSError) as error:
                if is_deleted(self._uri, self.run_id, error):
                    self._drop_all()
                    return
                self._report(explain(error))
                pause = min(2 * max(pause, 0.5), MAX_PAUSE_S)
            else:
                self._report(None)
                pause = self._interval_s

    def _send_waiting(self) -> None:
        while entries := self._first_entries():
            client = connect(self._uri)
            now = time.monotonic()
            if self._last_step is None or now < self._looked_until or now > self._last_answer + SILENCE_S:
                # The run comes with the latest value of each metric, so the cost does not grow with the history;
                # to_proto is the public form that keeps the steps.
                latest = client.get_run(self.run_id).data.to_proto().metrics
                self._last_step = {metric.key: metric.step for metric in latest}
                if self._looked_until == math.inf:
                    self._looked_until = now + CAUTION_S if latest else now
            metrics, last_step = _new_metrics(entries, self._last_step)
            client.log_batch(self.run_id, metrics=metrics)  # splits an entry wider than MAX_BATCH by itself
            self._last_step, self._last_answer = last_step, time.monotonic()
            with self._changed:
                for _ in entries:
                    self._queue.popleft()
                self._num_sent += len(entries)
                self._changed.notify_all()

    def _first_entries(self) -> list[_Entry]:
        """Return the oldest entries that fit one request, at least one if any waits; they stay in the queue."""
        with self._changed:
            oldest = list(itertools.islice(self._queue, MAX_BATCH))
        sizes = itertools.accumulate(len(metrics) for _, _, metrics in oldest)
        num_fitting = sum(1 for size in sizes if size <= MAX_BATCH)
        return oldest[: max(1, num_fitting)]

    def _report(self, error: str | None) -> None:
        """Log once that the store is unavailable, and once that it is back."""
        if (error is None) != (self.error is None):
            message = (
                f"takes no metrics now ({error}); they are kept and sent later" if error else "takes metrics again"
            )
            LOG.log(logging.WARNING if error else logging.INFO, "MLflow at %s %s", shown(self._uri), message)
        self.error = error


def parse_record(record: Any) -> _Entry:
    """Return step, timestamp and metrics of a record that ``MetricWriter.pending`` returned.

    Raises:
        ValueError: it is not such a record.
    """
    if not isinstance(record, (list, tuple)) or len(record) != 3:
        raise ValueError("a record has three parts: step, timestamp_ms and metrics")
    step, timestamp_ms, metrics = record
    for name, value in (("step", step), ("timestamp_ms", timestamp_ms)):
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"{name} is not an integer that a store can hold")
    if not isinstance(metrics, dict):
        raise ValueError("metrics is not an object")
    for key, value in metrics.items():
        # ``pending`` writes values that JSON cannot hold as text
        if type(value) not in (int, float) and value not in ("nan", "inf", "-inf"):
            raise ValueError(f"metric {key!r} is not a number")
    # via text, since an integer may be too large for a float
    return step, timestamp_ms, {key: float(str(value)) for key, value in metrics.items()}


def _new_metrics(entries: list[_Entry], last_step: dict[str, int]) -> tuple[list[Metric], dict[str, int]]:
    """Return the metrics of ``entries`` after ``last_step``, and the last steps once these have been sent."""
    last_step = dict(last_step)
    metrics = []
    for step, timestamp_ms, values in entries:
        for key, value in values.items():
            if step > last_step.get(key, -1):
                metrics.append(Metric(key, value, timestamp_ms, step))
                last_step[key] = step
    return metrics, last_step
