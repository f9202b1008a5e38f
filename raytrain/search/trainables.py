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
"""The worker group of this process, if it drives one. It lives as long as the process."""


def run_worker_group(values: dict[str, Any]) -> None:
    """Run a trial of several workers: Tune's trainable is a driver without CPUs that waits for its worker group.

    The driver's process, and with it the worker group, runs one trial after another.
    """
    if values["refused"]:
        return  # the space made no config from the trial's point
    set_up_trial()
    if not _HELD:
        # if the driver of the search is on another machine, create its folder here too
        os.makedirs(values["scratch"], exist_ok=True)
        _HELD.append(WorkerGroup(worker_loop, WorkerSpec(**values["worker_spec"]), values["name"], values["scratch"]))
    run_with_retries(Job(**values["job"]), _HELD[0], tune.report)


def run_alone(values: dict[str, Any]) -> None:
    """Run a trial of one worker: Tune's trainable has the worker's resources and trains by itself.

    Its process runs one trial after another, so that only the first waits for the process to start.
    """
    if values["refused"]:
        return
    set_up_trial()
    run_in_process(Job(**values["job"]), WorkerSpec(**values["worker_spec"]), tune.report)
