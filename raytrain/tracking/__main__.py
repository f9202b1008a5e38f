"""Send metrics that a run could not send, or serve MLflow on the head of a cluster.

    python -m raytrain.tracking send runs/NAME/unsent.jsonl
    python -m raytrain.tracking serve --host 10.0.0.5 --storage s3://bucket/prefix

For ``send``, the store is ``MLFLOW_TRACKING_URI`` or, without it, ``mlflow.db`` in the working directory. What it
already has is not sent twice. ``serve`` runs until SIGTERM: docs/guides/cluster.md.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

from raytrain.config.cli import OneLineParser
from raytrain.tracking.client import check_tracking, connect, explain, retry_tracking, shown, tracking_uri
from raytrain.tracking.metric_writer import MetricWriter
from raytrain.utils.errors import UserError, run_command
from raytrain.utils.validation import parse_json


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m raytrain.tracking", description="Send metrics, or serve MLflow.")
    commands = parser.add_subparsers(dest="command", required=True)
    send_parser = commands.add_parser("send", help="send a file that a run left behind")
    send_parser.add_argument("file", type=Path, help="the .jsonl file that the run named when it ended")
    send_parser.add_argument("--timeout", type=float, default=120.0, help="seconds to try for, for each run")
    serve_parser = commands.add_parser("serve", help="run an MLflow server whose database outlives the machine")
    serve_parser.add_argument("--host", default="127.0.0.1", help="private address to listen on, beside 127.0.0.1")
    serve_parser.add_argument("--port", type=int, default=5000)
    serve_parser.add_argument("--folder", type=Path, default=Path("mlflow"), help="where the sqlite file is")
    serve_parser.add_argument("--storage", help="what keeps artifacts and the database's copy; $RAYTRAIN_STORAGE")
    serve_parser.add_argument("--interval", type=float, default=60.0, help="seconds between copies of the database")
    options = parser.parse_args(arguments)
    if options.command == "serve":
        _serve(options)
    else:
        _send_file(options)


def _serve(options: argparse.Namespace) -> None:
    from raytrain.storage import open_storage_root
    from raytrain.tracking.server import serve

    if not 1 <= options.interval < math.inf:
        raise UserError(f"--interval is {options.interval:g}: give seconds of at least 1")
    if not 0 < options.port < 2**16:
        raise UserError(f"--port is {options.port}: give one from 1 to {2**16 - 1}")
    logging.basicConfig(format="%(asctime)s raytrain.tracking: %(message)s")
    logging.getLogger("raytrain.tracking").setLevel(logging.INFO)
    serve(options.host, options.port, options.folder, open_storage_root(options.storage), options.interval)


def _send_file(options: argparse.Namespace) -> None:
    if not 0 <= options.timeout < math.inf:
        raise UserError(f"--timeout is {options.timeout}: give seconds of at least 0")
    records = _read(options.file)
    uri = tracking_uri()
    check_tracking(uri)
    for run_id, entries in records.items():
        _send(uri, run_id, entries, options.timeout)
        print(f"sent {len(entries)} records of run {run_id} to {shown(uri)}")


def _read(path: Path) -> dict[str, list[list[Any]]]:
    """Records by run id, in the file's order."""
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


def _send(uri: str, run_id: str, records: list[list[Any]], timeout_s: float) -> None:
    from mlflow.exceptions import MlflowException

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


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
