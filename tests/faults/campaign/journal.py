"""The log of a campaign: JSON lines, one a fault, from which it goes on and the table is made."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raytrain.utils.text import table
from tests.faults.campaign.kinds import KINDS, Kind


@dataclass(frozen=True)
class Fault:
    """One injected fault and what came of it."""

    seed: int
    episode: int
    """Number of the run or search that it hit."""
    scenario: str
    kind: str
    at_s: float
    """Seconds since the run began."""
    step: int
    """How many steps had been done."""
    repeated: int
    """Steps that were done again because of it."""
    back_s: float
    """Seconds until a step was done that had not been done before."""
    wrong: str
    """What was not as it should be, empty if it was survived."""


class Journal:
    """Faults, the ends of episodes and references, each written down as soon as it is known."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self._entries: list[dict[str, Any]] = [json.loads(line) for line in lines]

    @property
    def faults(self) -> list[Fault]:
        """All faults of episodes that came to their end."""
        return [Fault(**entry["fault"]) for entry in self._entries if "fault" in entry]

    @property
    def episodes(self) -> int:
        """How many episodes there were, whatever came of them."""
        return sum("episode" in entry for entry in self._entries)

    def close_episode(self, number: int, seconds: float, wrong: list[str], faults: list[Fault]) -> None:
        """Write down an episode with its faults: all or, if the campaign dies meanwhile, nothing of it."""
        entries = [{"fault": asdict(fault)} for fault in faults]
        self._add([*entries, {"episode": number, "seconds": round(seconds, 1), "wrong": wrong}])

    def reference(self, key: str) -> Any:
        """What an undisturbed run gave, ``None`` if there was none."""
        found = [entry["result"] for entry in self._entries if entry.get("reference") == key]
        return found[-1] if found else None

    def add_reference(self, key: str, result: Any) -> None:
        self._add([{"reference": key, "result": result}])

    def _add(self, entries: list[dict[str, Any]]) -> None:
        with self._file.open("a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self._entries += json.loads(json.dumps(entries))


def choose(faults: list[Fault], chance: random.Random, num: int, names: list[str]) -> list[type[Kind]]:
    """The next kinds to inject into one run: those that are furthest behind their quota, in random order."""
    counts = {name: sum(fault.kind == name for fault in faults) for name in names}
    chosen: list[type[Kind]] = []
    for _ in range(num):
        name = min(names, key=lambda name: (counts[name] / KINDS[name].quota, chance.random()))
        counts[name] += 1
        chosen.append(KINDS[name])
    chance.shuffle(chosen)
    return chosen


def summary(faults: list[Fault]) -> str:
    """One row a kind, as a table in Markdown."""
    rows = []
    for name, kind in KINDS.items():
        mine = [fault for fault in faults if fault.kind == name]
        if not mine:
            continue
        repeated, back = [fault.repeated for fault in mine], [fault.back_s for fault in mine]
        rows.append(
            [
                kind.what,
                str(len(mine)),
                str(sum(not fault.wrong for fault in mine)),
                f"{statistics.median(repeated):.0f}, {max(repeated)}",
                f"{statistics.median(back):.1f}, {max(back):.1f}",
            ]
        )
    total = [f"all, in {len({(fault.seed, fault.episode) for fault in faults})} runs and searches", str(len(faults))]
    rows.append([*total, str(sum(not fault.wrong for fault in faults)), "", ""])
    heads = ["fault", "injected", "survived", "steps repeated: median, most", "seconds to be back: median, most"]
    return table(heads, rows)
