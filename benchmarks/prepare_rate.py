"""Rate and memory of preparing a corpus: by one process, and on Ray Data with 1 and more CPUs and a killed worker.

    python benchmarks/prepare_rate.py FOLDER --bytes 1e9 --cpus 1 2 --output rates.json

Text of a fixed seed is written into FOLDER, as files of 64 MB of lines of which one in ten is there before, and
prepared as ``--source`` says. FOLDER needs about three times the room. The peak is that of the anonymous memory of a
Ray worker that works on a part, and of the command. CPU seconds are those of the command and of Ray's workers: other
than the seconds, they tell little of what else the machine does. All digests must be the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from raytrain.data import documents, synthetic
from raytrain.data.prepare import prepare

FILE_BYTES = 64 * 2**20
POOL = 200_000


def write(folder: Path, size: int) -> None:
    """Write lines of synthetic text, made different by a number, of which a tenth is a line of before."""
    pool = [text.replace(b"\n", b" ") for text, _ in synthetic.documents(0, POOL)]
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    number = written = 0
    while written < size:
        with open(folder / f"{written // FILE_BYTES:05}.txt", "wb") as file:
            while file.tell() < min(FILE_BYTES, size - written):
                chosen = generator.integers(0, POOL, 10_000).tolist()
                again = (generator.random(10_000) < 0.1).tolist()
                lines = []
                for text, repeats in zip(chosen, again, strict=True):
                    number += 1
                    shown = int(number * 0.37) if repeats else number
                    lines.append(b"%s %d" % (pool[shown % POOL if repeats else text], shown))
                file.write(b"\n".join(lines) + b"\n")
            written += file.tell()


def prepare_once(folder: Path, source: str, cpus: int, kills: bool, results: Any) -> None:
    """Prepare the text in ``folder`` in a process of its own; without ``cpus`` by one process."""
    fill = documents.fill
    if cpus:
        import ray

        from raytrain.data import distributed

        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        fill = distributed.fill  # type: ignore[assignment]
    peaks = {"worker": 0, "command": 0}
    cpu_s: dict[int, float] = {}
    threading.Thread(target=watch, args=(peaks, cpu_s, kills), daemon=True).start()
    start = time.perf_counter()
    known, path = (source, str(folder / "text")) if source else (str(folder / "text"), None)
    corpus = prepare(known, path=path, output=folder / "corpus", cache=folder / "cache", fill=fill)
    taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() + sum(cpu_s.values())}
    results.put({**taken, "digest": corpus.digest, "peaks": peaks})


def result_of(process: Any, results: Any) -> dict[str, Any]:
    """Return what the process has put into the queue.

    Raises:
        SystemExit: it has ended without.
    """
    while True:
        ended = not process.is_alive()
        try:
            taken: dict[str, Any] = results.get(timeout=1)
            return taken
        except queue.Empty:
            if ended:
                raise SystemExit(f"the process ended with status {process.exitcode}") from None


def watch(peaks: dict[str, int], cpu_s: dict[int, float], kills: bool) -> None:
    """Keep the greatest memory and the time of each worker, and kill one that is at work, if it is asked for."""
    me = psutil.Process()
    seen = 0
    while True:
        peaks["command"] = max(peaks["command"], anonymous(me))
        for process in me.children(recursive=True):
            try:
                if process.name().startswith("ray::"):
                    cpu_s[process.pid] = sum(process.cpu_times()[:2])
                if process.name().startswith("ray::Map"):
                    seen += 1
                    peaks["worker"] = max(peaks["worker"], anonymous(process))
                    if kills and seen == 20:
                        os.kill(process.pid, signal.SIGKILL)
            except (psutil.Error, OSError):  # it has ended
                continue
        time.sleep(0.1)


def anonymous(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bytes", type=float, default=1e9)
    parser.add_argument("--source", default="tweets", choices=("", "tweets"), help="tweets: cleaned, no duplicates")
    parser.add_argument("--cpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    folder = options.folder / "prepare_rate"
    shutil.rmtree(folder, ignore_errors=True)
    write(folder / "text", int(options.bytes))
    size = sum(path.stat().st_size for path in (folder / "text").iterdir())
    context = multiprocessing.get_context("spawn")
    runs = []
    for cpus, kills in [(0, False), *((cpus, False) for cpus in options.cpus), (options.cpus[-1], True)]:
        results = context.Queue()
        process = context.Process(target=prepare_once, args=(folder, options.source, cpus, kills, results))
        process.start()
        run = {"cpus": cpus, "killed": kills, "bytes": size, **result_of(process, results)}
        process.join()
        runs.append(run | {name: size / 1e6 / run[name[7:]] for name in ("mb_per_seconds", "mb_per_cpu_seconds")})
        print(runs[-1], flush=True)
        shutil.rmtree(folder / "corpus")
    options.output.write_text(json.dumps(runs, indent=2) + "\n")
    shutil.rmtree(folder)
    if len({run["digest"] for run in runs}) > 1:
        raise SystemExit("the digests differ")


if __name__ == "__main__":
    main()
