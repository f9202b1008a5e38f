"""Overhead of a trial beside its training: raytrain against the pattern of Ray's documentation.

    python benchmarks/search_overhead.py --rounds 2 --trials 4 --output overhead.json

Four searches take turns on one Ray instance of two CPUs, one trial at a time: raytrain's and the plain pattern's (a
driver function that runs a ``TorchTrainer`` with a ``TuneReportCallback``), with one worker a trial and with two. The
loop, the model, the corpus and the records in MLflow are the same. The benchmark measures of each trial:

- start: from its admission, when the search algorithm is asked for it, to the end of its first step;
- end: from its last step until the next trial is admitted or every CPU is free.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

TINY = (
    "--model.feature-maps 8 16 --model.decoder-maps 16 8 --model.latent 4 --model.hidden 16 --length 16 "
    "--batch-size 32 --steps 10 --log-every 1 --evaluate-every 5 --evaluate-samples 32 --checkpoint-every 10 "
    "--precision float32"
).split()
# a grid stops no trial early: all have the same steps
SPACE = "def space(trial):\n    return {'objective.alpha': trial.suggest_float('alpha', 0.0, 0.9, step=0.1)}\n"
CPUS_PER_WORKER = 0.5
PATTERNS = [("raytrain", 1), ("plain", 1), ("raytrain", 2), ("plain", 2)]
ADMITTED = "admitted.json"


# ------------------------------------------------------------------------------------ the two patterns


def search_raytrain(home: Path, workers: int, trials: int) -> None:
    """Run a search as a user starts it."""
    (home / "space.py").write_text(SPACE)
    arguments = [*TINY, "--space", "space.py", "--algorithm", "grid", "--name", "s", "--num-samples", str(trials)]
    arguments += ["--workers-per-trial", str(workers), "--cpus-per-worker", str(CPUS_PER_WORKER)]
    with (home / "output.txt").open("w") as output:
        subprocess.run(
            [sys.executable, "-m", "raytrain.tune", "hybrid", *arguments, "--max-concurrent", "1"],
            cwd=home, check=True, stdout=output, stderr=output,
        )  # fmt: skip


def search_plain(home: Path, workers: int, trials: int) -> None:
    """Run the pattern of Ray's documentation, in a process of its own like the other."""
    with (home / "output.txt").open("w") as output:
        subprocess.run(
            [sys.executable, __file__, "--plain", str(workers), "--trials", str(trials)],
            cwd=home, check=True, stdout=output, stderr=output,
        )  # fmt: skip


def train_once(values: dict[str, Any]) -> None:
    """Train as a worker of the plain pattern."""
    from ray import train as ray_train
    from ray.train.torch import get_device

    from raytrain.training.trainer import World
    from raytrain.training.worker import Job, run

    context = ray_train.get_context()
    world = World(rank=context.get_world_rank(), size=context.get_world_size(), device=get_device())
    run(Job(**values), world, ray_train.report, context.get_node_rank() if context.get_local_rank() == 0 else None)


def plain_pattern(workers: int, trials: int) -> None:
    """Run the plain pattern in the working directory."""
    import ray
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.search import Searcher

    from raytrain.config.schema import flatten, to_dict
    from raytrain.runs.records import new_identity
    from raytrain.runs.workspace import open_workspace
    from raytrain.tracking.runs import Experiment
    from raytrain.training.worker import Job
    from raytrain.tune import read_request

    config = read_request(["hybrid", *TINY], has_gpus=False).first
    workspace = open_workspace(config, None)
    experiment = Experiment.open(workspace.tracking_uri, "raytrain", workspace.artifact_root())
    jobs = []
    for number in range(trials):
        run = experiment.open_run(
            new_identity(), f"{number:03}", parent="0" * 32, config=to_dict(config),
            parameters=flatten(config), tags={},
        )  # fmt: skip
        location = workspace.storage.uri(f"{number:03}")
        job = Job(
            config=to_dict(config),
            corpus=workspace.corpus_address(config),
            storage=location,
            tracking=asdict(run),
            cpus=CPUS_PER_WORKER,
        )
        jobs.append(asdict(job))
    admitted: list[float] = []
    storage = str(Path("ray").resolve())

    class InOrder(Searcher):
        """Searcher that hands the jobs out in order, and records the time of each."""

        def suggest(self, trial_id: str) -> dict[str, Any]:
            admitted.append(time.time())
            return {"job": jobs[len(admitted) - 1]}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            """Learn nothing."""

        def save(self, checkpoint_path: str) -> None:
            """Keep nothing."""

        def restore(self, checkpoint_path: str) -> None:
            """Restore nothing: nothing was kept."""

    def driver(values: dict[str, Any]) -> None:
        TorchTrainer(
            train_once,
            train_loop_config=values["job"],
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": CPUS_PER_WORKER}),
            run_config=RunConfig(
                name=tune.get_context().get_trial_id(), storage_path=storage, callbacks=[TuneReportCallback()]
            ),
        ).fit()

    ray.init(log_to_driver=False)
    tune.Tuner(
        tune.with_resources(driver, {"CPU": 0.01}),
        tune_config=tune.TuneConfig(
            metric="bound", mode="min", search_alg=InOrder(metric="bound", mode="min"), num_samples=trials,
            max_concurrent_trials=1,
        ),
        run_config=tune.RunConfig(storage_path=storage, verbose=0),
    ).fit()  # fmt: skip
    Path(ADMITTED).write_text(json.dumps(admitted))


# ------------------------------------------------------------------------------------------- measuring


class Watch:
    """Record of the times at which all CPUs of the Ray instance are free."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, bool]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        import ray

        ended = threading.Event()

        def look() -> None:
            total = ray.cluster_resources()["CPU"]
            while not ended.wait(0.1):
                self.samples.append((time.time(), ray.available_resources().get("CPU", 0.0) >= total - 1e-6))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def free_after(self, moment: float) -> float:
        """Return the first time from ``moment`` on at which all CPUs were free."""
        return next((time for time, free in self.samples if free and time >= moment), float("inf"))


def measure(home: Path, watch: Watch) -> list[dict[str, float]]:
    """Return start and end, in seconds, of each trial of the search that ran in ``home``."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    runs = [run for run in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" in run.data.tags]
    runs.sort(key=lambda run: run.info.run_name)
    if (home / ADMITTED).exists():
        admitted = json.loads((home / ADMITTED).read_text())
    else:
        admitted = [run.info.start_time / 1000 for run in runs]  # made when the search algorithm is asked
    steps = []
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "train/learning_rate")
        moments = sorted(metric.timestamp / 1000 for metric in history)
        assert len(moments) == 10, (home, run.info.run_name, len(moments))
        steps.append((moments[0], moments[-1]))
    following = [*admitted[1:], float("inf")]
    return [
        {"start": first - begun, "end": min(watch.free_after(last), after) - last, "first": index == 0}
        for index, (begun, (first, last), after) in enumerate(zip(admitted, steps, following, strict=True))
    ]


def summarise(results: dict[str, list[dict[str, float]]]) -> str:
    """Return a Markdown table: median and range."""
    lines = ["| pattern | workers | trial | start, s | end, s | both, s |", "|---|---|---|---|---|---|"]
    for key, trials in results.items():
        for label, first in (("first of a search", True), ("following", False)):
            chosen = [trial for trial in trials if trial["first"] == first]
            columns = [
                [trial["start"] for trial in chosen],
                [trial["end"] for trial in chosen],
                [trial["start"] + trial["end"] for trial in chosen],
            ]
            cells = [f"{statistics.median(c):.1f} ({min(c):.1f}-{max(c):.1f})" for c in columns]
            lines.append(f"| {key.replace(' ', ' | ')} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run all searches and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=4, help="trials of each search")
    parser.add_argument("--output", type=Path, help="JSON file for all measurements")
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain is not None:
        plain_pattern(options.plain, options.trials)
        return
    import ray

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    ray.init(address="local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=False)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="raytrain-overhead-") as folder:
        for number in range(options.rounds):
            for pattern, workers in PATTERNS:
                home = Path(folder) / f"{number}-{pattern}-{workers}"
                home.mkdir()
                watch = Watch()
                with watch.watching():
                    search = search_raytrain if pattern == "raytrain" else search_plain
                    search(home, workers, options.trials)
                    time.sleep(3)
                trials = measure(home, watch)
                results.setdefault(f"{pattern} {workers}", []).extend(trials)
                print(pattern, workers, json.dumps(trials), flush=True)
    ray.shutdown()
    print(summarise(results))
    if options.output is not None:
        about = {
            "date": time.strftime("%Y-%m-%d"), "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(), "command": " ".join(sys.argv), "load": os.getloadavg(),
        }  # fmt: skip
        options.output.write_text(json.dumps({**about, "seconds": results}, indent=1))


if __name__ == "__main__":
    main()
