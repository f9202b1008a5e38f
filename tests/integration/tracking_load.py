"""Many trials that log to one ``mlflow server`` at once: what arrives, and what it costs.

    python -m tests.integration.tracking_load --store sqlite --trials 64 --seconds 30
    python -m tests.integration.tracking_load --store postgres --trials 64 128 256 --interval 1 5

Each trial is a thread with a run and a ``MetricWriter`` of its own, several to a process. It logs what
a trial of a search logs: a training record of 9 metrics every ``--record-every`` seconds, with each
fifth one an evaluation of 6 more and a wait until all is stored (so does a trial that may be stopped
next), and 10 system metrics every 10 s. Afterwards the store is read back, metric by metric.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy
from mlflow import MlflowClient

from raytrain.tracking.metric_writer import MetricWriter
from raytrain.tracking.runs import Experiment
from tests.support.mlflow_server import MlflowServer
from tests.support.postgres_server import PostgresServer, find_programs

_BOUND = ("reconstruction", "kl", "auxiliary", "bound", "bits_per_byte")
_TRAIN = (*_BOUND, "kl_weight", "gradient_norm", "learning_rate", "bytes_per_second")
KEYS = {
    "train": [f"train/{name}" for name in _TRAIN],
    "valid": [f"valid/{name}" for name in (*_BOUND, "active_units")],
    "system": [f"system/metric_{number}" for number in range(10)],
}
STEPS_PER_RECORD = 25
RECORDS_PER_EVALUATION = 5
SYSTEM_S = 10.0
FLUSH_S = 10.0
"""As in ``workers.RayReport``: the longest wait for the store after an evaluation."""


@dataclass(frozen=True)
class Load:
    """What is asked of the server."""

    trials: int = 64
    seconds: float = 30.0
    record_every: float = 1.8
    """Seconds between two records of a trial: 25 steps of the laptop preset on one core."""
    interval: float | None = None
    """Seconds between two requests of a writer; its own default without one."""
    processes: int = 4


@dataclass(frozen=True)
class Trial:
    """What one trial did."""

    run_id: str
    steps: dict[str, list[int]]
    """The steps logged, by kind of record."""
    unsent: int
    seconds_logging: float
    seconds_flushing: float
    oldest: float
    """Greatest age in seconds of a record that the store had not confirmed, in the second half."""
    closing: float
    """Seconds from the last record until the store had all."""


@dataclass(frozen=True)
class Result:
    """What a load came to."""

    metrics_per_second: float
    lost: int
    duplicated: int
    oldest: float
    closing: float
    logging_share: float
    """Largest share of its time that a trial spent inside ``log``."""
    flushing_share: float
    """Mean share of its time that a trial waited after evaluations."""
    server_cores: float
    database_cores: float
    client_cores: float

    @property
    def keeps_up(self) -> bool:
        """Nothing lost, what waits does not grow, and no trial is held up."""
        return (
            self.lost == self.duplicated == 0 and self.oldest < 10 and self.closing < 3 and self.flushing_share < 0.01
        )


def value(number: int, kind: str, index: int, step: int) -> float:
    """What trial ``number`` logs: every metric of every step is a value of its own."""
    return number + (step + index / 100) / (1 + len(kind))


# ------------------------------------------------------------------------------------------ the trials


def drive(uri: str, run_ids: list[tuple[int, str]], load: Load) -> tuple[list[Trial], float]:
    """The trials of one process, together; also the CPU seconds that they took."""
    _BARRIER.wait()
    before = _cpu_s()
    with ThreadPoolExecutor(len(run_ids)) as threads:
        trials = list(threads.map(lambda entry: _trial(uri, *entry, load), run_ids))
    return trials, _cpu_s() - before


def _trial(uri: str, number: int, run_id: str, load: Load) -> Trial:
    writer = MetricWriter(uri, run_id) if load.interval is None else MetricWriter(uri, run_id, interval_s=load.interval)
    chance = random.Random(number)
    steps: dict[str, list[int]] = {kind: [] for kind in KEYS}
    flushing = oldest = 0.0
    start = time.monotonic()
    # Trials do not march in step.
    due = {"train": start + chance.random() * load.record_every, "system": start + chance.random() * SYSTEM_S}

    def log(step: int, *kinds: str) -> None:
        metrics = {key: value(number, kind, i, step) for kind in kinds for i, key in enumerate(KEYS[kind])}
        writer.log(step, metrics)
        for kind in kinds:
            steps[kind].append(step)

    for record in itertools.count(1):
        while due["system"] < min(due["train"], start + load.seconds):
            _sleep_until(due["system"])
            log(int(due["system"] - start), "system")
            due["system"] += SYSTEM_S
        if due["train"] > start + load.seconds:
            break
        _sleep_until(due["train"])  # what a slow store has held up is made good: the rate stays what it is
        due["train"] += load.record_every
        if 2 * (time.monotonic() - start) > load.seconds and (pending := writer.pending()):
            oldest = max(oldest, time.time() - pending[0][1] / 1000)
        evaluates = record % RECORDS_PER_EVALUATION == 0
        log(record * STEPS_PER_RECORD, "train", *(["valid"] if evaluates else []))
        if evaluates:
            before = time.monotonic()
            writer.flush(FLUSH_S)
            flushing += time.monotonic() - before
    _sleep_until(start + load.seconds)
    before = time.monotonic()
    unsent = writer.close(120)
    return Trial(run_id, steps, unsent, writer.seconds_logging, flushing, oldest, time.monotonic() - before)


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


_BARRIER: Any = None


def _prepare(barrier: Any) -> None:
    global _BARRIER
    _BARRIER = barrier


# ------------------------------------------------------------------------------------------ the whole


def measure(server: MlflowServer, load: Load, database: PostgresServer | None = None) -> Result:
    """Run the trials against a server, read back what its store has, and say what it took."""
    experiment = Experiment.open(server.uri, f"load-{time.time_ns()}", "/nowhere")
    client = MlflowClient(server.uri)
    run_ids = [(number, client.create_run(experiment.experiment_id).info.run_id) for number in range(load.trials)]
    shares = [share for index in range(load.processes) if (share := run_ids[index :: load.processes])]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(shares) + 1)
    with ProcessPoolExecutor(len(shares), context, _prepare, (barrier,)) as pool:
        futures = [pool.submit(drive, server.uri, share, load) for share in shares]
        barrier.wait(120)  # every process has imported what it needs
        start = time.monotonic()
        before = [_tree_cpu_s(process.pid) if process else 0.0 for process in (server, database)]
        done = [future.result() for future in futures]
        after = [_tree_cpu_s(process.pid) if process else 0.0 for process in (server, database)]
        elapsed = time.monotonic() - start
    trials = [trial for part, _ in done for trial in part]
    lost, duplicated, num_metrics = _compare(server, trials, {run_id: number for number, run_id in run_ids})
    return Result(
        metrics_per_second=num_metrics / load.seconds,
        lost=lost,
        duplicated=duplicated,
        oldest=max(trial.oldest for trial in trials),
        closing=max(trial.closing for trial in trials),
        logging_share=max(trial.seconds_logging for trial in trials) / load.seconds,
        flushing_share=sum(trial.seconds_flushing for trial in trials) / load.seconds / load.trials,
        server_cores=(after[0] - before[0]) / elapsed,
        database_cores=(after[1] - before[1]) / elapsed,
        client_cores=sum(seconds for _, seconds in done) / elapsed,
    )


def _compare(server: MlflowServer, trials: list[Trial], numbers: dict[str, int]) -> tuple[int, int, int]:
    """Metrics lost (or altered), stored more than once, and logged; also checks what the UI's table shows."""
    expected = {
        (trial.run_id, key, step): value(numbers[trial.run_id], kind, index, step)
        for trial in trials
        for kind, steps in trial.steps.items()
        for step in steps
        for index, key in enumerate(KEYS[kind])
    }
    engine = sqlalchemy.create_engine(server.store_uri)
    query = sqlalchemy.text("SELECT run_uuid, key, step, value FROM metrics")
    with engine.connect() as connection:
        rows = [row for row in connection.execute(query) if row[0] in numbers]
    engine.dispose()
    stored = {(run_id, key, step): number for run_id, key, step, number in rows}
    client = MlflowClient(server.uri)
    for trial in trials:
        latest = {
            key: expected[trial.run_id, key, steps[-1]]
            for kind, steps in trial.steps.items()
            if steps
            for key in KEYS[kind]
        }
        assert client.get_run(trial.run_id).data.metrics == latest
    assert sum(trial.unsent for trial in trials) == 0
    lost = sum(1 for key, number in expected.items() if stored.get(key) != number)
    return lost, len(rows) - len(stored) + len(stored.keys() - expected.keys()), len(expected)


def _tree_cpu_s(pid: int | None) -> float:
    """CPU seconds of a process and its descendants; of those that have ended too."""
    process = psutil.Process(pid)
    total = 0.0
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(member.cpu_times()[:4])
    return total


@contextlib.contextmanager
def serving(store: str, workers: int = 1, parent: str = "/tmp") -> Iterator[tuple[MlflowServer, PostgresServer | None]]:
    """A new server on a new store in a new folder under ``parent``; all gone at the end."""
    with tempfile.TemporaryDirectory(prefix="raytrain-load-", dir=parent) as folder, contextlib.ExitStack() as stack:
        database = None
        if store == "postgres":
            programs = find_programs()
            if programs is None:
                raise SystemExit("error: there is no PostgreSQL on this machine: apt-get install postgresql")
            database = PostgresServer(programs, parent)
            stack.callback(database.remove)
            database.start()
        uri = database.create_database("mlflow") if database is not None else None
        server = MlflowServer(Path(folder), uri, workers=workers)
        stack.callback(server.kill)
        server.start()
        yield server, database


def main() -> None:
    """Measure each combination of the numbers given, one after the other, on one server."""
    parser = argparse.ArgumentParser(prog="python -m tests.integration.tracking_load", description=__doc__)
    parser.add_argument("--store", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--workers", type=int, default=1, help="processes of the mlflow server that answer")
    parser.add_argument("--trials", type=int, nargs="+", default=[Load.trials])
    parser.add_argument("--seconds", type=float, default=Load.seconds)
    parser.add_argument("--record-every", type=float, nargs="+", default=[Load.record_every])
    parser.add_argument("--interval", type=float, nargs="+", default=[Load.interval])
    parser.add_argument("--processes", type=int, default=Load.processes)
    parser.add_argument("--folder", default="/tmp", help="where the store lies while it is measured")
    options = parser.parse_args()
    load = Load(seconds=options.seconds, processes=options.processes)
    with serving(options.store, options.workers, options.folder) as (server, database):
        for trials, record_every, interval in itertools.product(options.trials, options.record_every, options.interval):
            load = replace(load, trials=trials, record_every=record_every, interval=interval)
            result = measure(server, load, database)
            figures = ", ".join(f"{name} {number:.3g}" for name, number in asdict(result).items())
            print(
                f"{options.store}, {load}: {'keeps up' if result.keeps_up else 'FALLS BEHIND'}; {figures}", flush=True
            )


if __name__ == "__main__":
    main()
