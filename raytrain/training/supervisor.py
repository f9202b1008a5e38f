"""Supervisor: restarts a run's worker group after a death, from the newest checkpoint, and decides when to give up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import TrainingFailedError

from raytrain.cluster.ray_internals import WorkerGroupStartupTimeoutError, is_preempted_actor
from raytrain.runs.checkpoint import newest_step
from raytrain.runs.records import CHECKPOINTS, read_outcome
from raytrain.storage import open_storage
from raytrain.storage.base import retry_storage
from raytrain.training.preemption import PreemptedError
from raytrain.training.worker import PERMANENT_ERRORS, Job

if TYPE_CHECKING:
    from raytrain.training.worker_group import WorkerGroup

RETRIES = 3
"""Maximum number of restarts without a newer checkpoint after a worker group died, in training or at its start."""
DEATHS = RayActorError, OutOfMemoryError
"""Deaths of processes: the second if Ray killed one because its node's memory was nearly used up."""
PREEMPTIONS = 100
"""Preemptions (losses of a machine with notice) that a run survives."""
_log = logging.getLogger(__name__)


def run_with_retries(job: Job, group: WorkerGroup, send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train the run on a worker group; return its outcome. ``send`` gets evaluations and may stop the run by raising.

    If a process dies, the worker group is restarted from the newest checkpoint: up to ``RETRIES`` times without a newer
    one, never for an error that repeats. Preemptions are counted apart, up to ``PREEMPTIONS``. Waiting for resources is
    not a failure. Ray Train's controller cannot do this: it does not survive its own crash, retries start-up failures
    without limit, and does not distinguish permanent from transient errors.

    Raises:
        ray.train.TrainingFailedError: an error repeats; as it was raised.
        WorkerGroupLostError: the run failed for good; with the first of the causes since its newest checkpoint.
    """
    checkpoints = open_storage(job.storage).child(CHECKPOINTS)
    newest = retry_storage(lambda: newest_step(checkpoints))
    causes: list[str] = []
    preemptions = 0
    while True:
        try:
            group.train(asdict(job), send)
            return read_outcome(job.storage) or {"error": "the run ended without an outcome"}
        except (*DEATHS, TrainingFailedError) as error:
            failures = _failures(error)
            if was_preempted(error) and preemptions < PREEMPTIONS:
                preemptions += 1
                _log.warning(
                    "a machine was taken away; restarting from the newest checkpoint: %s", _one_line_cause(failures[0])
                )
                continue
            if any(isinstance(failure, PERMANENT_ERRORS) for failure in failures):
                raise
            if isinstance(failures[0], WorkerGroupStartupTimeoutError):
                _log.warning("no resources for the worker group yet, asking again: %s", _one_line_cause(failures[0]))
                continue
            if (step := retry_storage(lambda: newest_step(checkpoints))) != newest:
                newest, causes = step, []
            cause = _one_line_cause(failures[0])
            # the other workers see a death as an error of their own, worded differently each time
            repeats = cause in causes and not isinstance(failures[0], DEATHS)
            causes.append(cause)
            if repeats or len(causes) > RETRIES:
                raise WorkerGroupLostError(
                    f"{len(causes)} worker groups in a row died without a newer checkpoint; the first: {causes[0]}"
                ) from error
            _log.warning("a worker group died; restarting from its newest checkpoint: %s", causes[-1])


class WorkerGroupLostError(Exception):
    """A run whose worker groups died again and again."""


def _failures(error: Exception) -> list[BaseException]:
    """Return the failures that ended a worker group: errors of its workers or controller, or the death of either."""
    of_workers = list(getattr(error, "worker_failures", {}).values())
    failures = of_workers or [getattr(error, "controller_failure", error)]
    # a death that Ray Train's controller saw first
    return [getattr(failure, "health_check_failure", failure) for failure in failures]


def _one_line_cause(error: BaseException) -> str:
    """Return an error as one line: the last line of its traceback, or where and why its process died."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "Traceback" in str(error):
        return lines[-1]
    parts = dict(line.partition(": ")[::2] for line in lines)
    if "class_name" in parts:
        why = next((line for line in lines if "because" in line), lines[0])
        return f"{parts['class_name']} on {parts.get('ip', 'no node')}: {why.partition('.')[0]}"
    return lines[0]


def was_preempted(error: Exception) -> bool:
    """Return whether a worker group ended because a machine was taken away after a notice, or was about to be."""
    if isinstance(error, DEATHS):
        return bool(getattr(error, "preempted", False))
    failures = getattr(error, "worker_failures", {}).values()
    return any(isinstance(failure, PreemptedError) or is_preempted_actor(failure) for failure in failures)
