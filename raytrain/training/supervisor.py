"""What each worker does to train a run, in a gang or alone, and how a run outlives its gang."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError
from ray.train import TrainingFailedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor

from raytrain.runs.checkpoint import newest_step
from raytrain.runs.records import CHECKPOINTS, read_outcome
from raytrain.storage import open_storage
from raytrain.storage.base import retry_storage
from raytrain.training.preemption import PreemptedError
from raytrain.training.worker import PERMANENT_ERRORS, Job, _log

if TYPE_CHECKING:
    from raytrain.training.worker_group import WorkerGroup

RETRIES = 3
"""Gangs that take over from one that died, in training or while it started, as long as no newer checkpoint comes."""
PREEMPTIONS = 100
"""Times that a run survives the loss of a machine that was announced."""


def run_with_retries(job: Job, worker_spec: WorkerGroup, send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train the run on a gang of workers; returns its outcome. ``send`` gets evaluations and may stop it by raising.

    Where a process of the gang dies, another gang goes on from the newest checkpoint: ``RETRIES`` times without a
    newer one, but not where an error comes back; where a machine is taken away with notice, ``PREEMPTIONS`` times. To
    wait for places is no failure.
    The retries are here and not in Ray's controller, which neither survives its own death, nor bounds those while
    workers start, nor tells an error that will come back from one that may not.

    Raises:
        ray.train.TrainingFailedError: an error that comes back, as it was raised.
        GangLostError: the run failed for good; the first of the causes since its newest checkpoint.
    """
    checkpoints = open_storage(job.storage).child(CHECKPOINTS)
    newest = retry_storage(lambda: newest_step(checkpoints))
    causes: list[str] = []
    preemptions = 0
    while True:
        try:
            worker_spec.train(asdict(job), send)
            return read_outcome(job.storage) or {"error": "the run ended without an outcome"}
        except (RayActorError, TrainingFailedError) as error:
            failures = _failures(error)
            if was_preempted(error) and preemptions < PREEMPTIONS:
                preemptions += 1
                _log.warning("another gang goes on from the newest checkpoint: %s", _one_line_cause(failures[0]))
                continue
            if any(isinstance(failure, PERMANENT_ERRORS) for failure in failures):
                raise
            if isinstance(failures[0], WorkerGroupStartupTimeoutError):
                _log.warning("there was no place for a gang, asking again: %s", _one_line_cause(failures[0]))
                continue
            if (step := retry_storage(lambda: newest_step(checkpoints))) != newest:
                newest, causes = step, []
            cause = _one_line_cause(failures[0])
            # a death under the others comes to them as an error too, in words of its own each time
            comes_back = cause in causes and not isinstance(failures[0], RayActorError)
            causes.append(cause)
            if comes_back or len(causes) > RETRIES:
                raise WorkerGroupLostError(
                    f"{len(causes)} gangs in a row died without a newer checkpoint; the first: {causes[0]}"
                ) from error
            _log.warning("a gang died, another goes on from its newest checkpoint: %s", causes[-1])


class WorkerGroupLostError(Exception):
    """A run whose gangs died again and again."""


def _failures(error: Exception) -> list[BaseException]:
    """What ended a gang: the errors of its workers, of its controller, or the death of either."""
    of_workers = list(getattr(error, "worker_failures", {}).values())
    failures = of_workers or [getattr(error, "controller_failure", error)]
    # a death that Ray Train's controller has noticed first
    return [getattr(failure, "health_check_failure", failure) for failure in failures]


def _one_line_cause(error: BaseException) -> str:
    """An error in one line: what its process said last, or where and of what it died."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "Traceback" in str(error):
        return lines[-1]
    told = dict(line.partition(": ")[::2] for line in lines)
    if "class_name" in told:
        why = next((line for line in lines if "because" in line), lines[0])
        return f"{told['class_name']} on {told.get('ip', 'no node')}: {why.partition('.')[0]}"
    return lines[0]


def was_preempted(error: Exception) -> bool:
    """Whether a gang has ended because a machine under it was about to go, or went after such a notice."""
    if isinstance(error, RayActorError):
        return error.preempted
    failures = getattr(error, "worker_failures", {}).values()
    return any(isinstance(failure, PreemptedError) or _is_preempted_actor(failure) for failure in failures)
