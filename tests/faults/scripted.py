"""Trials whose metrics and failures follow a script, in real worker groups of Ray Train.

The search uses ``run_worker_group`` of this module. Everything is the product's own but the metrics of an
evaluation and the failures.
"""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from raytrain.config.workers import WorkerSpec
from raytrain.search import runner as search
from raytrain.search import trainables
from raytrain.training import supervisor, worker, worker_group
from raytrain.training import trainer as loop
from raytrain.training.worker import Job

STEPS = 16
SPACE = """
def space(trial):
    # the trial's number travels in a field that its training does not use
    return {"objective.alpha": trial.number / 1000, "objective.annealing": "constant"}
"""
SCRIPT = (
    "good", "good", "raises", "bad", "always killed", "bad", "nan", "good", "late", "bad", "killed once", "bad",
)  # fmt: skip
"""What becomes of each trial. The first two are good: the first at a rung is never stopped."""
ENDS = {
    "good": ("finished", STEPS, ""),
    "killed once": ("finished", STEPS, ""),
    "bad": ("stopped", STEPS // 8, "others were better"),
    "late": ("stopped", STEPS // 4, "others were better"),
    "raises": ("failed", 0, "ValueError: scripted"),
    "always killed": ("failed", 0, "died"),
    "nan": ("early_stopped", 0, "not finite"),
}
"""Status, last step and reason that each kind of trial must end with."""


def bits(number: int, step: int) -> float:
    """What the trial's evaluation says, such that ASHA decides the same in whatever order trials come to a rung.

    Good ones are all alike, and so never worse than the median there; a bad one is worse than all before it.
    """
    kind = SCRIPT[number]
    bad = kind == "bad" or (kind == "late" and step > STEPS // 8)
    return 5.0 + number / 10 if bad else 2.0 - step / 1000


def number_of(config: dict[str, Any]) -> int:
    """The trial that a config belongs to."""
    return round(config["objective"]["alpha"] * 1000)


def run_worker_group(values: dict[str, Any]) -> None:
    """Replacement of ``trainables.run_worker_group``, in the process of the trial's driver."""
    kind = SCRIPT[number_of(values["job"]["config"])]
    if "killed" in kind:
        # a worker group of its own, which is killed while it starts
        dismiss_workers()
        os.makedirs(values["scratch"], exist_ok=True)
        callbacks = [Killer(kind, values["scratch"])]
        supervisor.RETRIES = 1
        trainables._HELD.append(
            worker_group.WorkerGroup(
                worker_loop, WorkerSpec(**values["worker_spec"]), kind, values["scratch"], callbacks
            )
        )
    trainables.worker_loop = worker_loop
    try:
        _REAL_GROUP(values)
    finally:
        if "killed" in kind:
            dismiss_workers()


_REAL_GROUP = trainables.run_worker_group


def dismiss_workers() -> None:
    """Dismiss the workers, so that this driver's next trial starts with new ones."""
    while trainables._HELD:
        trainables._HELD.pop().dismiss()


class Killer(WorkerGroupCallback):
    """Kills the second worker of a group while the group is starting."""

    def __init__(self, kind: str, scratch: str) -> None:
        self.kind = kind
        self.scratch = scratch

    def before_init_train_context(self, workers: list[Any]) -> dict[str, Any]:
        """The processes are there, and have not been told what to do."""
        once = Path(self.scratch) / "killed-once"
        if self.kind == "killed once" and not once.exists():
            once.touch()
            os.kill(workers[1].metadata.pid, signal.SIGKILL)
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        """The workers have found each other, and have not begun to train."""
        if self.kind == "always killed":
            os.kill(worker_group.get_workers()[1].metadata.pid, signal.SIGKILL)


def worker_loop(values: dict[str, Any]) -> None:
    """Replacement of ``worker.worker_loop``, in each worker."""
    worker.run = run
    _REAL_LOOP(values)


_REAL_LOOP = worker.worker_loop


def run(job: Job, world: Any, send: Any, node: int | None) -> None:
    """Replacement of ``worker.run``."""
    number = number_of(job.config)
    kind = SCRIPT[number]

    def scripted_evaluate(trainer: Any, draws: int) -> dict[str, float]:
        trainer.scripted_step += trainer.config.evaluate_every
        figures = _REAL_EVALUATE(trainer, draws)
        return figures if kind == "nan" else {**figures, "bits_per_byte": bits(number, trainer.scripted_step)}

    def scripted_step(trainer: Any, step: int) -> Any:
        if kind == "raises":
            raise ValueError(f"scripted at step {step}")
        if kind == "nan":
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(math.nan)
        return _REAL_STEP(trainer, step)

    loop.Trainer.scripted_step = 0
    loop.Trainer.evaluate, loop.Trainer.train_step = scripted_evaluate, scripted_step
    _REAL_RUN(job, world, send, node)


_REAL_RUN = worker.run
_REAL_EVALUATE, _REAL_STEP = loop.Trainer.evaluate, loop.Trainer.train_step


def main() -> None:
    """``raytrain.tune`` with scripted trials."""
    import raytrain.tune as tune
    from raytrain.utils.errors import run_command

    search.run_worker_group = run_worker_group
    run_command(tune.main)


if __name__ == "__main__":
    from tests.faults import scripted  # so that workers find everything under its name

    scripted.main()
