"""What must hold when a disturbed run or search has come to its end."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections import Counter
from typing import Any

from raytrain.search.registry import CHAMPION, read_score, versions
from raytrain.tracking.client import connect
from tests.faults.campaign.cluster import BUCKET, Cluster
from tests.faults.campaign.scenario import LOG_EVERY, TRIALS, Result, Scenario

IDLE_S = 90.0
"""Longest time until a run's processes have ended after its command."""
_CLOCK = ("system/", "train/bytes_per_second")
"""Metrics that differ from run to run."""
_LOOK = (
    "import ray, json; from tests.support.leftovers import leftovers; ray.init(address='auto', log_to_driver=False); "
)
_LOOK += "print(json.dumps(leftovers()))"


def collect(cluster: Cluster, scenario: Scenario) -> tuple[Result, list[str]]:
    """What the run or search ``cluster.name`` has ended with, and what is wrong in itself."""
    wrong: list[str] = []
    tracked = runs(cluster)
    children = {run.data.tags["raytrain.trial"]: run for run in tracked if "mlflow.parentRunId" in run.data.tags}
    if scenario.searches:
        names = Counter(run.data.tags.get("raytrain.trial", "the search") for run in tracked)
        if names != Counter([*map(str, range(TRIALS)), "the search"]):
            wrong.append(f"MLflow has the runs {dict(names)}")
    elif len(tracked) != 1:
        wrong.append(f"MLflow has {len(tracked)} runs")
    wrong += [f"{run.info.run_name} is {run.info.status} in MLflow" for run in tracked if run.info.status != "FINISHED"]
    single = children if scenario.searches else {"run": tracked[0]} if tracked else {}
    locations = {name: run.data.tags["raytrain.location"] for name, run in single.items()}
    metrics = {}
    for name, run in single.items():
        histories = history(cluster, run)
        metrics[name] = hashlib.sha256(json.dumps(histories, sort_keys=True).encode()).hexdigest()
        wrong += [f"{name}: {line}" for line in incomplete(histories, scenario)]
    result = Result(
        tensors={name: last_tensors(cluster, location, scenario.steps) for name, location in locations.items()},
        metrics=metrics,
        winner=best_trial(children) if scenario.searches else "",
    )
    return result, wrong


def runs(cluster: Cluster) -> list[Any]:
    """The MLflow runs of the experiment that is called like the run or search."""
    client = connect(cluster.mlflow.uri)
    experiment = client.get_experiment_by_name(cluster.name)
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def history(cluster: Cluster, run: Any) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every metric but those that the clock decides, with whatever is there twice."""
    client = connect(cluster.mlflow.uri)
    names = [name for name in run.data.metrics if not name.startswith(_CLOCK)]
    return {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
        for name in names
    }


def incomplete(histories: dict[str, list[tuple[int, float]]], scenario: Scenario) -> list[str]:
    """Steps that are missing from the main metrics, or there twice."""
    lines = []
    for name, every in {"train/bound": LOG_EVERY, "valid/bound": scenario.evaluate_every}.items():
        found = Counter(step for step, _ in histories.get(name, []))
        expected = set(range(every, scenario.steps + 1, every))
        if missing := sorted(expected - found.keys()):
            lines.append(f"{name} has no {len(missing)} steps from {missing[0]} to {missing[-1]}")
        if twice := sorted(step for step, count in found.items() if count > 1 or step not in expected):
            lines.append(f"{name} has {len(twice)} steps too many from {twice[0]} to {twice[-1]}")
    return lines


def last_tensors(cluster: Cluster, location: str, step: int) -> dict[str, str]:
    """The sums of the tensors in the checkpoint of the last step; each is computed anew."""
    client = cluster.s3.client()
    prefix = f"{location.removeprefix(f's3://{BUCKET}/')}/checkpoints/step-{step:08d}/"
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
    keys = [item["Key"] for item in found if item["Key"].endswith(".safetensors")]
    read = {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
    return {key.rpartition("/")[2]: hashlib.sha256(data).hexdigest() for key, data in read.items()}


def best_trial(children: dict[str, Any]) -> str:
    """The number of the trial with the lowest bound."""
    bounds = {name: run.data.metrics.get("best/bits_per_byte", float("inf")) for name, run in children.items()}
    return min(bounds, key=lambda name: bounds[name]) if bounds else ""


def champion(cluster: Cluster) -> list[str]:
    """What is wrong with the registry after a search: the best model is champion and loads, nothing is there twice."""
    lines = []
    name = "raytrain-hybrid"
    known = versions(cluster.mlflow.uri, name)
    parents = [run.info.run_id for run in runs(cluster) if "mlflow.parentRunId" not in run.data.tags]
    mine = [version for version in known if version.run_id in parents]
    if len(mine) != 1:
        return [f"the search has {len(mine)} registered models"]
    bounds = [
        run.data.metrics.get("best/bits_per_byte")
        for run in runs(cluster)
        if "mlflow.parentRunId" in run.data.tags
    ]  # fmt: skip
    if read_score(mine[0]).value != min(bound for bound in bounds if bound is not None):
        lines.append("the registered model is not that of the best trial")
    alias = connect(cluster.mlflow.uri).get_model_version_by_alias(name, CHAMPION)
    if read_score(alias).value != min(read_score(version).value for version in known):
        lines.append(f"version {alias.version} is champion, and another is better")
    try:
        cluster.run("-m", "raytrain.sample", f"models:/{name}@{CHAMPION}", "--num", "1")
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        lines.append(f"the champion does not load: {error.stderr or error}")
    return lines


def left(cluster: Cluster) -> list[str]:
    """Processes and resources that are still in use."""
    try:
        cluster.wait_idle(IDLE_S)
    except TimeoutError as error:
        return [str(error)]
    return [f"left: {line}" for line in json.loads(cluster.run("-c", _LOOK).splitlines()[-1])]
