"""Quality for processor time: runs on one thread each, one after the other, with several seeds.

    python benchmarks/processor_time.py FOLDER --rows benchmarks/ptb_windows.txt --data-path DATA/ptb --output ptb.jsonl

Each line of the file of rows has the arguments of a ``python -m raytrain.train``; an empty one and one that begins with
# are skipped. The same training loop runs without Ray. Time is processor time of the whole process, imports and
evaluations included: it depends less than a clock on what else the machine does, but still on caches that cores share.

FOLDER keeps the checkpoints. What has its result in the output already is not trained again, and what was interrupted
goes on, with its seconds counted. The table has the mean over the seeds and, in brackets, the lowest and the highest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytrain.config.schema import RunConfig, override, to_dict
from raytrain.data.prepare import prepare
from raytrain.train import read_command
from raytrain.utils.text import mean_and_range

COLUMNS = ("bits_per_byte", "kl", "used", "seconds")


def read_rows(file: Path, data_path: str | None) -> dict[str, RunConfig[Any]]:
    """Return the configs of a file of rows, by line."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    located = [] if data_path is None else ["--data-path", data_path]
    return {
        line: read_command([*shlex.split(line), *located], has_gpus=False)[1]
        for line in lines
        if line and not line.startswith("#")
    }


def train(folder: Path, row: str, config: RunConfig[Any]) -> dict[str, Any]:
    """Train a config, or go on with it; return its last evaluation, with the processor time that it took in all."""
    home = folder / hashlib.sha256(f"{row} {config.seed}".encode()).hexdigest()[:12]
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.json").write_text(json.dumps(to_dict(config)))
    corpus = prepare(config.data, path=config.data_path).path
    files = [str(home / "config.json"), "--corpus", str(corpus), "--storage", str(home / "run")]
    command = [sys.executable, "-m", "raytrain.loop", *files]
    spent = home / "seconds.txt"
    earlier = float(spent.read_text()) if spent.exists() else 0.0
    began = seconds_of_children()
    try:
        with (home / "log.txt").open("a") as log:
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)
    finally:
        spent.write_text(str(earlier + seconds_of_children() - began))
    last = json.loads((home / "log.txt").read_text().splitlines()[-1])
    return {"row": row, "seed": config.seed, "seconds": float(spent.read_text()), **last["best"]}


def seconds_of_children() -> float:
    """Return the processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(rows: Sequence[str], results: Sequence[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| row | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in rows:
        found = [result for result in results if result["row"] == row]
        cells = []
        for name in COLUMNS:
            values = [result[name] for result in found if name in result]
            cells.append(mean_and_range(values, 0 if name == "seconds" else 3))
        lines.append(f"| `{row}` | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--data-path", help="where the text of all rows is")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--output", type=Path, required=True, help="file to which each result is added as a line of JSON"
    )
    options = parser.parse_args()
    known = options.output.read_text().splitlines() if options.output.exists() else []
    results = [json.loads(line) for line in known]
    rows = read_rows(options.rows, options.data_path)
    for seed in options.seeds:  # so that an interrupted comparison has all rows of a seed
        for row, config in rows.items():
            if any((result["row"], result["seed"]) == (row, seed) for result in results):
                continue
            results.append(train(options.folder, row, override(config, {"seed": seed})))
            with options.output.open("a") as out:
                print(json.dumps(results[-1]), file=out)
            print(f"seed {seed}, {results[-1]['bits_per_byte']:.4f} bits per byte: {row}", flush=True)
    print(table(list(rows), results))


if __name__ == "__main__":
    main()
