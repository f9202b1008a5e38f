"""Measure what training a model costs on this machine, beside what the machine can do.

    python -m raytrain.bench hybrid --preset paper-tweets --batch-size 32 128
    python -m raytrain.bench byte_lstm --preset bios --only ceiling step plain --output bench.json

Everything takes turns, in each round: matrix products and copies at the machine's best; training steps by batch size
and compute type, and the plain PyTorch step; an evaluation; the data alone; a checkpoint; sampling; DDP by number of
workers; torchrun and Ray Train. Figures are medians over the rounds, with their range.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from typing import Any

from raytrain.bench.options import parse_command
from raytrain.config.schema import flatten
from raytrain.utils.errors import run_command


def main() -> None:
    """Check everything, then measure, then say it: on the terminal, in a file, and to MLflow."""
    options = parse_command(sys.argv[1:])

    import torch

    from raytrain.bench.machine import pinned
    from raytrain.bench.measure import measure
    from raytrain.bench.table import summary
    from raytrain.data.prepare import prepare
    from raytrain.storage import open_file
    from raytrain.training.checks import check_samples

    config = options.config
    corpus = prepare(config.data, path=config.data_path, field=config.data_field)
    check_samples(config, corpus, max(options.workers))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pinned(options.threads, options.cores):
        result = measure(options, corpus, device, lambda line: print(line, flush=True))
    if options.output is not None:
        location, name = open_file(options.output)
        location.write(name, (json.dumps(result, indent=2) + "\n").encode())
    print(summary(result), end="")
    if options.output is not None:
        print(f"written: {options.output}")
    if options.experiment is not None:
        print(f"logged: {log_result(result, options.experiment, options.storage)}")


def log_result(result: dict[str, Any], experiment: str, storage: str | None) -> str:
    """Log medians as metrics of a new MLflow run, and all as its artifact; returns how to see it."""
    from mlflow.entities import Metric

    from raytrain.config.schema import from_dict
    from raytrain.storage import ARTIFACTS, open_storage_root
    from raytrain.tracking.client import connect, patiently, tracking_uri
    from raytrain.tracking.runs import Experiment

    payload = json.dumps(result, sort_keys=True).encode()
    run = Experiment.open(tracking_uri(), experiment, open_storage_root(storage).uri(ARTIFACTS)).open_run(
        f"bench-{hashlib.sha256(payload).hexdigest()[:16]}",
        f"bench {result['model']}",
        parameters=flatten(from_dict(result["config"])),
        tags={"kind": "bench", "noisy": str(bool(result["noise"]["noisy"])).lower()},
    )
    metrics = [Metric(name, value, run.created_ms, 0) for name, value in sorted(medians(result).items())]
    patiently(lambda: connect(run.uri).log_batch(run.run_id, metrics=metrics))
    run.log_dict(result, "bench.json")
    run.finish("FINISHED")
    return run.ui_hint()


def medians(part: Any, name: str = "") -> dict[str, float]:
    """Every figure of a result under the path to it, as MLflow names metrics; the median where there are several."""
    if isinstance(part, dict) and "median" in part:
        return {name: part["median"]}
    if isinstance(part, dict):
        items = [(key, value) for key, value in part.items() if key not in ("config", "machine", "rounds", "seconds")]
        found = [medians(value, f"{name}/{key}".lstrip("/").replace(",", "")) for key, value in items]
        return {key: value for figures in found for key, value in figures.items()}
    if isinstance(part, list):
        rows = [row for row in part if isinstance(row, dict)]
        keys = ("batch_size", "precision", "workers")
        found = [medians(row, "/".join([name, *(str(row[key]) for key in keys if key in row)])) for row in rows]
        return {key: value for figures in found for key, value in figures.items()}
    return {name: float(part)} if isinstance(part, (int, float)) and not isinstance(part, bool) else {}


if __name__ == "__main__":
    # one that is terminated ends its workers and Ray, and removes what it has written
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run_command(main)
