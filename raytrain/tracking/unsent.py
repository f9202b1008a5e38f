"""Metrics that a run could not send: its file of them, read and sent to MLflow afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from raytrain.tracking.client import check_tracking, connect, explain, retry_tracking, shown, tracking_uri
from raytrain.tracking.metric_writer import MetricWriter, parse_record
from raytrain.utils.errors import UserError
from raytrain.utils.files import expanded
from raytrain.utils.validation import parse_json, validate_type


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
        lines = expanded(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    records: dict[str, list[list[Any]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = validate_type(parse_json(line), dict[str, Any], "it")
            run_id = validate_type(entry.get("run_id"), str, "run_id")
            if not re.fullmatch("[0-9a-f]{32}", run_id):
                raise ValueError("no run")
            record = parse_record([entry.get(name) for name in ("step", "timestamp_ms", "metrics")])
            records.setdefault(run_id, []).append(list(record))
        except ValueError:
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
