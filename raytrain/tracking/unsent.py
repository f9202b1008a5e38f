"""Metrics that a run could not send: its file of them, read and sent to MLflow afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from raytrain.tracking.client import check_tracking, connect, explain, retry_tracking, shown, tracking_uri
from raytrain.tracking.metric_writer import MetricWriter
from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json


def send_file(path: Path, timeout_s: float) -> Iterator[str]:
    """Send the metrics in ``path`` run by run; yield a line of text for each run that has them.

    Raises:
        UserError: the file cannot be read, the tracking store cannot be used, or it has not taken all in time.
    """
    records = read_file(path)
    uri = tracking_uri()
    check_tracking(uri)
    for run_id, entries in records.items():
        send(uri, run_id, entries, timeout_s)
        yield f"sent {len(entries)} records of run {run_id} to {shown(uri)}"


def read_file(path: Path) -> dict[str, list[list[Any]]]:
    """Return the records by run id, in the file's order.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    records: dict[str, list[list[Any]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line)
            metrics = {str(key): float(value) for key, value in entry["metrics"].items()}
            record = [entry["step"], entry["timestamp_ms"], metrics]
            if not all(type(value) is int and 0 <= value < 2**63 for value in record[:2]):
                raise ValueError("no step or time that a store can hold")
            if not re.fullmatch("[0-9a-f]{32}", entry["run_id"]):
                raise ValueError("no run")
            records.setdefault(entry["run_id"], []).append(record)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise UserError(f"{path}, line {number}: not a metric record that raytrain wrote") from None
    return records


def send(uri: str, run_id: str, records: list[list[Any]], timeout_s: float) -> None:
    try:
        retry_tracking(lambda: connect(uri).get_run(run_id), timeout_s)
    except MlflowException as error:  # the writer would retry for ever
        raise UserError(f"no records of run {run_id} were sent to {shown(uri)}: {explain(error)}") from None
    writer = MetricWriter(uri, run_id)
    try:
        writer.replay(records)
    except ValueError as error:
        raise UserError(f"run {run_id}: {error}") from None
    if num_unsent := writer.close(timeout_s):
        raise UserError(f"{num_unsent} records of run {run_id} were not sent to {shown(uri)}: {writer.error}")
