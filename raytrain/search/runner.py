"""Running a search: sets up Ray Tune with our searcher, scheduler and recorder, runs it, and finishes the search."""

from __future__ import annotations

import shutil
import tempfile
import time
from typing import Any

from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.error import TuneError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raytrain.analysis.tables import LiveTable
from raytrain.cluster.environment import set_up_search
from raytrain.cluster.ray_internals import TUNE_VARIABLES, ActorManager
from raytrain.metrics import METRIC
from raytrain.runs.records import UNSENT, add_unsent, read_outcome
from raytrain.runs.repeats import searched
from raytrain.runs.trials import Trial, TrialStore, trial_location
from raytrain.search.algorithms import make_scheduler
from raytrain.search.finish import best_checkpoint, finish
from raytrain.search.population import is_extinct
from raytrain.search.progress import SearchProgress
from raytrain.search.recorder import MLFLOW_STATUS, SearchStopper, TrialRecorder
from raytrain.search.searcher import OptunaSearcher, Search
from raytrain.search.study import StudyFile
from raytrain.search.trainables import run_alone, run_worker_group
from raytrain.storage.base import StorageError, retry_storage
from raytrain.tracking.client import TRACKING_ERRORS, explain, is_deleted
from raytrain.tracking.outbox import Outbox
from raytrain.tracking.unsent import parse_lines
from raytrain.training.supervisor import RETRIES
from raytrain.utils.errors import UserError

ENDED_S, INTERRUPTED_S = 120.0, 5.0
"""How long the final states of trials wait for MLflow when a search ends: if it is complete, or interrupted."""


def keep_keys_from_ray() -> None:
    """Keep Tune from putting AWS keys into its trials' runtime environment, because Ray logs that environment."""
    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
    TUNE_VARIABLES.difference_update(keys)


def survive_lack_of_memory() -> None:
    """Let Tune restart a trial whose process Ray killed for lack of memory, as it does after any other death."""
    original = ActorManager._actor_task_failed
    if getattr(original, "survives", False):
        return

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:  # Tune calls it with these names
        out_of_memory = isinstance(exception, OutOfMemoryError)
        original(self, tracked_actor_task, RayActorError(error_msg=str(exception)) if out_of_memory else exception)

    failed.survives = True  # type: ignore[attr-defined]
    ActorManager._actor_task_failed = failed


def run_and_finish(search: Search) -> list[Trial]:
    """Run the search with a live table, register its best model and print the result; return every trial.

    Raises:
        BaseException: whatever ended the search, after recording it in the search's MLflow run and printing the command
            that resumes the search.
        LeaseLostError: another driver has taken the search over; nothing is printed or recorded.
    """
    started = time.monotonic()
    try:
        confirm = search.plan.confirm
        num_trials = search.plan.num_samples + (0 if confirm is None else confirm.num_trials)
        with LiveTable(num_trials, search.plan.search_objective) as table:
            trials = run_search(search, table.show)
        search.lease.confirm()
        record_result(search, trials, time.monotonic() - started)
    except BaseException as error:
        search.lease.confirm()
        print(f"resume with: {search.resume_command}", flush=True)
        interrupted = isinstance(error, KeyboardInterrupt)
        outbox = Outbox(search.parent.uri)
        outbox.end(
            search.parent.run_id, "KILLED" if interrupted else "FAILED", "interrupted" if interrupted else repr(error)
        )
        outbox.close(INTERRUPTED_S)  # unsent records are dropped: the search continues when it is resumed
        raise
    finally:
        search.lease.release()
    return trials


def record_result(search: Search, trials: list[Trial], seconds: float) -> None:
    """Print and log the result of a search; only print it if somebody has deleted its MLflow run.

    Raises:
        UserError: as ``finish``, or MLflow does not accept the result.
    """
    try:
        finish(search, trials, seconds)
    except StorageError:
        raise
    except TRACKING_ERRORS as error:
        if not is_deleted(search.parent.uri, search.parent.run_id, error):
            raise UserError(
                f"the search has ended, but its result is not recorded in MLflow: {explain(error)}; "
                f"{search.resume_command} records it"
            ) from None
        found = best_checkpoint(search, trials)
        best = f"; best trial {found[0].name}: {found[1].uri}" if found is not None else ""
        print(f"the search's MLflow run has been deleted: no report is recorded, no model is registered{best}")


def run_search(search: Search, show: Any) -> list[Trial]:
    """Run all trials that have not ended; return every trial.

    ``show(trial, outlook)`` is called whenever a trial has changed; ``outlook()`` describes the search's progress.

    Raises:
        KeyboardInterrupt: the user stopped it; running trials are recorded as interrupted.
        UserError: the sampler raised an error; running trials are recorded likewise.
    """
    set_up_search()
    keep_keys_from_ray()
    survive_lack_of_memory()
    scheduler = make_scheduler(search.plan)
    study = StudyFile(search.name, search.plan, search.location, search.lease.fence)
    records = TrialStore(search.location, study.keep)
    known = records.read(search.known)
    searcher = OptunaSearcher(search, records, known, scheduler)
    outbox, patience_s = Outbox(search.parent.uri), INTERRUPTED_S
    progress = SearchProgress(searcher, show, outbox)
    recorder = TrialRecorder(searcher, progress.hear, outbox)
    stopper = SearchStopper(recorder, search.time_budget)
    searcher.scratch = tempfile.mkdtemp(prefix="raytrain-tune-")
    try:
        study.begin(known)
        # inside the block: what is taken from the storage is then only in the outbox, which is kept on every exit
        for record in take_unsent(search, known):
            outbox.put(record)
        say_ends(search, known, outbox)
        for trial in known:
            show(trial, str)
        num_left = search.plan.num_samples - sum(trial.ended for trial in searched(known))
        num_left = 0 if is_extinct(search.plan, known) else num_left
        run_trials(searcher, recorder, scheduler, stopper, num_left)
        if search.plan.confirm is not None and not recorder.ending:
            # whatever the scheduler of the search: no confirming trial is stopped early
            run_trials(searcher, recorder, FIFOScheduler(), stopper, searcher.begin_confirmation())
        patience_s = ENDED_S
    finally:
        shutil.rmtree(searcher.scratch, ignore_errors=True)
        recorder.close()
        progress.close()
        study.close()
        records.close()
        keep_unsent(search, outbox.close(patience_s))
    return searcher.trials


def run_trials(
    searcher: OptunaSearcher,
    recorder: TrialRecorder,
    scheduler: TrialScheduler,
    stopper: SearchStopper,
    num_left: int,
) -> None:
    """Run the next ``num_left`` trials of the search.

    Raises:
        UserError: the sampler raised an error.
    """
    if num_left > 0:
        try:
            make_tuner(searcher, recorder, scheduler, stopper, num_left).fit()
        except TuneError:
            if searcher.failure is None:
                raise
    if isinstance(searcher.failure, UserError):
        raise searcher.failure
    if searcher.failure is not None:
        algorithm = searcher.search.plan.algorithm
        raise UserError(f"the sampler {algorithm} failed: {searcher.failure!r}") from searcher.failure


def take_unsent(search: Search, known: list[Trial]) -> list[dict[str, Any]]:
    """Return the trials' final states that MLflow had not accepted before the search was resumed; delete their file.

    Raises:
        UserError: the file holds something else.
    """
    if not retry_storage(lambda: search.location.exists(UNSENT)):
        return []
    lines = retry_storage(lambda: search.location.read(UNSENT)).decode(errors="replace").splitlines()
    records = parse_lines(lines, search.location.uri(UNSENT))
    retry_storage(lambda: search.location.delete(UNSENT))
    # a trial that continues now has not ended
    ended = [trial.run.get("run_id", "") for trial in known if trial.ended]
    return [record for run_id in ended for record in records.get(run_id, [])]


def say_ends(search: Search, known: list[Trial], outbox: Outbox) -> None:
    """Report ended trials that MLflow still lists as running: a driver may die before its outbox is sent."""
    ended = {trial.identity: trial for trial in known if trial.ended}
    running = search.experiment.running(search.parent.run_id) if ended else {}
    for identity, run_id in running.items():
        if (trial := ended.get(identity)) is None:
            continue
        if trial.status == "finished" and (outcome := read_outcome(trial_location(search.location, identity).uri())):
            outbox.log_samples(run_id, outcome["samples"])
        outbox.end(run_id, MLFLOW_STATUS[trial.status], trial.reason or None, trial.ended_at or None)


def keep_unsent(search: Search, unsent: list[dict[str, Any]]) -> None:
    """Save the trials' final states that MLflow did not accept in the storage, and print how to send them."""
    if unsent:
        add_unsent(search.location, unsent)
        print(
            f"{len(unsent)} records of how trials ended did not reach MLflow: resume the search, or "
            f"python -m raytrain.tracking send {search.location.uri(UNSENT)}"
        )


def make_tuner(
    searcher: OptunaSearcher,
    recorder: TrialRecorder,
    scheduler: TrialScheduler,
    stopper: SearchStopper,
    num_left: int,
) -> tune.Tuner:
    """Return Ray Tune, set up to run the next ``num_left`` trials of the search."""
    search = searcher.search
    alone = search.worker_spec.workers == 1
    # the driver of a worker group takes no CPU from its workers; on the head node it outlives every worker node
    resources = search.worker_spec.reserved if alone else {"CPU": 0, "node:__internal_head__": 0.001}
    return tune.Tuner(
        tune.with_resources(run_alone if alone else run_worker_group, resources),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=num_left,
            max_concurrent_trials=search.concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=search.name,
            storage_path=searcher.scratch,
            callbacks=[recorder],
            stop=stopper,
            verbose=0,
            # a worker group is restarted by its own driver
            failure_config=tune.FailureConfig(max_failures=RETRIES if alone else 0),
        ),
    )
