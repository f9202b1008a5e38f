"""Peak of the memory that a worker takes on CPUs, beside what a search reserves for it.

    python benchmarks/worker_memory.py CORPUS --output worker_memory.json

Each config trains for two steps in a process of its own that has imported what a worker imports. Counted is its
anonymous memory (RssAnon), read from the kernel every 4 ms; not mapped pages of the corpus, which the kernel can drop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from raytrain.config.cli import default_config, parse_choice
from raytrain.data.corpus import Corpus
from raytrain.search.estimate import worker_bytes
from raytrain.training import worker
from raytrain.training.trainer import Trainer, World

CASES = (
    ("hybrid", "laptop", 64),
    ("lstm_vae", "laptop", 64),
    ("byte_lstm", "laptop", 64),
    ("byte_lstm", "laptop", 256),
    ("hybrid", "paper-ptb", 16),
    ("hybrid", "paper-tweets", 32),
    ("byte_lstm", "bios", 16),
)


def anonymous_bytes() -> int:
    """Return what this process holds of memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measure(model: str, preset: str, batch_size: int, corpus: Path) -> dict[str, Any]:
    """Train two steps in this process; return its peak and the estimate, in bytes."""
    choice, _ = parse_choice("raytrain.train", [model, "--preset", preset], None)
    config = dataclasses.replace(default_config(choice, "laptop"), batch_size=batch_size, evaluate_samples=64)
    peak, ended = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.004)

    watcher = threading.Thread(target=watch)
    watcher.start()
    trainer = Trainer(config, Corpus.open(corpus), World())
    for step in range(2):
        trainer.train_step(step)
    ended.set()
    watcher.join()
    return {"case": [model, preset, batch_size], "peak": peak[0], "estimate": worker_bytes(config, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder of a prepared corpus")
    parser.add_argument("--only", nargs=3, help="one model, preset and batch size, in this process")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if arguments.only:
        assert worker  # it imports Ray and MLflow's client, as a worker does
        model, preset, batch_size = arguments.only
        print(json.dumps(measure(model, preset, int(batch_size), arguments.corpus)))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, str(arguments.corpus), "--only", *map(str, case)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        peak, estimate = rows[-1]["peak"] / 1e6, rows[-1]["estimate"] / 1e6
        print(f"{' '.join(map(str, case))}: peak {peak:.0f} MB, estimate {estimate:.0f} MB", flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
