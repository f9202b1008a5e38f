"""Check of a cluster file for ``ray up``.

    python -m raytrain.cluster check cluster.yaml

It asks neither AWS nor any other machine, and takes a second. It prints every mistake as one line: the field, what is
wrong and how to fix it. The exit status is then 2.
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
    check_parser.add_argument("file", type=Path, help="the file for ray up, from the folder where ray up will run")
    options = parser.parse_args(arguments)
    file = read_file(options.file)
    if mistakes := check(file):
        for mistake in mistakes:
            print(f"error: {' '.join(mistake.split())}", file=sys.stderr)
        raise SystemExit(2)
    print(summary(file))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
