"""Try malformed inputs, and print what came of each kind.

python -m tests.faults.malformed --seed 1 --count 5000
python -m tests.faults.malformed --seed 1 --kind config --number 17
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import tests.conftest  # noqa: F401  (one thread each)
from tests.faults.malformed.run import run, shares, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=5000, help="inputs in all")
    parser.add_argument("--kind", action="append", help="only inputs of this kind, of those that make the count")
    parser.add_argument("--number", type=int, help="only this input of each kind")
    parser.add_argument("--failures", type=Path, default=Path("malformed-failures"), help="folder for those that fail")
    options = parser.parse_args()
    counts = {name: count for name, count in shares(options.count).items() if not options.kind or name in options.kind}
    with tempfile.TemporaryDirectory(prefix="raytrain-malformed-") as scratch:
        tallies = run(Path(scratch) / "all", options.seed, counts, options.failures.resolve(), options.number)
    print(table(tallies))
    for name, tally in tallies.items():
        for number, detail in tally.failures:
            lines = detail.strip().splitlines()
            print(f"{name} {number}: {lines[-1] if lines else detail!r}", file=sys.stderr)
    raise SystemExit(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    main()
