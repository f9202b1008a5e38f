"""Tries malformed inputs of each kind in a process of its own, so that one that kills it is counted too."""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from raytrain.models import ladder as ladders
from raytrain.tracking.client import check_tracking
from tests.faults.malformed import checkpoint_kinds, command_kinds, data_kinds, record_kinds
from tests.faults.malformed.oracle import LIMIT_S, Case, Stopwatch, Verdict, judge, no_cluster, sums
from tests.faults.malformed.properties import PROPERTIES, Property
from tests.faults.malformed.stock import Stock, make_stock

Maker = Callable[[Stock, Path, Random], Callable[[], None]]

KINDS: dict[str, tuple[int, Maker]] = {
    "plain text": (300, data_kinds.text),
    "gzip": (300, data_kinds.packed),
    "JSON lines": (400, data_kinds.json_lines),
    "Parquet": (300, data_kinds.parquet),
    "folders": (150, data_kinds.folders),
    "prepared corpus": (600, data_kinds.corpus),
    "checkpoint, altered": (500, checkpoint_kinds.altered),
    "checkpoint, sealed again": (400, checkpoint_kinds.resealed),
    "checkpoint, resumed": (200, checkpoint_kinds.resumed),
    "reference": (200, checkpoint_kinds.reference),
    "config": (400, record_kinds.config),
    "search space": (200, record_kinds.space),
    "search.json": (250, record_kinds.plan),
    "trial.json": (250, record_kinds.trial),
    "run.json": (150, record_kinds.claim),
    "lease": (150, record_kinds.lease),
    "outcome.json": (150, record_kinds.outcome),
    "unsent metrics": (150, record_kinds.unsent),
    "trials.parquet": (150, record_kinds.trials_table),
    "cluster file": (250, record_kinds.cluster_file),
    "storage address": (150, command_kinds.address),
    "train, tune, bench, loop": (400, command_kinds.trains),
    "sample, evaluate": (250, command_kinds.models),
    "report": (50, record_kinds.report_of),
    "report, registry, data, ...": (250, command_kinds.others),
}
"""Kind of input -> its weight, and what makes one: it writes to the folder that must not change."""
DRAWN = 100
"""The weight of each of hypothesis's properties."""
MEMORY = 4 * 2**30
"""Bytes of address space that an input may take."""
STUCK_S = 60.0
"""Seconds, as a ``Stopwatch`` has them, after which a process that not even a signal reaches is killed."""


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Number of the input, and what was wrong."""
    seconds: float = 0.0


def shares(count: int) -> dict[str, int]:
    """How many inputs of each kind make ``count`` in all, or a few more."""
    weights = {name: weight for name, (weight, _) in KINDS.items()} | dict.fromkeys(PROPERTIES, DRAWN)
    return {name: -(-count * weight // sum(weights.values())) for name, weight in weights.items()}


def run(folder: Path, seed: int, counts: dict[str, int], failures: Path, only: int | None = None) -> dict[str, Tally]:
    """Try the inputs; those that fail are copied to ``failures``.

    Args:
        folder: for all that is made; must not exist.
        only: the number of a single input of each kind, to do it again.
    """
    stock = Stock(folder / "stock")
    with _environment(folder), no_cluster():
        _import_all()
        list(_forked(lambda answer: answer(make_stock(stock.folder) is not None)))
        return {name: _run_kind(name, stock, seed, count, failures, only) for name, count in counts.items()}


def _import_all() -> None:
    """Whatever the commands import when they need it: that takes seconds, and must not be ended half way."""
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking
    import optuna

    from raytrain.analysis import evaluation, run_report, search_report, tables
    from raytrain.bench import measure
    from raytrain.search import finish as results
    from raytrain.search import runner as search

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert all((mlflow, evaluation, results, run_report, search, search_report, tables, measure))


def _run_kind(name: str, stock: Stock, seed: int, count: int, failures: Path, only: int | None) -> Tally:
    tally, began, given = Tally(), time.monotonic(), sums(stock.folder)
    make = partial(_drawn, name) if name in PROPERTIES else partial(_made, name)
    next_number, stop = (0, count) if only is None else (only, only + 1)
    while next_number < stop:
        for number, result, detail in _forked(partial(make, stock, seed, next_number, stop, failures)):
            next_number = number + 1
            tally.counts[result] += 1
            if result == "failure":
                tally.failures.append((number, detail))
        if next_number < stop:
            tally.counts["failure"] += 1
            tally.failures.append((next_number, "the process was killed or did not answer"))
            next_number += 1
    logged = os.fsencode(stock.folder / "mlflow")  # its database and artifacts: some commands log
    kept = os.fsencode(f"/{ladders.FILE}")  # kept beside a corpus by whatever shows it first
    differing = {path for path, _ in sums(stock.folder).items() ^ given.items()}
    changed = {path for path in differing if not path.startswith(logged) and not path.endswith(kept)}
    if changed:
        tally.counts["failure"] += 1
        tally.failures.append((stop, f"what all inputs are made of has changed: {min(changed)!a}"))
    tally.seconds = time.monotonic() - began
    return tally


def _made(
    name: str, stock: Stock, seed: int, first: int, stop: int, failures: Path, answer: Callable[[Any], None]
) -> None:
    check_tracking(stock.tracking)  # the first connection of a process takes a second
    for number in range(first, stop):
        folder = stock.folder.parent / f"{name.replace(',', '').replace(' ', '-')}-{number}"

        def attempt(number: int = number, folder: Path = folder) -> Verdict:
            shutil.rmtree(folder, ignore_errors=True)
            for part in ("in", "work"):
                (folder / part).mkdir(parents=True)
            random = Random(f"{seed}/{name}/{number}")
            os.environ["RAYTRAIN_CACHE"] = str(folder / "work" / "cache")
            return judge(Case(folder, KINDS[name][1](stock, folder / "in", random)))

        verdict = attempt()
        if verdict.result == "slow":  # a disk that others use may have been waited for: only twice counts
            verdict = attempt()
        answer((number, *_kept(verdict, folder, failures)))


def _drawn(
    name: str, stock: Stock, seed: int, first: int, stop: int, failures: Path, answer: Callable[[Any], None]
) -> None:
    import hypothesis

    entry: Property = PROPERTIES[name]
    numbers = iter(range(first, stop))

    @hypothesis.seed(seed + first)
    @hypothesis.settings(
        max_examples=stop - first, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(entry.values)
    def each(value: Any) -> None:
        number = next(numbers)
        folder = stock.folder.parent / f"{name.replace(' ', '-')}-{number}"
        for part in ("in", "work", "drawn"):
            (folder / part).mkdir(parents=True)
        verdict = judge(Case(folder, lambda: entry.read(value, folder / "drawn")))
        (folder / "value.txt").write_text(ascii(value))
        answer((number, *_kept(verdict, folder, failures)))

    each()
    for number in numbers:  # there are fewer values than were asked for: all of them were tried
        answer((number, "none", ""))


def _kept(verdict: Verdict, folder: Path, failures: Path) -> tuple[str, str]:
    """The verdict as words; the input is kept if it is a failure."""
    result = "failure" if verdict.result == "slow" else verdict.result
    if result == "failure":
        kept = failures / folder.name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept, symlinks=True, ignore=_no_file)
        (kept / "what.txt").write_text(verdict.detail, "utf-8", "backslashreplace")
    shutil.rmtree(folder, ignore_errors=True)
    return result, verdict.detail


def _no_file(parent: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(parent) / name).is_file() and not (Path(parent) / name).is_dir()]


def _forked(work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """What ``work`` answers, in a process of its own; ends early where that is killed or does not answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            _, most = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, most))
            work(lambda item: _write_all(writer, json.dumps(item).encode() + b"\n"))
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            os._exit(status)
    os.close(writer)
    watch = Stopwatch(child)
    with os.fdopen(reader, "rb", buffering=0) as answers:  # a buffer would hide from select what has come
        while True:
            if select.select([answers], [], [], STUCK_S / 4)[0]:
                if not (line := answers.readline()):
                    break
                yield json.loads(line)
                watch = Stopwatch(child)
            elif watch.seconds() > STUCK_S:
                break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class _environment:
    """Variables that keep every input within its folder and away from any network."""

    def __init__(self, folder: Path) -> None:
        self.values = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'stock' / 'mlflow.db'}",
            "HOME": str(folder / "home"),
            "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_REGION": "us-east-1",
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> None:
        self.before = dict(os.environ)
        os.environ.update(self.values)
        os.environ.pop("RAYTRAIN_STORAGE", None)

    def __exit__(self, *_: object) -> None:
        os.environ.clear()
        os.environ.update(self.before)


def table(tallies: dict[str, Tally]) -> str:
    """The tallies as Markdown."""
    head = ("kind", "inputs", "clean errors", "correct results", "failures", "seconds")
    rows = []
    for name, tally in tallies.items():
        tried = [tally.counts[result] for result in ("clean", "correct", "failure")]
        rows.append((name, sum(tried), *tried, round(tally.seconds)))
    rows.append(("all", *(sum(int(row[location]) for row in rows) for location in range(1, 6))))
    return "\n".join(
        [
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        ]
    )


assert LIMIT_S < STUCK_S
