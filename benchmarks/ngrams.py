"""Time and memory of the reference ladder on large texts.

    python benchmarks/ngrams.py FOLDER --megabytes 50 500 --output ngrams.json

A text has as many megabytes as asked for: synthetic documents in which a twentieth of the bytes are other letters, so
that most long n-grams are rare. Each is measured in a process of its own, on 1,024 windows of 60 bytes: first the
orders that a start waits for, then all. Time is CPU time of the one thread. Memory is the peak beyond what the process
takes without a ladder, mapped pages of the corpus included.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from raytrain.config.models import ByteLstmConfig
from raytrain.config.schema import RunConfig
from raytrain.data import synthetic
from raytrain.data.corpus import Corpus, CorpusWriter

ALTERED = 0.05
"""Share of the bytes that become other letters."""
VALID = 4000
"""Documents of the validation split, and that are altered at once."""


def prepare(folder: Path, megabytes: int) -> Path:
    """Write the corpus of that size below ``folder``, unless it is there; return its own folder."""
    path, random = folder / f"altered-{megabytes}", np.random.default_rng(0)
    if path.exists():
        return path
    documents, size = synthetic.documents(0, sys.maxsize), 0
    with CorpusWriter(path, name=path.name, source="benchmarks/ngrams.py") as writer:
        while size < 1e6 * megabytes:
            block = b"\n".join(text for text, _ in islice(documents, VALID))
            symbols = np.frombuffer(block, dtype=np.uint8).copy()
            altered = (random.random(len(symbols)) < ALTERED) & (symbols != ord("\n"))
            symbols[altered] = random.integers(ord("a"), ord("z") + 1, altered.sum())
            for text in symbols.tobytes().split(b"\n"):
                writer.add("train" if size else "valid", text)
            size += len(symbols)
    return path


def measure(path: Path) -> dict[str, Any]:
    """Return seconds, bytes of memory and figures of the ladders of the corpus at ``path``."""
    # not for --help: they load torch
    from raytrain.data.batches import EvaluationBatches
    from raytrain.models.ladder import BASELINE_ORDER
    from raytrain.models.ngrams import MAX_ORDER, measure_ngrams

    corpus = Corpus.open(path)
    train = corpus.split("train")
    config = RunConfig(model=ByteLstmConfig(), sampling="windows", length=60)
    samples = EvaluationBatches(corpus.split("valid"), config, 1024)
    result: dict[str, Any] = {"bytes": len(train.stream)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, order in (("start", BASELINE_ORDER), ("whole", MAX_ORDER)):
        began, clock = time.process_time(), time.perf_counter()
        bits, counted = measure_ngrams(train, samples, order)
        seconds, elapsed = time.process_time() - began, time.perf_counter() - clock
        result[name] = {"order": order, "cpu_seconds": seconds, "seconds": elapsed, "bits": bits, "counted": counted}
    result["memory"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the texts are kept")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(measure(options.only)))
        return
    results = []
    for megabytes in options.megabytes:
        path = prepare(options.folder, megabytes)
        command = [sys.executable, __file__, str(options.folder), "--only", str(path)]
        results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        start, whole = results[-1]["start"], results[-1]["whole"]
        times = (f"{each['cpu_seconds']:.1f} to order {each['order']}" for each in (start, whole))
        print(
            f"{results[-1]['bytes'] / 1e6:,.0f} MB, {whole['counted'] / 1e6:,.0f} counted: CPU seconds "
            f"{', '.join(times)}; peak {results[-1]['memory'] / 1e6:,.0f} MB",
            flush=True,
        )
    if options.output is not None:
        machine = {"cpu": platform.processor(), "python": platform.python_version(), "numpy": np.__version__}
        options.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
