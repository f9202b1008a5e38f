"""What a campaign disturbs: a run and a search, each small, with what an undisturbed one ends with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.campaign.cluster import ROOT
from tests.support.tiny import TINY

LOG_EVERY = 10
SPACE = """
ALGORITHM = "grid"
def space(trial):
    return {"optimizer.learning_rate": trial.suggest_categorical("rate", [3e-3, 5e-3, 1e-2])}
"""
TRIALS = 3


@dataclass(frozen=True)
class Scenario:
    """One kind of work for the cluster."""

    name: str
    steps: int
    """Of a run, or of each trial; a multiple of ``evaluate_every``."""
    checkpoint_every: int
    evaluate_every: int
    searches: bool = False

    @property
    def command(self) -> list[str]:
        """The command, but for its name and experiment."""
        every = ["--checkpoint-every", str(self.checkpoint_every), "--evaluate-every", str(self.evaluate_every)]
        own = [*TINY, "--steps", str(self.steps), *every, "--data", "text.txt", "--cpus-per-worker", "1"]
        if self.searches:
            return ["raytrain.tune", "hybrid", *own, "--space", "space.py", "--workers-per-trial", "2"]
        return ["raytrain.train", "hybrid", *own, "--workers", "2"]

    @property
    def key(self) -> str:
        """Changes when the command or the product does."""
        sum_ = hashlib.sha256(json.dumps([self.command, SPACE]).encode())
        for file in sorted((ROOT / "raytrain").rglob("*.py")):
            sum_.update(file.read_bytes())
        return f"{self.name}-{sum_.hexdigest()[:16]}"

    @property
    def in_flight(self) -> int:
        """Steps that may be done while a checkpoint is on its way."""
        return self.checkpoint_every // 2

    def prepare(self, folder: Path) -> None:
        """Write the text and the search space that the command reads."""
        from tests.support.tiny import write_text

        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "text.txt")
        (folder / "space.py").write_text(SPACE)


SCENARIOS = {
    "run": Scenario("run", steps=4000, checkpoint_every=200, evaluate_every=500),
    "search": Scenario("search", steps=1000, checkpoint_every=100, evaluate_every=250, searches=True),
    "short": Scenario("short", steps=1500, checkpoint_every=100, evaluate_every=300),
}


@dataclass(frozen=True)
class Result:
    """What a run or search ended with; equal, bit for bit, if nothing was lost and nothing false was kept."""

    tensors: dict[str, dict[str, str]]
    """Of each run (a trial by its number): file of tensors -> SHA-256 sum, in the checkpoint of the last step."""
    metrics: dict[str, str]
    """Of each run the SHA-256 sum of all its metrics but those that the clock decides."""
    winner: str
    """The best trial; of a run nothing."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Result:
        return cls(**values)

    def differences(self, other: Result) -> list[str]:
        """What of ``other``, the disturbed one, is not as here, in words."""
        lines = []
        for what in ("tensors", "metrics"):
            mine, others = getattr(self, what), getattr(other, what)
            if mine.keys() != others.keys():
                lines.append(f"there are {what} of {sorted(others)} instead of {sorted(mine)}")
            lines += [f"other {what} of {name}" for name in mine.keys() & others.keys() if mine[name] != others[name]]
        if self.winner != other.winner:
            lines.append(f"the best trial is {other.winner} instead of {self.winner}")
        return lines
