"""Look for mistakes in a cluster file.

    python -m raytrain.cluster check cluster.yaml

Asks neither AWS nor any other machine, and takes a second. Each mistake is one line with the field, what is wrong
and how to fix it; all that are found are printed, and the exit status is 2.
"""

from __future__ import annotations

import sys
from pathlib import Path

from raytrain.cluster.check import check, summary
from raytrain.cluster.check.file import read_file
from raytrain.config.cli import OneLineParser
from raytrain.utils.errors import run_command


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m raytrain.cluster", description="Look for mistakes in a cluster file.")
    commands = parser.add_subparsers(dest="command", required=True)
    check_parser = commands.add_parser("check", help="look for mistakes, without asking any machine")
    check_parser.add_argument("file", type=Path, help="what ray up will be given, from the same folder")
    options = parser.parse_args(arguments)
    file = read_file(options.file)
    if mistakes := check(file):
        for mistake in mistakes:
            print(f"error: {' '.join(mistake.split())}", file=sys.stderr)
        raise SystemExit(2)
    print(summary(file))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
