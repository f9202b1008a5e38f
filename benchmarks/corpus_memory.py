"""Anonymous memory of a training worker by the size of its corpus.

    python benchmarks/corpus_memory.py FOLDER --bytes 2e7 2e10 --rounds 2 --output memory.json

Corpora of synthetic text are written into FOLDER, which needs that much room, and removed at the end.
``python -m raytrain.train`` trains on each in turn. The worker's RssAnon is read from the kernel while it trains, and
the median over the last half of the readings counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from raytrain.data import synthetic
from raytrain.data.corpus import CorpusWriter

MEAN_BYTES = 1000
POOL_BYTES = 2**22
WORKER = "ray::RayTrainWorker"


def write(folder: Path, size: int) -> None:
    """Write a corpus of about ``size`` bytes: documents of 500 to 1,500 bytes, cut from anywhere in synthetic text."""
    pool = b" ".join(text for text, _ in synthetic.documents(0, POOL_BYTES // 20))[:POOL_BYTES]
    generator = np.random.default_rng(0)
    with CorpusWriter(folder, name=folder.name, source="synthetic text") as writer:
        remaining = size // MEAN_BYTES
        while remaining > 0:
            count = min(remaining, 2**16)
            lengths = generator.integers(MEAN_BYTES // 2, 3 * MEAN_BYTES // 2, count)
            starts = generator.integers(0, len(pool) - 2 * MEAN_BYTES, count)
            for number, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
                writer.add("valid" if number % 100 == 0 else "train", pool[start : start + length])
            remaining -= count


def measure(corpus: Path, work: Path, options: list[str]) -> dict[str, float]:
    """Train on a corpus; return median and maximum of the worker's RssAnon, and the median of its RssFile, in bytes."""
    command = [sys.executable, "-m", "raytrain.train", "hybrid", "--data", str(corpus), "--workers", "1", *options]
    readings: list[tuple[int, int]] = []
    with (work / "output.txt").open("w") as output:
        run = subprocess.Popen([*command, "--name", f"r{time.time_ns()}"], cwd=work, stdout=output, stderr=output)
        while run.poll() is None:
            readings += [memory for process in psutil.Process(run.pid).children(True) if (memory := _memory(process))]
            time.sleep(0.2)
    if run.returncode != 0:
        raise SystemExit((work / "output.txt").read_text()[-2000:])
    last = readings[len(readings) // 2 :]
    anonymous, file = zip(*last, strict=True)
    return {"anonymous": statistics.median(anonymous), "most": max(anonymous), "file": statistics.median(file)}


def _memory(process: psutil.Process) -> tuple[int, int] | None:
    """Return (RssAnon, RssFile) of a training worker in bytes; ``None`` for any other process."""
    try:
        if WORKER not in " ".join(process.cmdline()):
            return None
        status = Path(f"/proc/{process.pid}/status").read_text()
    except (psutil.Error, OSError):
        return None
    found = dict(line.split(":", 1) for line in status.splitlines())
    if "RssAnon" not in found:
        return None  # it has just ended
    return int(found["RssAnon"].split()[0]) * 1024, int(found["RssFile"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bytes", type=float, nargs="+", default=[2e7, 2e10], dest="sizes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--options", default="--preset paper-ptb --steps 150 --evaluate-samples 64", help="of the run")
    values = parser.parse_args()
    work: Path = values.folder
    work.mkdir(parents=True)
    corpora = {int(size): work / f"text{int(size)}" for size in values.sizes}
    results: list[dict[str, Any]] = []
    for size, corpus in corpora.items():
        write(corpus, size)
    for number in range(values.rounds):
        for size, corpus in corpora.items():
            found = measure(corpus, work, values.options.split())
            results.append({"round": number, "bytes": size, **found})
            print(" ".join(f"{name} {value:,.0f}" for name, value in results[-1].items()), flush=True)
    for corpus in corpora.values():
        shutil.rmtree(corpus)
    if values.output:
        values.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
