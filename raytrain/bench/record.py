"""A benchmark's record in MLflow: its medians as metrics, the whole result as an artifact."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mlflow.entities import Metric

from raytrain.config.schema import flatten, from_dict
from raytrain.storage import ARTIFACTS, open_storage_root
from raytrain.tracking.client import connect, retry_tracking, tracking_uri
from raytrain.tracking.runs import Experiment


def log_result(result: dict[str, Any], experiment: str, storage: str | None) -> str:
    """Log medians as metrics of a new MLflow run, and the whole result as its artifact; return how to view it."""
    payload = json.dumps(result, sort_keys=True).encode()
    run = Experiment.open(tracking_uri(), experiment, open_storage_root(storage).uri(ARTIFACTS)).open_run(
        f"bench-{hashlib.sha256(payload).hexdigest()[:16]}",
        f"bench {result['model']}",
        parameters=flatten(from_dict(result["config"])),
        tags={"kind": "bench", "noisy": str(bool(result["noise"]["noisy"])).lower()},
    )
    metrics = [Metric(name, value, run.created_ms, 0) for name, value in sorted(medians(result).items())]
    retry_tracking(lambda: connect(run.uri).log_batch(run.run_id, metrics=metrics))
    run.log_dict(result, "bench.json")
    run.finish("FINISHED")
    return run.ui_hint()


def medians(part: Any, name: str = "") -> dict[str, float]:
    """Return every number of a result by its path, in MLflow's style of metric names; for a series, its median."""
    if isinstance(part, dict) and "median" in part:
        return {name: part["median"]}
    if isinstance(part, dict):
        items = [(key, value) for key, value in part.items() if key not in ("config", "machine", "rounds", "seconds")]
        found = [medians(value, f"{name}/{key}".lstrip("/").replace(",", "")) for key, value in items]
        return {key: value for each in found for key, value in each.items()}
    if isinstance(part, list):
        rows = [row for row in part if isinstance(row, dict)]
        keys = ("batch_size", "precision", "workers")
        found = [medians(row, "/".join([name, *(str(row[key]) for key in keys if key in row)])) for row in rows]
        return {key: value for each in found for key, value in each.items()}
    return {name: float(part)} if isinstance(part, (int, float)) and not isinstance(part, bool) else {}
