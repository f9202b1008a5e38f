"""Crash points: a driver dies at each thing that it writes or tells MLflow, is started again, and leaves what an
undisturbed one leaves.

    python -m tests.faults.sweep FOLDER --scenario search --every 10

What is compared: every record, checkpoint and outcome, the runs in MLflow with parameters, tags, metrics and files, the
logged and the registered model. Only what the clock or chance decides is not compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import ViewType

from raytrain.runs import checkpoint
from raytrain.runs.trials import TrialStore
from raytrain.storage.local import FolderStorage
from tests.faults.sweep_driver import Drive
from tests.support.mlflow_server import new_store
from tests.support.ray_instance import ray_instance
from tests.support.tiny import write_text

ROOT = Path(__file__).parents[2]
SPACE = """
ALGORITHM = "grid"
def space(trial):
    return {"optimizer.learning_rate": trial.suggest_categorical("rate", RATES)}
"""
RUN = (
    "hybrid --model.feature-maps 8 16 --model.decoder-maps 16 8 --model.latent 4 --model.hidden 16 --length 16 "
    "--batch-size 32 --steps 20 --log-every 5 --evaluate-every 10 --evaluate-samples 32 --checkpoint-every 10 "
    "--precision float32 --data text.txt"
).split()
RESUMPTIONS = 2
"""More than one would be a fault too; the second shows whether what was begun can be resumed at all."""
VOLATILE_TAGS = ("mlflow.parentRunId", "mlflow.note.content", "mlflow.loggedArtifacts", "mlflow.log-model.history")
VOLATILE = (*VOLATILE_TAGS, "raytrain.identity", "raytrain.location", "raytrain.memory_gb")
"""Tags that the clock, chance, the folder or a commit meanwhile decides, beside those of the code."""


@dataclass(frozen=True)
class Command:
    """``python -m module arguments`` and how it is gone on with after its death.

    Attributes:
        resume: arguments that go on; the command is given again where ``begun``, a path below the working directory,
            is not there yet.
        fatal: of a command that prepares a scenario: it dies at the first point of this name.
    """

    module: str
    arguments: list[str]
    resume: list[str]
    begun: str
    fatal: str = ""


def _search(name: str, *more: str, space: str = "space.py", fatal: str = "") -> Command:
    arguments = [*RUN, "--space", space, "--name", name, "--max-concurrent", "1", *more]
    return Command("raytrain.tune", arguments, ["--resume", name], f"runs/{name}/search.json", fatal)


SCENARIOS: dict[str, list[Command]] = {
    "search": [_search("s")],
    "groups": [_search("s", "--workers-per-trial", "2")],
    "train": [Command("raytrain.train", [*RUN, "--name", "t"], ["--resume", "t"], "runs/t/run.json")],
    # a search whose trials have ended finds a champion that it beats
    "promotion": [
        _search("s"),
        _search("p", space="better.py", fatal="mlflow create_logged_model"),
        Command("raytrain.tune", ["--resume", "p"], ["--resume", "p"], "runs/p/search.json"),
    ],
}
"""Commands by scenario: the last is the one that dies at each of its points, those before it prepare."""


class Drivers:
    """Runs commands as forks of one process that has imported what they need."""

    def __init__(self, cluster: str) -> None:
        """Start the process; ``cluster`` is the address of the Ray instance that commands join."""
        kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        variables = {"RAY_ADDRESS": cluster, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.sweep_driver"],
            env=kept | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def drive(self, home: Path, module: str, arguments: list[str], fatal: int = 0) -> int:
        """Run a command until it ends or dies at the point ``fatal``; return its status."""
        points = home / "points.txt"
        points.write_text("")
        drive = Drive(
            module, arguments, str(home), {"RAYTRAIN_CACHE": str(home / "cache")}, str(points), fatal,
            str(home / "output.txt"),
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asdict(drive)), file=self._process.stdin, flush=True)
        status = self._process.stdout.readline()
        assert status, "the process whose forks are the drivers has ended"
        return int(status)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class Sweep:
    """One scenario, in a folder: what it leaves undisturbed, and after a death at any of its points."""

    def __init__(self, folder: Path, drivers: Drivers, scenario: str) -> None:
        """Run what prepares the scenario, then all of it, undisturbed; what was in the folder is removed.

        Every home stands in the same place: what is stored has its address in it.
        """
        self._home = folder / "home"
        self._prepared = folder / "prepared"
        self._drivers = drivers
        *before, self._command = SCENARIOS[scenario]
        shutil.rmtree(folder, ignore_errors=True)
        self._home.mkdir(parents=True)
        write_text(self._home / "text.txt")
        (self._home / "space.py").write_text(SPACE.replace("RATES", "[1e-3, 1e-2]"))
        (self._home / "better.py").write_text(SPACE.replace("RATES", "[3e-2]"))
        new_store(self._home)
        for command in before:
            self._prepare(command)
        shutil.copytree(self._home, self._prepared)
        self._drive(self._command)
        self.points = self._points()
        """What an undisturbed driver does, in order."""
        self.expected = state(self._home)

    def at(self, fatal: int) -> tuple[list[int], list[str]]:
        """Let the driver die at a point, and go on.

        Returns:
            The status of each driver, and a line for each difference to what an undisturbed one leaves.
        """
        self._restore()
        statuses = [self._drivers.drive(self._home, self._command.module, self._command.arguments, fatal)]
        while statuses[-1] != 0 and len(statuses) <= RESUMPTIONS:
            begun = (self._home / self._command.begun).exists()
            arguments = self._command.resume if begun else self._command.arguments
            statuses.append(self._drivers.drive(self._home, self._command.module, arguments))
        wrong = [] if statuses in ([0], [-signal.SIGKILL, 0]) else [f"statuses {statuses}"]
        return statuses, wrong + (differences(self.expected, state(self._home)) if statuses[-1] == 0 else [])

    def keep(self, name: str) -> None:
        """Keep what the last death has left, beside the scenario's home."""
        shutil.copytree(self._home, self._home.with_name(name))

    def _restore(self) -> None:
        shutil.rmtree(self._home)
        shutil.copytree(self._prepared, self._home)

    def _prepare(self, command: Command) -> None:
        if not command.fatal:
            self._drive(command)
            return
        before = self._home.with_name("before")
        shutil.copytree(self._home, before)
        self._drive(command)
        fatal = 1 + next(number for number, point in enumerate(self._points()) if point.startswith(command.fatal))
        shutil.rmtree(self._home)
        before.rename(self._home)
        assert self._drivers.drive(self._home, command.module, command.arguments, fatal) == -signal.SIGKILL

    def _drive(self, command: Command) -> None:
        status = self._drivers.drive(self._home, command.module, command.arguments)
        assert status == 0, (self._home / "output.txt").read_text()[-3000:]

    def _points(self) -> list[str]:
        return (self._home / "points.txt").read_text().splitlines()


# -------------------------------------------------------------------------------------------- what it left


def state(home: Path) -> dict[str, Any]:
    """Return what commands have left in the storage and in MLflow, but for what the clock and chance decide."""
    records = [*home.glob("runs/*/search.json"), *home.glob("runs/*/run.json")]
    runs = {record.parent.name: _stored(record.parent) for record in records}
    # MLflow keeps connections by address, and a home is made anew under the same one
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(home / "mlflow.db", folder)
        return {"storage": runs} | _tracked(f"sqlite:///{folder}/mlflow.db")


def _stored(folder: Path) -> dict[str, Any]:
    """What a search or a run has in the storage; one that was resumed has had more drivers, and so leases."""
    location = FolderStorage(folder)
    keys = sorted(key for key in location.list() if not key.startswith(("trials/", "checkpoints/", "leases/")))
    if not (folder / "search.json").exists():
        return {"keys": keys} | _run(location)
    trials = TrialStore(location).read()
    stored = {}
    for trial in trials:
        record = (trial.status, trial.reason, trial.step, trial.best, trial.history, trial.params, trial.fields)
        stored[trial.name] = {"record": record} | _run(location.child(f"trials/{trial.identity}"))
    return {"keys": keys, "trials": stored}


def _run(location: FolderStorage) -> dict[str, Any]:
    kept = checkpoint.best(location.child("checkpoints"))
    return {
        "steps": sorted({key.split("/")[0] for key in location.child("checkpoints").list()}),
        "best": None if kept is None else (kept.step, kept.score, kept.evaluation),
        "outcome": json.loads(location.read("outcome.json")) if location.exists("outcome.json") else None,
        "files": sorted(key for key in location.list() if not key.startswith(("checkpoints/", "leases/"))),
    }


def _tracked(uri: str) -> dict[str, Any]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    runs: dict[str, Any] = {}
    found = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    searches = {run.info.run_id: run.info.run_name for run in found}
    for run in found:
        parent = searches.get(run.data.tags.get("mlflow.parentRunId"), "")
        key = f"{parent}/{run.data.tags.get('raytrain.trial', run.info.run_name)}"
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


@contextlib.contextmanager
def new_sweep(folder: Path, cluster: str, scenario: str) -> Iterator[Sweep]:
    """A scenario that has been run once, and the process whose forks are its drivers."""
    drivers = Drivers(cluster)
    try:
        yield Sweep(folder, drivers, scenario)
    finally:
        drivers.close()


def run_sweep(sweep: Sweep, every: int, first: int, log: Callable[[str], None] = print) -> list[str]:
    """Kill a driver at every ``every``th point from ``first`` on; return a line for each difference that was found.

    A driver may reach fewer points than the undisturbed one, and ends as that did; if all do, that is a difference too.
    """
    wrong, killed = [], 0
    log(f"{len(sweep.points)} points")
    for fatal in range(first, len(sweep.points) + 1, every):
        began = time.monotonic()
        statuses, found = sweep.at(fatal)
        died = statuses[0] == -signal.SIGKILL
        killed += died
        where = sweep.points[fatal - 1] if died else "not reached"
        log(f"{fatal:3} {time.monotonic() - began:4.0f} s {'DIFFERENT' if found else 'the same'}: {where}")
        for line in found:
            log(f"      {line}")
        wrong += [f"point {fatal} ({where}): {line}" for line in found]
        if found:
            sweep.keep(f"point-{fatal:03}")
    log(f"{killed} drivers were killed")
    return wrong if killed else [*wrong, "no driver was killed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenario", choices=SCENARIOS, default="search")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    arguments = parser.parse_args()

    def log(line: str) -> None:
        print(line, flush=True)

    with (
        ray_instance() as cluster,
        new_sweep(arguments.folder.resolve() / arguments.scenario, cluster, arguments.scenario) as sweep,
    ):
        wrong = run_sweep(sweep, arguments.every, arguments.first, log)
    print(f"{len(wrong)} differences")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
