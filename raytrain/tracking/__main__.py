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
import sys
from pathlib import Path

from raytrain.config.cli import OneLineParser
from raytrain.utils.errors import UserError, run_command
from raytrain.utils.files import local_path


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
    folder = local_path(options.folder, "--folder")
    serve(options.host, options.port, folder, open_storage_root(options.storage), options.interval)


def _send_file(options: argparse.Namespace) -> None:
    if not 0 <= options.timeout < math.inf:
        raise UserError(f"--timeout is {options.timeout}: give seconds of at least 0")

    from raytrain.tracking.unsent import send_file

    for line in send_file(options.file, options.timeout):
        print(line)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
