"""The command of the campaign; see the package."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from tests.faults.campaign import __doc__ as about
from tests.faults.campaign.cluster import PACE_S, Cluster
from tests.faults.campaign.episode import Episode, Injected, Stuck
from tests.faults.campaign.journal import Fault, Journal, choose, summary
from tests.faults.campaign.kinds import KINDS
from tests.faults.campaign.scenario import SCENARIOS, Result, Scenario
from tests.support import lab

PER_EPISODE = 14
"""Faults in one run or search at most: it may end before."""


def main() -> int:
    """Inject what is still to be injected, or print the table."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="LOG", help="print the results in a log, and nothing else")
    parser.add_argument("--log", type=Path, default=Path("campaign.jsonl"), help="goes on where this log ends")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, help="how many the log is to have in the end; default: all quotas")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=["run", "run", "run", "search"])
    parser.add_argument("--per-episode", type=int, default=PER_EPISODE, help="faults in one run or search at most")
    parser.add_argument("--work", type=Path, help="folder for the servers' data and the output; default: a new one")
    options = parser.parse_args()
    if options.table is not None:
        print(summary(Journal(options.table).faults), end="")
        return 0
    if not lab.enclosed():
        if (reason := lab.why_not()) is not None:
            print(f"error: no lab on this machine: {reason}", file=sys.stderr)
            return 2
        return lab.enclose("-m", "tests.faults.campaign", *sys.argv[1:])
    work = options.work or Path(tempfile.mkdtemp(prefix="raytrain-campaign-"))
    print(f"work in {work}", flush=True)
    campaign = Campaign(options, Journal(options.log.resolve()), work.resolve())
    well = campaign.run()
    if well and options.work is None:
        shutil.rmtree(work)
    return 0 if well else 1


class Campaign:
    """Episodes one after the other, until the log has all faults that were asked for."""

    def __init__(self, options: argparse.Namespace, journal: Journal, work: Path) -> None:
        self.options = options
        self.journal = journal
        self.work = work
        self.cluster = Cluster(work, options.seed)

    def run(self) -> bool:
        """Whether everything was survived."""
        well = True
        try:
            self.cluster.start_ray()
            while (missing := self.missing) > 0:
                known = len(self.journal.faults)
                well &= self.episode(min(missing, self.options.per_episode))
                if len(self.journal.faults) == known:
                    print("no fault could be injected: given up", file=sys.stderr)
                    return False
        finally:
            self.cluster.close()
        return well

    @property
    def missing(self) -> int:
        """How many faults are still to be injected."""
        faults = self.journal.faults
        if self.options.faults is not None:
            return int(self.options.faults) - len(faults)
        counts = Counter(fault.kind for fault in faults)
        return sum(max(0, KINDS[name].quota - counts[name]) for name in self.options.kinds)

    def episode(self, num: int) -> bool:
        """One run or search with ``num`` faults; whether it was survived."""
        number = self.journal.episodes
        scenario = SCENARIOS[self.options.scenarios[number % len(self.options.scenarios)]]
        chance = random.Random(f"{self.options.seed}/{number}")
        kinds = choose(self.journal.faults, chance, num, self.options.kinds)
        expected = self.reference(scenario)
        name = f"c{self.options.seed}-{number:03d}-{time.time_ns() // 10**9}"
        print(f"{name} ({scenario.name}): {', '.join(kind.name for kind in kinds)}", flush=True)
        episode = Episode(self.cluster, scenario, name, self.work / name)
        injected: list[Injected] = []
        wrong: list[str] = []
        try:
            episode.play(kinds, chance, injected)
            wrong += expected.differences(episode.finish())
        except Stuck as error:
            wrong.append(str(error))
        faults = episode.costs(injected, self.options.seed, number)
        if wrong:
            # which of its faults did it cannot be told: none of them counts as survived
            faults = [replace(fault, wrong="; ".join(filter(None, [fault.wrong, *wrong]))) for fault in faults]
        self.journal.close_episode(number, time.time() - episode.began, wrong, faults)
        for fault in faults:
            print(f"  {line(fault)}", flush=True)
        if wrong:
            print(f"  wrong: {'; '.join(wrong)} (see {episode.folder})", flush=True)
            self.renew(episode.folder)
        return not wrong and not any(fault.wrong for fault in faults)

    def reference(self, scenario: Scenario) -> Result:
        """What the scenario ends with if nothing happens: from the log, or run now.

        Raises:
            Stuck: it does not end well even so.
        """
        known = self.journal.reference(scenario.key)
        if known is None:
            print(f"{scenario.name}, undisturbed", flush=True)
            self.cluster.set_pace(0)
            name = f"reference-{scenario.key}-{time.time_ns() // 10**9}"
            known = asdict(Episode(self.cluster, scenario, name, self.work / name).finish())
            self.cluster.set_pace(PACE_S)
            self.journal.add_reference(scenario.key, known)
        return Result.from_json(known)

    def renew(self, folder: Path) -> None:
        """Keep what Ray wrote, and start a new cluster for the next episode."""
        for host in self.cluster.lab.hosts.values():
            logs = next(iter(sorted((host.disk / "ray").glob("session_2*/logs"))[::-1]), None)
            if logs is not None:
                shutil.copytree(logs, folder / f"ray-{host.name}", ignore_dangling_symlinks=True, dirs_exist_ok=True)
        self.cluster.repair()


def line(fault: Fault) -> str:
    """One fault in words."""
    end = f"NOT SURVIVED: {fault.wrong}" if fault.wrong else "survived"
    cost = f"{fault.repeated} steps repeated, {fault.back_s:.1f} s to be back"
    return f"{fault.kind} at step {fault.step} ({fault.at_s:.0f} s): {cost}, {end}"


if __name__ == "__main__":
    sys.exit(main())
