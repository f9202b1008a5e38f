"""One run or search of a campaign from its begin to its end, with the faults that hit it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from raytrain.training.supervisor import RETRIES
from tests.faults.campaign import checks
from tests.faults.campaign.cluster import Cluster
from tests.faults.campaign.journal import Fault
from tests.faults.campaign.kinds import Kind, NotNow
from tests.faults.campaign.scenario import Result, Scenario
from tests.faults.campaign.steps import progress, read_steps, toll

START_S = 600.0
"""Longest time from a command to its first step."""
BACK_S = 600.0
"""Longest time from the end of a fault to the next new step."""
END_S = 900.0
"""Longest time from the last fault to the end of the command."""
PAUSE_S = (2.0, 8.0)
"""From one fault's end to the next."""


Injected = tuple[Kind, float, float]
"""A fault with the times of its injection and of the first new step after it."""


class Stuck(Exception):
    """The run does not go on."""


class Episode:
    """One run or search; ``play`` injects faults into it."""

    def __init__(self, cluster: Cluster, scenario: Scenario, name: str, folder: Path) -> None:
        self.cluster = cluster
        self.scenario = scenario
        self.folder = folder
        self.began = time.time()
        scenario.prepare(folder)
        for file in cluster.steps.glob("*.steps"):
            file.unlink()
        cluster.begin(folder, scenario.command, name, scenario.steps)

    def play(self, kinds: Sequence[type[Kind]], chance: random.Random, injected: list[Injected]) -> None:
        """Inject one fault after the other and note each in ``injected``; those that the run does not live to see not.

        Raises:
            Stuck: the run did not go on after a fault, or ended with an error.
        """
        self.wait(lambda: progress(read_steps(self.cluster.steps)) > 0, START_S, "a first step")
        spent = 0
        for kind in kinds:
            fault = kind()
            at = self.inject(fault, chance) if self.pause(chance.uniform(*PAUSE_S)) else None
            if at is None:
                return
            injected.append((fault, at, time.time()))
            injected[-1] = (fault, at, self.recover(fault, at, chance))
            spent += fault.retried
            if fault.hits_storage or spent == RETRIES:
                # until the next fault the checkpoints that waited have been written, and the retries are there again
                self.pause(1.5 * self.interval_s)
                spent = 0

    @property
    def interval_s(self) -> float:
        """Seconds between two checkpoints."""
        return self.scenario.checkpoint_every * self.cluster.pace_s

    def pause(self, seconds: float) -> bool:
        """Let training go on for that time; false if it came to its end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.cluster.ended() is None:
            time.sleep(0.1)
        return self.cluster.ended() is None

    def inject(self, fault: Kind, chance: random.Random) -> float | None:
        """Inject it as soon as it can be; returns the time, ``None`` if the run came to its end before."""
        deadline = time.monotonic() + START_S
        while self.cluster.ended() is None:
            at = time.time()
            try:
                fault.inject(self.cluster, chance)
                return at
            except NotNow:
                time.sleep(0.2)
            if time.monotonic() > deadline:
                raise Stuck(f"for {START_S:.0f} s there was nothing that {fault.name} could hit")
        return None

    def recover(self, fault: Kind, at: float, chance: random.Random) -> float:
        """Hold the fault, mend it, and wait for a step that was not done before; returns its time."""
        before = {step.trainer for step in read_steps(self.cluster.steps) if step.at <= at}
        time.sleep(chance.uniform(*fault.hold_s))
        fault.heal(self.cluster)
        healed = time.time()
        found: list[float] = []

        def moved() -> bool:
            reached: dict[str, int] = {}
            for step in read_steps(self.cluster.steps):
                new = step.number > reached.get(step.run, 0)
                reached[step.run] = max(reached.get(step.run, 0), step.number)
                anew = step.trainer not in before if fault.another_group else step.at > healed
                if new and anew and step.at > at:
                    found.append(step.at)
                    return True
            return self.cluster.ended() is not None

        self.wait(moved, BACK_S, f"a new step after {fault.name}")
        self.wait(
            lambda: len(self.cluster.coordinators()) <= 1,
            BACK_S,
            f"end of what worker groups have left after {fault.name}",
        )
        return found[0] if found else time.time()

    def wait(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Stuck(f"after {seconds:.0f} s still no {what}")
            if self.cluster.ended() not in (None, 0):
                raise Stuck(f"the command ended with status {self.cluster.ended()} instead of {what}")
            time.sleep(0.3)

    def finish(self) -> Result:
        """Wait for the end and look at what came of it.

        Raises:
            Stuck: it did not end, or not well; the reasons are in the message.
        """
        self.wait(lambda: self.cluster.ended() is not None, END_S, "end")
        if self.cluster.ended():
            raise Stuck(f"the command ended with status {self.cluster.ended()}")
        wrong = checks.left(self.cluster)
        result, own = checks.collect(self.cluster, self.scenario)
        wrong += own
        if self.scenario.searches:
            wrong += checks.champion(self.cluster)
        if wrong:
            raise Stuck("; ".join(wrong))
        return result

    def costs(self, injected: list[Injected], seed: int, number: int) -> list[Fault]:
        """What each fault has cost, judged by itself."""
        steps = read_steps(self.cluster.steps)
        faults = []
        for index, (kind, at, back) in enumerate(injected):
            until = injected[index + 1][1] if index + 1 < len(injected) else time.time()
            repeated = toll(steps, at, until).repeated
            fault = Fault(
                seed=seed,
                episode=number,
                scenario=self.scenario.name,
                kind=kind.name,
                at_s=round(at - self.began, 1),
                step=progress(step for step in steps if step.at <= at),
                repeated=repeated,
                back_s=round(toll(steps, at, back).stood_s, 1),
                wrong="",
            )
            most = kind.intervals * self.scenario.checkpoint_every + self.scenario.in_flight
            if repeated > most:
                fault = replace(fault, wrong=f"{repeated} steps were done again, more than {most}")
            faults.append(fault)
        return faults
