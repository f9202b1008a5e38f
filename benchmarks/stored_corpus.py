"""Training on a corpus in a storage, within a limit of the node's cache, beside the same training from a local copy.

    python benchmarks/stored_corpus.py FOLDER --bytes 1e10 --storage s3://bucket/prefix --output stored.json

Text of a fixed seed, documents of about 100 bytes, is written into FOLDER as a corpus and published; FOLDER needs that
much room, and as much again if the storage is below it. Then a ``laptop`` byte LSTM takes steps of both in turns. The
steps lie at the ends of pools, so that the next pool is being copied during most of them. *Lasts* is the time for which
training draws from one pool.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytrain.config.schema import RunConfig
from raytrain.data import synthetic
from raytrain.data.cache import address, open_anywhere, publish
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.data.pools import Pools
from raytrain.storage import open_storage
from raytrain.train import read_command
from raytrain.training.trainer import Trainer, World

DOCUMENTS = 200_000
ROUND = 20


def write(folder: Path, size: int) -> Corpus:
    """Write a corpus of documents, each with a number of its own, unless it is there."""
    if not (folder / "corpus.json").is_file():
        texts = [text for text, _ in synthetic.documents(0, DOCUMENTS)]
        with CorpusWriter(folder, name="large", source="benchmark") as writer:
            written = turn = 0
            while written < size:
                numbered = [b"%s %d" % (text, turn) for text in texts]
                stream = np.frombuffer(b"\n".join(numbered) + b"\n", dtype=np.uint8)
                lengths = np.array([len(text) for text in numbered], dtype=np.int64)
                writer.extend("valid" if turn % 20 == 19 else "train", stream, lengths)
                written, turn = written + len(stream), turn + 1
            if turn < 20:
                writer.extend("valid", stream, lengths)
    return Corpus.open(folder)


def seconds(trainer: Trainer, steps: range) -> list[float]:
    """Return the seconds of each step."""
    found = []
    for step in steps:
        began = time.perf_counter()
        trainer.train_step(step)
        found.append(time.perf_counter() - began)
    return found


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def watch(folder: Path, ends: threading.Event, peak: list[int]) -> None:
    """Note the largest size of ``folder`` until ``ends``."""
    while not ends.wait(0.1):
        with contextlib.suppress(FileNotFoundError):  # removed while it was measured
            peak[0] = max(peak[0], bytes_of(folder))


def measure(corpus: Corpus, storage: str, config: RunConfig[Any], pools: int, cache: Path) -> dict[str, Any]:
    """Return what training on a corpus in a storage took beside training on its local copy."""
    location = open_storage(storage)
    began = time.perf_counter()
    publish(corpus, location)
    published = time.perf_counter() - began
    far = open_anywhere({**address(corpus, location, in_pools=True), "path": "/nowhere"})
    ends, peak = threading.Event(), [0]
    watcher = threading.Thread(target=watch, args=(cache, ends, peak))
    watcher.start()
    began = time.perf_counter()
    remote = Trainer(config, far, World())
    opened = time.perf_counter() - began
    local = Trainer(replace(config, pool_bytes=0), corpus, World())
    planned = Pools(far, "train", config.pool_bytes)
    share = planned.steps(config)
    times: dict[str, list[float]] = {"local": [], "stored": []}
    for number in range(pools):
        first = number * share + 1
        for start in range(first, first + 5 * ROUND, ROUND):
            times["local"] += seconds(local, range(start, start + ROUND))
            times["stored"] += seconds(remote, range(start, start + ROUND))
    began = time.perf_counter()
    copied = planned.open(pools + 5)
    copying = time.perf_counter() - began
    ends.set()
    watcher.join()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "corpus_bytes": sum(corpus.stream_size(name) for name in corpus.splits),
        "publish_seconds": published,
        "pools_of_a_pass": planned.count,
        "first_pools_seconds": opened,
        "pool_bytes": len(copied.stream),
        "pool_seconds": copying,
        "pool_lasts_seconds": share * medians["stored"],
        "cache_peak_bytes": peak[0],
        "step_ms": {name: 1e3 * value for name, value in medians.items()},
        "slowest_step_ms": {name: 1e3 * max(values[1:]) for name, values in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bytes", type=float, default=1e10)
    parser.add_argument("--limit", type=float, default=1e9, help="bytes that the cache may hold")
    parser.add_argument("--pool-bytes", type=float, default=2**28)
    parser.add_argument("--pools", type=int, default=6, help="pools to pass through")
    parser.add_argument("--storage", help="where the corpus is published; default: a folder in FOLDER")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache = options.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ |= {"RAYTRAIN_CACHE": str(cache), "RAYTRAIN_CACHE_BYTES": str(int(options.limit))}
    corpus = write(options.folder / "corpus", int(options.bytes))
    arguments = [
        "byte_lstm",
        "--preset",
        "laptop",
        "--sampling",
        "documents",
        "--length",
        "160",
        "--steps",
        "100000000",
    ]
    config = read_command([*arguments, "--pool-bytes", str(int(options.pool_bytes))], has_gpus=False)[1]
    storage = options.storage or str(options.folder / "store")
    results = measure(corpus, storage, config, options.pools, cache)
    text = json.dumps(results, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
