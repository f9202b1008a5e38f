"""A search of many short trials, one after the other on one Ray cluster, and what its processes hold meanwhile.

python -m tests.faults.soak --workers 1
python -m tests.faults.soak --workers 2 --output samples.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.support.holdings import Holding, holdings
from tests.support.machine import Machine, kill
from tests.support.mlflow_server import MlflowServer
from tests.support.nodes import Nodes
from tests.support.tiny import SPACE, TINY, write_text

TRIALS, SETTLED = 60, 20
"""Trials of a search, and those after which nothing may grow any more."""
LIMIT_S = 4 * 3600
"""A search that takes longer hangs; alone on the machine it takes two minutes."""
INTERVAL_S = 1.0
ENDED = re.compile(r"^trial \d+ (?:finished|stopped|early_stopped|failed)", re.MULTILINE)
Figure = Callable[[Holding], float]


def megabytes(holding: Holding) -> float:
    return holding.memory / 2**20


def files(holding: Holding) -> float:
    return holding.files


def threads(holding: Holding) -> float:
    return holding.threads


def one(holding: Holding) -> float:
    """To be summed: the number of processes."""
    return 1.0


@dataclass(frozen=True)
class Sample:
    """What all processes held at a moment."""

    seconds: float
    ended: int
    """Trials that had ended."""
    holdings: list[Holding]

    def total(self, figure: Figure, role: str | None = None) -> float:
        return sum(figure(holding) for holding in self.holdings if role in (None, holding.role))


@dataclass(frozen=True)
class Soak:
    """A search that has ended, as it was seen from outside."""

    trials: int
    samples: list[Sample] = field(default_factory=list)
    actors: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Trials that had ended -> actors that were alive, and all that Ray knew of, dead ones too."""

    def roles(self) -> list[str]:
        """What the processes were while trials ran, the largest first."""
        settled = self.window(SETTLED, self.trials)
        roles = dict.fromkeys(holding.role for sample in settled for holding in sample.holdings)
        return sorted(roles, key=lambda role: -self.median(megabytes, role, settled))

    def window(self, first: int, end: int) -> list[Sample]:
        """The samples of the trials ``first`` to ``end`` (from 0, without ``end``)."""
        return [sample for sample in self.samples if first <= sample.ended < end]

    def median(self, figure: Figure, role: str | None, samples: list[Sample]) -> float:
        return statistics.median(sample.total(figure, role) for sample in samples)

    def range(self, figure: Figure, role: str | None, samples: list[Sample]) -> tuple[float, float]:
        """The lowest and the highest."""
        values = [sample.total(figure, role) for sample in samples]
        return min(values), max(values)


def soak(folder: Path, server: MlflowServer, workers: int, trials: int = TRIALS) -> Soak:
    """Run the search, one trial of so many workers at a time, and watch it.

    Raises:
        AssertionError: the search failed.
    """
    nodes = Nodes(folder)
    try:
        nodes.add("one", cpus=workers)
        return _watched(folder, server, nodes, workers, trials)
    finally:
        nodes.close()


def _watched(folder: Path, server: MlflowServer, nodes: Nodes, workers: int, trials: int) -> Soak:
    variables = {name: value for name, value in nodes.environment.items() if name.startswith("RAY_")}
    machine = Machine(folder / "here", {**variables, "RAY_ADDRESS": nodes.address, "MLFLOW_TRACKING_URI": server.uri})
    write_text(machine.folder / "text.txt")
    (machine.folder / "space.py").write_text(SPACE)
    process = machine.start(
        "-m", "raytrain.tune", "hybrid", *TINY, "--data", "text.txt", "--storage", "runs", "--space", "space.py",
        "--num-samples", str(trials), "--max-concurrent", "1", "--workers-per-trial", str(workers), "--name", "soak",
    )  # fmt: skip
    assert server.pid is not None
    roots = nodes.pid, process.pid, server.pid
    result, began, looked = Soak(trials), time.monotonic(), -INTERVAL_S
    try:
        while process.poll() is None:
            now, ended = time.monotonic() - began, len(ENDED.findall(machine.output()))
            assert now < LIMIT_S, machine.output()[-3000:]
            before = result.samples[-1].ended if result.samples else -1
            if ended != before or now - looked >= INTERVAL_S:
                looked = now
                result.samples.append(Sample(now, ended, [each for root in roots for each in holdings(root)]))
            # seldom: to ask is work for the dashboard, which is watched too
            if ended != before and 0 < ended < trials and ended % 10 == 0:
                result.actors[ended] = count_actors(nodes.address)
            time.sleep(0.1)
        assert process.returncode == 0, machine.output()[-3000:]
    finally:
        kill(process)
    return result


def count_actors(address: str) -> tuple[int, int]:
    """Actors that are alive, and all that Ray knows of."""
    from ray.util.state import list_actors

    actors = list_actors(address, limit=10_000)
    return sum(actor.state != "DEAD" for actor in actors), len(actors)


def table(result: Soak) -> str:
    """Markdown: medians over the ten trials after ``SETTLED`` and over the last ten."""
    first, last = result.window(SETTLED, SETTLED + 10), result.window(result.trials - 10, result.trials)
    lines = ["| process | number | MB | open files | threads |", "|---|---|---|---|---|"]
    for role in [*result.roles(), None]:
        cells = [role or "all"]
        for figure, digits in ((one, 0), (megabytes, 1), (files, 0), (threads, 0)):
            before, after = (result.median(figure, role, samples) for samples in (first, last))
            cells.append(f"{before:.{digits}f}, {after:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run one search and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="workers of a trial")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--output", type=Path, help="a file for the samples, one JSON object a line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raytrain-soak-") as folder:
        server = MlflowServer(Path(folder) / "mlflow", start_timeout_s=600)
        server.start()
        try:
            result = soak(Path(folder), server, options.workers, options.trials)
        finally:
            server.kill()
    if options.output is not None:
        options.output.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in result.samples))
    print(table(result))
    print(f"{result.samples[-1].seconds:.0f} s; actors alive and known after so many trials: {result.actors}")


if __name__ == "__main__":
    main()
