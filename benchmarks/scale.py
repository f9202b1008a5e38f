"""What grows with a search or a corpus, beside how it would be done without care for that.

    python benchmarks/scale.py FOLDER --trials 1000 3000 --output scale.json

One process, one thread; both ways in turns, median and range of the rounds (one round of records and importance). The
records lie in a folder each of whose reads takes 20 ms, as of an object store. Windows are 64 of 128 bytes of a file of
which nothing is in memory. The folder must be on a disk, with room for 4 GB.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from rich.console import Console

from raytrain.analysis.figures import importance
from raytrain.analysis.tables import LiveTable, trial_table
from raytrain.config.models import ByteLstmConfig
from raytrain.config.schema import RunConfig
from raytrain.data import synthetic
from raytrain.data.batches import TrainingBatches
from raytrain.data.corpus import Corpus, CorpusWriter, advise
from raytrain.data.vocabulary import PAD, STOP
from raytrain.metrics import METRIC, REQUIRED_METRICS, SearchObjective
from raytrain.runs.trials import RECORD, TRIALS, Trial, TrialStore, read_record
from raytrain.storage.local import FolderStorage

LATENCY_S = 0.02
FILE_BYTES = 4 << 30
Way = Callable[[], Any]


class FarStorage(FolderStorage):
    """A folder that answers as late as an object store."""

    def read(self, key: str) -> bytes:
        time.sleep(LATENCY_S)
        return super().read(key)


def compare(
    plain: Way, now: Way, rounds: int, clock: Callable[[], float], prepare: Way = lambda: None
) -> dict[str, Any]:
    """Return the milliseconds of both ways, called in turns."""
    times: dict[str, list[float]] = {"plain": [], "now": []}
    for _ in range(rounds):
        for name, way in (("plain", plain), ("now", now)):
            prepare()
            start = clock()
            way()
            times[name].append(1e3 * (clock() - start))
    return times


def make_trials(num: int) -> list[Trial]:
    """Return the trials of a search that nearly has ended."""
    config = RunConfig(model=ByteLstmConfig())
    return [
        Trial(
            number=number,
            identity=f"trial-{number}",
            config=config,
            params={},
            distributions={},
            fields={f"optimizer.field_{field}": 1e-3 * (number + field) for field in range(8)},
            status="running" if number >= num - 8 else "finished",
            best={**dict.fromkeys(REQUIRED_METRICS, 1.0), METRIC: 1 + number * 37 % 101 / 100},
        )
        for number in range(num)
    ]


def live_table(trials: list[Trial]) -> dict[str, Any]:
    table = LiveTable(len(trials), SearchObjective("bound"))
    table.console = Console(file=StringIO(), width=160, height=48, force_terminal=True)
    table.trials = {trial.number: trial for trial in trials}
    draw = table.console.render_lines
    return compare(lambda: draw(trial_table(trials, "trials")), lambda: draw(table.renderable()), 5, time.process_time)


def records(trials: list[Trial], folder: Path) -> dict[str, Any]:
    """The records as a start reads them: for the plan, and once more when the search has been taken."""
    storage = FarStorage(folder / f"records-{len(trials)}")
    store = TrialStore(storage)
    for trial in trials:
        store.add(trial)

    def one_by_one() -> None:
        for _ in range(2):
            [read_record(storage, key) for key in storage.list(TRIALS) if key.endswith(f"/{RECORD}")]

    return compare(one_by_one, lambda: store.read(store.read()), 1, time.perf_counter)


def make_study(num: int) -> optuna.Study:
    """Return a study of nine parameters, one of them conditional."""
    chance, study = random.Random(0), optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(num):
        point = study.ask()
        values = [point.suggest_float(f"x{place}", 0, 1) for place in range(8)]
        more = point.suggest_float("y", 0, 1) if chance.random() < 0.5 else 0.0
        study.tell(point, sum(place * value**2 for place, value in enumerate(values, 1)) + more)
    return study


def assess(study: optuna.Study, most: int, subsets: int) -> None:
    """Compute the importances from so many trials, with intervals from so many subsets of them."""
    importance.MOST_TRIALS, importance.SUBSETS = most, subsets
    importance.importances(study)


def importances(num: int) -> dict[str, Any]:
    """fANOVA over all trials and over at most as many as it takes, without intervals."""
    study, most = make_study(num), importance.MOST_TRIALS
    return compare(lambda: assess(study, num, 0), lambda: assess(study, most, 0), 1, time.process_time)


def intervals(num: int) -> dict[str, Any]:
    """fANOVA without intervals and with them, over at most as many trials as it takes."""
    study, most, subsets = make_study(num), importance.MOST_TRIALS, importance.SUBSETS
    return compare(lambda: assess(study, most, 0), lambda: assess(study, most, subsets), 1, time.process_time)


def documents(folder: Path, batch_size: int) -> dict[str, Any]:
    path = folder / "documents"
    if not path.exists():
        with CorpusWriter(path, name="documents", source="benchmark") as writer:
            for text, _ in synthetic.documents(0, 200_000):
                writer.add("train", text)
            for text, _ in synthetic.documents(1, 500):
                writer.add("valid", text)
    config = RunConfig(model=ByteLstmConfig(), sampling="documents", length=160, batch_size=batch_size)
    batches = TrainingBatches(Corpus.open(path), config)
    samples, split, step = batches.samples, batches.samples.split, 0
    positions, length = batches._draw(step)

    def draw() -> None:
        nonlocal positions, length, step
        step += 1
        positions, length = batches._draw(step)

    def row_by_row() -> None:
        tokens = np.full((len(positions), length), PAD, dtype=np.int64)
        for row, number in zip(tokens, split.by_length[positions], strict=True):
            start, end = split.offsets[number], split.offsets[number + 1] - 1
            row[: end - start] = split.stream[start:end]
            row[end - start] = STOP

    return compare(row_by_row, lambda: samples.tokens(positions, length), 60, time.perf_counter, draw)


def cold_windows(folder: Path) -> dict[str, Any]:
    path = folder / "large.bin"
    if not path.exists():
        block = np.random.default_rng(0).integers(0, 256, 1 << 26, dtype=np.uint8).tobytes()
        with path.open("wb") as file:
            for _ in range(FILE_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())
    plain, advised = (np.memmap(path, dtype=np.uint8, mode="r") for _ in range(2))
    advise(advised, mmap.MADV_RANDOM)
    chance = np.random.default_rng(1)

    def forget() -> None:
        for stream in (plain, advised):
            advise(stream, mmap.MADV_DONTNEED)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(stream: Any) -> None:
        positions = chance.integers(0, FILE_BYTES - 128, 64)
        stream[positions[:, None] + np.arange(128)].astype(np.int64)

    return compare(lambda: read(plain), lambda: read(advised), 30, time.perf_counter, forget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for a corpus, records and a file of 4 GB; they stay there")
    parser.add_argument("--trials", type=int, nargs="+", default=[1000])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[str, list[float]]] = {}

    def keep(name: str, times: dict[str, list[float]]) -> None:
        measured[name] = times
        (plain, now) = (f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})" for each in times.values())
        ratio = statistics.median(times["plain"]) / statistics.median(times["now"])
        print(f"{name}: {plain} ms, now {now} ms: {ratio:.1f} times", flush=True)

    for num in arguments.trials:
        trials = make_trials(num)
        keep(f"live table of {num} trials", live_table(trials))
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            keep(f"records of {num} trials", records(trials, Path(scratch)))
        keep(f"importance over {num} trials", importances(num))
        keep(f"importance over {num} trials without and with intervals", intervals(num))
    for batch_size in arguments.batch_sizes:
        keep(f"{batch_size} documents", documents(arguments.folder, batch_size))
    keep("64 cold windows", cold_windows(arguments.folder))
    if arguments.output is not None:
        versions = {"python": platform.python_version(), "numpy": np.__version__, "optuna": optuna.__version__}
        arguments.output.write_text(json.dumps({"milliseconds": measured, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
