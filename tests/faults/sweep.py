"""Sweep of crash points: a driver dies at each write to its storage and each call of MLflow, and is resumed.

    python -m tests.faults.sweep FOLDER --every 1

The search has two trials of one worker. Resumed, it must leave what an undisturbed one leaves: trials with their
figures and histories, checkpoints, outcomes, MLflow runs with parameters, tags, metrics and files, the logged and the
registered model. Only what the clock or chance decides is not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import ViewType

from raytrain.runs import checkpoint
from raytrain.runs.trials import TrialStore
from raytrain.storage.local import FolderStorage
from tests.support.mlflow_server import new_store
from tests.support.ray_instance import ray_instance
from tests.support.tiny import write_text

ROOT = Path(__file__).parents[2]
SPACE = """
ALGORITHM = "grid"
def space(trial):
    return {"optimizer.learning_rate": trial.suggest_categorical("rate", [1e-3, 1e-2])}
"""
ARGUMENTS = (
    "hybrid --model.feature-maps 8 16 --model.decoder-maps 16 8 --model.latent 4 --model.hidden 16 --length 16 "
    "--batch-size 32 --steps 20 --log-every 5 --evaluate-every 10 --evaluate-samples 32 --checkpoint-every 10 "
    "--precision float32 --data text.txt --space space.py --name s --max-concurrent 1"
).split()
TIMEOUT_S = 300.0
RESUMPTIONS = 2
"""More than one would be a fault too; the second shows whether the search can be resumed at all."""
VOLATILE_TAGS = ("mlflow.parentRunId", "mlflow.note.content", "mlflow.loggedArtifacts", "mlflow.log-model.history")
VOLATILE = (*VOLATILE_TAGS, "raytrain.identity", "raytrain.location", "raytrain.memory_gb")
"""Tags that the clock, chance, the folder or a commit meanwhile decides, beside those of the code."""


def new_home(folder: Path, store: Path) -> Path:
    """Make the working directory of a search, with a text, a space and an empty tracking database."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(folder / "text.txt")
    (folder / "space.py").write_text(SPACE)
    shutil.copy(store, folder / "mlflow.db")
    return folder


def drive(home: Path, cluster: str, arguments: list[str], fatal: int = 0) -> int:
    """Run the driver until it ends or dies at the point ``fatal``; return its status."""
    variables = {"RAY_ADDRESS": cluster, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    variables |= {
        "SWEEP_POINTS": str(home / "points.txt"),
        "SWEEP_AT": str(fatal),
        "RAYTRAIN_CACHE": str(home / "cache"),
    }
    kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    (home / "points.txt").unlink(missing_ok=True)
    with (home / "output.txt").open("a") as output:
        return subprocess.run(
            [sys.executable, "-m", "tests.faults.sweep_driver", *arguments],
            cwd=home, env=kept | variables, stdout=output, stderr=output, timeout=TIMEOUT_S, check=False,
        ).returncode  # fmt: skip


def points(home: Path) -> list[str]:
    """The points that the last driver in ``home`` has reached."""
    return (home / "points.txt").read_text().splitlines()


def undisturbed(home: Path, cluster: str) -> list[str]:
    """Run a search that nothing disturbs; return its points."""
    status = drive(home, cluster, ARGUMENTS)
    assert status == 0, (home / "output.txt").read_text()[-3000:]
    return points(home)


def disturbed(home: Path, cluster: str, fatal: int) -> list[int]:
    """Run a search whose driver dies at the point ``fatal``, and resume it; return the statuses of the drivers."""
    statuses = [drive(home, cluster, ARGUMENTS, fatal)]
    while statuses[-1] != 0 and len(statuses) <= RESUMPTIONS:
        resumable = (home / "runs/s/search.json").exists()
        statuses.append(drive(home, cluster, ["--resume", "s"] if resumable else ARGUMENTS))
    return statuses


# -------------------------------------------------------------------------------------------- what it left


def state(home: Path) -> dict[str, Any]:
    """Return what a search has left in the storage and in MLflow, but for what the clock and chance decide."""
    location = FolderStorage(home / "runs/s")
    trials = TrialStore(location).read()
    stored = {}
    for trial in trials:
        own = location.child(f"trials/{trial.identity}")
        outcome = json.loads(own.read("outcome.json")) if own.exists("outcome.json") else None
        kept = checkpoint.best(own.child("checkpoints"))
        stored[trial.name] = {
            "record": (trial.status, trial.reason, trial.step, trial.best, trial.history, trial.params, trial.fields),
            "steps": sorted({key.split("/")[0] for key in own.child("checkpoints").list()}),
            "best": None if kept is None else (kept.step, kept.score, kept.evaluation),
            "outcome": outcome,
            "files": sorted(key.split("/")[-1] for key in own.list() if not key.startswith("checkpoints/")),
        }
    return {"trials": stored, "keys": _keys(location)} | _tracked(home)


def _keys(location: FolderStorage) -> list[str]:
    """What the search has beside its trials; a resumed one has had more drivers, and so leases."""
    return sorted(key for key in location.list() if not key.startswith(("trials/", "leases/")))


def _tracked(home: Path) -> dict[str, Any]:
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    runs: dict[str, Any] = {}
    for run in client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL):
        key = run.data.tags.get("raytrain.trial", "the search")
        assert key not in runs, f"two MLflow runs of {key}"
        names = [name for name in run.data.metrics if not name.startswith("system/") and "per_second" not in name]
        runs[key] = {
            "status": (run.info.lifecycle_stage, run.info.status, run.info.run_name),
            "parameters": run.data.params,
            "tags": {
                name: value
                for name, value in run.data.tags.items()
                if name not in VOLATILE and not name.startswith(("mlflow.runColor", "raytrain.git", "mlflow.source"))
            },
            "metrics": {
                name: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
                for name in names
            },
            "files": _files(client, run.info.run_id),
            "corpora": len(run.inputs.dataset_inputs),
            "models": len(run.outputs.model_outputs) if run.outputs else 0,
        }
    versions = client.search_model_versions("name = 'raytrain-hybrid'")
    return {
        "runs": runs,
        "models": [
            (str(model.status), sorted((metric.key, metric.value) for metric in model.metrics or []))
            for model in client.search_logged_models([experiment.experiment_id])
        ],
        "versions": [(version.version, sorted(version.tags)) for version in versions],
        "aliases": dict(client.get_registered_model("raytrain-hybrid").aliases) if versions else {},
    }


def _files(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    found: list[str] = []
    for item in client.list_artifacts(run_id, folder):
        found += _files(client, run_id, item.path) if item.is_dir else [item.path]
    return sorted(found)


def differences(expected: Any, found: Any, path: str = "") -> list[str]:
    """Return a line for each value that differs, with the path to it."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [f"{path}/{key} is missing" for key in expected.keys() - found.keys()]
        lines += [f"{path}/{key} is there: {str(found[key])[:80]}" for key in found.keys() - expected.keys()]
        for key in expected.keys() & found.keys():
            lines += differences(expected[key], found[key], f"{path}/{key}")
        return sorted(lines)
    return [] if expected == found else [f"{path}: {str(found)[:300]} instead of {str(expected)[:300]}"]


# ------------------------------------------------------------------------------------------------ the whole


def sweep(folder: Path, cluster: str, every: int, first: int, log: Any = print) -> list[str]:
    """Kill a driver at every ``every``th point from ``first`` on; return a line for each difference that was found.

    A driver may reach fewer points than the undisturbed one, and ends as that did; if all do, that is a difference too.
    """
    store = Path(new_store(folder).removeprefix("sqlite:///"))
    quiet = new_home(folder / "undisturbed", store)
    reached = undisturbed(quiet, cluster)
    expected, wrong, killed = state(quiet), [], 0
    log(f"{len(reached)} points")
    for fatal in range(first, len(reached) + 1, every):
        home, began = new_home(folder / f"point-{fatal:03}", store), time.monotonic()
        statuses = disturbed(home, cluster, fatal)
        died = statuses[0] == -signal.SIGKILL
        killed += died
        where = reached[fatal - 1] if died else "not reached"
        found = [] if statuses in ([0], [-signal.SIGKILL, 0]) else [f"statuses {statuses}"]
        found += differences(expected, state(home)) if statuses[-1] == 0 else []
        log(f"{fatal:3} {time.monotonic() - began:4.0f} s {'DIFFERENT' if found else 'the same'}: {where}")
        for line in found:
            log(f"      {line}")
        wrong += [f"point {fatal} ({where}): {line}" for line in found]
        if not found:
            shutil.rmtree(home)
    log(f"{killed} drivers were killed")
    return wrong if killed else [*wrong, "no driver was killed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(line, flush=True)

    with ray_instance() as cluster:
        wrong = sweep(arguments.folder, cluster, arguments.every, arguments.first, log)
    print(f"{len(wrong)} differences")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
