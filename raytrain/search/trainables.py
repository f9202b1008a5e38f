"""Trainables of Ray Tune: the driver of a trial's worker group, or the trial's only worker."""

from __future__ import annotations

import os
from typing import Any

from ray import tune

from raytrain.cluster.environment import set_up_trial
from raytrain.config.workers import WorkerSpec
from raytrain.training.supervisor import run_with_retries
from raytrain.training.worker import Job, run_in_process, worker_loop
from raytrain.training.worker_group import WorkerGroup

_HELD: list[WorkerGroup] = []
"""The worker group of this process, if it is the driver of one. It lives as long as the process."""


def run_worker_group(values: dict[str, Any]) -> None:
    """Run a trial of several workers: Tune's trainable is a driver without CPUs that waits for its worker group.

    Its process, and with it the worker group, runs one trial after the other.
    """
    if values["refused"]:
        return  # the space has made no config of the trial's point
    set_up_trial()
    if not _HELD:
        # where the driver of the search runs on another machine, its folder is made here too
        os.makedirs(values["scratch"], exist_ok=True)
        _HELD.append(WorkerGroup(worker_loop, WorkerSpec(**values["worker_spec"]), values["name"], values["scratch"]))
    run_with_retries(Job(**values["job"]), _HELD[0], tune.report)


def run_alone(values: dict[str, Any]) -> None:
    """Run a trial of one worker: Tune's trainable has the worker's resources and trains by itself.

    Its process runs one trial after the other, so that only the first waits for the process to start.
    """
    if values["refused"]:
        return
    set_up_trial()
    run_in_process(Job(**values["job"]), WorkerSpec(**values["worker_spec"]), tune.report)
