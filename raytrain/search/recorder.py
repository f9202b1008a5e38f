"""Recorder of a search's trials: a callback of Ray Tune that saves the state of each in the storage and in MLflow."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from raytrain.cluster.absence import Absence
from raytrain.metrics import LIKELIHOOD, METRIC, RUNG, known_metrics
from raytrain.runs.records import read_outcome
from raytrain.runs.trials import Status, Trial
from raytrain.tracking import runs as tracking

if TYPE_CHECKING:
    from raytrain.search.searcher import OptunaSearcher
    from raytrain.tracking.outbox import Outbox


MLFLOW_STATUS: dict[Status, tracking.Status] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "early_stopped": "KILLED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
"""MLflow's status for each way in which a trial ends."""


class TrialRecorder(tune.Callback):
    """Keeps the record of every trial up to date: in memory, in the storage and, through ``outbox``, in MLflow."""

    def __init__(self, searcher: OptunaSearcher, show: Any, outbox: Outbox) -> None:
        self.searcher = searcher
        self.show = show
        self.outbox = outbox
        self.ending = ""
        """Why the whole search ends before its trials have; empty as long as it runs."""
        self._heard: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its settings for snapshots, which are not used

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.searcher.trial(trial.trial_id)
        if record.ended:  # the space refused its point
            return
        record.status, record.reason = "running", ""
        self._clock(record)
        record.started_at = record.started_at or time.time()
        self._record(record)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        record = self.searcher.trial(trial.trial_id)
        step = int(result["step"])
        metrics = known_metrics(result)
        metric = self.searcher.search.plan.search_objective.metric
        if not record.best or metrics[metric] < record.best[metric]:  # as the training loop picks the best checkpoint
            record.best = metrics
        if step > record.step:
            record.step = step
            rung = {RUNG: result[RUNG]} if RUNG in result else {}
            compared = {name: metrics[name] for name in (METRIC, LIKELIHOOD, "kl", "used") if name in metrics}
            record.history.append({"step": step, **compared, **rung})
        self._clock(record)
        self._record(record)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.searcher.trial(trial.trial_id)
        outcome = read_outcome(self.searcher.location(record).uri())
        if outcome is not None and "error" in outcome:
            self._end(record, "failed", outcome["error"])
        elif outcome is not None and "early_stopped" in outcome:
            self._end(record, "early_stopped", outcome["early_stopped"])
        elif outcome is not None:
            self.outbox.log_samples(record.run["run_id"], outcome["samples"])
            self._end(record, "finished")
        elif self.ending:
            self._end(record, "interrupted", f"{self.ending} at step {record.step}")
        else:
            self._end(
                record,
                "stopped",
                f"stopped by the scheduler at step {record.step}: others were better",
            )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.searcher.trial(trial.trial_id)
        self._end(record, "failed", _cause(trial.error_file))

    def close(self) -> None:
        """Record every trial that is still running as interrupted.

        Raises:
            LeaseLostError: another driver has taken the search over; nothing is recorded.
        """
        for record in self.searcher.trials:
            if record.status == "running":
                self._end(record, "interrupted", f"the search was interrupted at step {record.step}")

    def _clock(self, record: Trial) -> None:
        """Add the time since the trial's last report. A pause before resuming is not counted."""
        now = time.monotonic()
        record.seconds += now - self._heard.get(record.identity, now)
        self._heard[record.identity] = now

    def _end(self, record: Trial, status: Status, reason: str | None = None) -> None:
        self.searcher.search.lease.confirm()
        self._clock(record)
        record.status, record.reason, record.ended_at = status, reason or "", time.time()
        self.searcher.ended(record)
        self.outbox.end(record.run["run_id"], MLFLOW_STATUS[status], reason)
        self._record(record)

    def _record(self, record: Trial) -> None:
        self.searcher.records.update(record)
        self.show(record)


_FAILURE = "Failure # "
"""Start of the line that Tune writes before each error of a trial."""


def _cause(error_file: str | None) -> str:
    """Return the line that gives the cause of a trial's last error, from the errors that Tune wrote.

    For a traceback that is the last line. For Ray's message about a dead process it is the first; advice follows it.
    """
    try:
        text = Path(error_file or "").read_text("utf-8", "replace")
    except OSError:
        text = ""
    last = text.rpartition(_FAILURE)[2] if _FAILURE in text else f"\n{text}"
    lines = last.partition("\n")[2].strip().splitlines()
    if not lines:
        return "the trial ended with an error, of which Ray kept no message"
    return lines[-1 if any(line.startswith(("Traceback", "ray::")) for line in lines) else 0]


class SearchStopper(tune.Stopper):
    """Ends the search when its time budget is used up or its sampler has failed, and tells the recorder why.

    Tune calls it continually, even while no trial runs. It therefore also watches for workers that never come.
    """

    def __init__(self, recorder: TrialRecorder, seconds: float | None) -> None:
        self._recorder = recorder
        self._absence = Absence(recorder.searcher.search.worker_spec)
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Return whether to stop all trials.

        Raises:
            LeaseLostError: another driver has taken the search over.
        """
        self._recorder.searcher.search.lease.check()
        self._absence.look()
        if self._recorder.searcher.failure is not None:
            self._recorder.ending = "the search failed"
        elif time.monotonic() >= self._deadline:
            self._recorder.ending = "the time budget was used up"
        return bool(self._recorder.ending)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # see TrialRecorder
