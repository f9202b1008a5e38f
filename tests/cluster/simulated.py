"""A whole search on a cluster that is not there: its trials reserve GPUs that are only numbers, sleep, and report.

python -m tests.cluster.simulated --gpus 64 --num-samples 128 --seconds 200 600

All else is the product's own: what is admitted and proposed, Ray Tune, the records, MLflow on a real server. Says what
share of the GPUs' time was allocated until the last trial began: by Ray's own account, and by the trials' clocks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray import tune as ray_tune
from ray.cluster_utils import Cluster

import raytrain.tune as tune
from raytrain.metrics import REQUIRED_METRICS
from raytrain.runs.records import OUTCOME
from raytrain.runs.trials import Trial
from raytrain.search import runner, setup
from raytrain.search.searcher import Search
from raytrain.storage import open_storage
from raytrain.training.worker import Job
from tests.support.mlflow_server import MlflowServer

UNIT_S = 10_000
"""A trial's time travels in a field that takes numbers below 1, in this many seconds."""
TIMES = "times.json"
"""When a trial began and ended, beside its outcome."""
SPACE = """
ALGORITHM = "random"
def space(trial):
    return {{"objective.alpha": trial.suggest_float("alpha", {low}, {high})}}
"""
START_S = 900.0
"""What MLflow gets to start in, on a machine that is busy."""
PROBE_S = 0.5


@dataclass(frozen=True)
class Simulated:
    """What came of a search. Times are seconds since it began."""

    at_once: int
    """Trials that were admitted at once."""
    statuses: dict[str, int]
    last_began: float
    ended: float
    reserved: float
    """Share of the GPUs' time until the last trial began in which Ray counted them as taken."""
    asleep: float
    """The same of the time in which a trial was at work."""
    most_reserved: float
    """GPUs that were taken at once at most."""


def sleep_and_report(values: dict[str, Any]) -> None:
    """In place of ``trainables.run_alone``: the trial's time passes, it reports once, and has ended."""
    job, began = Job(**values["job"]), time.time()
    time.sleep(job.config["objective"]["alpha"] * UNIT_S)
    steps, metrics = job.config["steps"], dict.fromkeys(REQUIRED_METRICS, 1.0)
    ray_tune.report({"step": steps, **metrics})
    outcome = {"best_step": steps, "best": metrics, "precision": "none", "device": "none", "samples": []}
    for name, found in ((TIMES, {"began": began, "ended": time.time()}), (OUTCOME, outcome)):
        open_storage(job.storage).write(name, json.dumps(found).encode())


@contextmanager
def cluster(gpus: int, nodes: int) -> Iterator[str]:
    """A head without CPUs and ``nodes`` that share the GPUs, all on this machine; gives the address."""
    # on a machine that is busy, 64 processes take their time to start
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_register_timeout_seconds": "900"}
    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, **small})
    try:
        for _ in range(nodes):
            # no CPUs to spare: Ray starts an idle process for each
            started.add_node(num_cpus=1, num_gpus=gpus // nodes, object_store_memory=80 * 2**20)
        yield started.address
    finally:
        ray.shutdown()
        started.shutdown()


class Account:
    """Asks Ray again and again how many GPUs are taken."""

    def __init__(self, gpus: int) -> None:
        self.probes: list[tuple[float, float]] = []
        """Unix time and GPUs."""
        self._gpus = gpus
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Account:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(PROBE_S):
            self.probes.append((time.time(), self._gpus - ray.available_resources().get("GPU", 0.0)))

    def share(self, first: float, last: float) -> float:
        """Of the GPUs' time between two moments; a probe holds until the next."""
        probes = [(first, 0.0), *((when, taken) for when, taken in self.probes if first < when < last), (last, 0.0)]
        taken = sum(gpus * (after - when) for (when, gpus), (after, _) in itertools.pairwise(probes))
        return taken / (self._gpus * (last - first))


def simulate(home: Path, gpus: int, nodes: int, num_samples: int, seconds: tuple[float, float]) -> Simulated:
    """Search in ``home`` on a cluster with so many GPUs, each trial drawn between ``seconds``."""
    low, high = (each / UNIT_S for each in seconds)
    (home / "space.py").write_text(SPACE.format(low=low, high=high))
    lines = (f"line {number} of a text that is longer than one window of 64 bytes\n" for number in range(300))
    (home / "text.txt").write_text("".join(lines))
    command = (
        f"hybrid --preset laptop --data {home}/text.txt --space {home}/space.py --num-samples {num_samples} --name s "
        f"--storage {home}/runs --cpus-per-worker {nodes / gpus / 2}"
    ).split()
    server = MlflowServer(home / "mlflow", start_timeout_s=START_S)
    server.start()
    try:
        with cluster(gpus, nodes) as address, mock.patch.dict(os.environ, MLFLOW_TRACKING_URI=server.uri):
            requests = [tune.read_request([*command, "--address", address], has_gpus) for has_gpus in (False, True)]
            begun = setup.new_search(*requests)
            assert begun is not None
            with mock.patch.object(runner, "run_alone", sleep_and_report), Account(gpus) as account:
                began = time.time()
                trials = runner.run_search(begun, lambda *_: None)
                ended = time.time()
    finally:
        server.kill()
    return summary(begun, trials, account, began, ended, gpus)


def summary(begun: Search, trials: list[Trial], account: Account, began: float, ended: float, gpus: int) -> Simulated:
    """The figures of a search that has ended."""
    locations = (begun.location.child(f"trials/{trial.identity}") for trial in trials)
    times = [json.loads(location.read(TIMES)) for location in locations]
    last = max(each["began"] for each in times)
    worked = sum(min(each["ended"], last) - each["began"] for each in times)
    statuses = {status: sum(trial.status == status for trial in trials) for status in {t.status for t in trials}}
    return Simulated(
        begun.concurrent, statuses, last - began, ended - began, account.share(began, last),
        worked / (gpus * (last - began)), max(taken for _, taken in account.probes),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seconds", type=float, nargs=2, default=(200.0, 600.0))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raytrain-simulated-") as home:
        low, high = options.seconds
        print(simulate(Path(home), options.gpus, options.nodes, options.num_samples, (low, high)))


if __name__ == "__main__":
    from tests.cluster import simulated  # so that actors find the trainable under its name

    simulated.main()
