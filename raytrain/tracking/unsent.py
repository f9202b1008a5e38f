"""Unsent records of a run, its metrics and its end: the file that holds them, read and sent afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from raytrain.tracking.client import (
    TRACKING_ERRORS,
    check_tracking,
    connect,
    explain,
    patience,
    retry_tracking,
    shown,
    tracking_uri,
)
from raytrain.tracking.metric_writer import MetricWriter, parse_record
from raytrain.tracking.outbox import SAMPLES, send_record
from raytrain.tracking.runs import Status
from raytrain.utils.errors import UserError
from raytrain.utils.files import expanded
from raytrain.utils.validation import parse_json, validate_type


def send_file(path: Path, timeout_s: float) -> Iterator[str]:
    """Send the records in ``path`` run by run; yield a line of text for each run.

    Raises:
        UserError: the file cannot be read, the tracking store cannot be used, or it did not accept everything in time.
    """
    records = read_file(path)
    uri = tracking_uri()
    check_tracking(uri)
    for run_id, entries in records.items():
        send(uri, run_id, entries, timeout_s)
        yield f"sent {len(entries)} records of run {run_id} to {shown(uri)}"


def read_file(path: Path) -> dict[str, list[Any]]:
    """Return the records by run id, in the file's order: lists from ``MetricWriter``, dictionaries from an ``Outbox``.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        lines = expanded(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return parse_lines(lines, str(path))


def parse_lines(lines: list[str], path: str) -> dict[str, list[Any]]:
    """Return the records of a file's lines by run id.

    Raises:
        UserError: a line is something else; the message calls the file ``path``.
    """
    records: dict[str, list[Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = validate_type(parse_json(line), dict[str, Any], "it")
            run_id = validate_type(entry.get("run_id"), str, "run_id")
            if not re.fullmatch("[0-9a-f]{32}", run_id):
                raise ValueError("no run")
            records.setdefault(run_id, []).append(parse_entry(entry))
        except ValueError:
            raise UserError(f"{path}, line {number}: not a record that raytrain wrote") from None
    return records


def parse_entry(entry: dict[str, Any]) -> list[Any] | dict[str, Any]:
    """Return the record on a line, from a ``MetricWriter`` or an ``Outbox``.

    Raises:
        ValueError: it is neither.
    """
    if "metrics" in entry:
        return list(parse_record([entry.get(name) for name in ("step", "timestamp_ms", "metrics")]))
    kinds: dict[str, Any] = {"run_id": str, "text": str, "name": str}
    if "text" not in entry:
        kinds = {"run_id": str, "status": Status, "reason": str | None, "ended_ms": int}
    if entry.keys() != kinds.keys():
        raise ValueError("other keys than a record has")
    record = {name: validate_type(entry[name], kind, name) for name, kind in kinds.items()}
    if record.get("ended_ms", 0) < 0 or not re.fullmatch(r"\w[\w.-]*", record.get("name", SAMPLES)):
        raise ValueError("a time or a name that raytrain does not write")
    return record


def send(uri: str, run_id: str, records: list[Any], timeout_s: float) -> None:
    try:
        retry_tracking(lambda: connect(uri).get_run(run_id), timeout_s)
    except MlflowException as error:  # the writer would retry for ever
        raise UserError(f"no records of run {run_id} were sent to {shown(uri)}: {explain(error)}") from None
    writer = MetricWriter(uri, run_id)
    others = [record for record in records if isinstance(record, dict)]
    try:
        writer.replay(record for record in records if not isinstance(record, dict))
    except ValueError as error:
        raise UserError(f"run {run_id}: {error}") from None
    if num_unsent := writer.close(timeout_s):
        raise UserError(f"{num_unsent} records of run {run_id} were not sent to {shown(uri)}: {writer.error}")
    try:
        with patience(timeout_s):
            for record in others:
                send_record(uri, record)
    except TRACKING_ERRORS as error:
        raise UserError(f"how run {run_id} ended was not sent to {shown(uri)}: {explain(error)}") from None
