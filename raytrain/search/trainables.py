"""What Ray Tune runs for each trial: the driver of a gang, or the trial's one worker itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ray import tune

from raytrain.cluster.environment import set_up_trial
from raytrain.config.workers import WorkerSpec
from raytrain.training.supervisor import run_with_retries
from raytrain.training.worker import Job, run_in_process, worker_loop
from raytrain.training.worker_group import WorkerGroup

if TYPE_CHECKING:
    from raytrain.training.worker_group import WorkerGroup

_HELD: list[WorkerGroup] = []
"""The gang of this process, if it is the driver of one."""


def run_worker_group(values: dict[str, Any]) -> None:
    """Tune's trainable for trials of several workers: a driver without CPUs that waits for its gang.

    Its process, and with it the gang, runs one trial after the other.
    """
    set_up_trial()
    if not _HELD:
        # where the driver of the search runs on another machine, its folder is made here too
        os.makedirs(values["scratch"], exist_ok=True)
        _HELD.append(WorkerGroup(worker_loop, WorkerSpec(**values["worker_spec"]), values["name"], values["scratch"]))
    run_with_retries(Job(**values["job"]), _HELD[0], tune.report)


def run_alone(values: dict[str, Any]) -> None:
    """Tune's trainable for trials of one worker: it has the worker's resources and trains by itself.

    Its process runs one trial after the other, so that only the first waits for it to start.
    """
    set_up_trial()
    run_in_process(Job(**values["job"]), WorkerSpec(**values["worker_spec"]), tune.report)
