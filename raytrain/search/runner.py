"""Running a search: Ray Tune set up with our searcher, scheduler and recorder, run, and finished."""

from __future__ import annotations

import shutil
import tempfile
import time
from typing import Any

from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import TrialScheduler

from raytrain.analysis.tables import LiveTable
from raytrain.cluster.environment import set_up_search
from raytrain.cluster.ray_internals import TUNE_VARIABLES
from raytrain.metrics import METRIC
from raytrain.runs.trials import Trial, TrialStore
from raytrain.search.algorithms import make_scheduler
from raytrain.search.finish import finish
from raytrain.search.recorder import SearchStopper, TrialRecorder
from raytrain.search.searcher import OptunaSearcher, Search
from raytrain.search.trainables import run_alone, run_worker_group
from raytrain.training.supervisor import RETRIES
from raytrain.utils.errors import UserError


def keep_keys_from_ray() -> None:
    """Keep Tune from putting AWS keys into its trials' runtime environment, whose values Ray writes to its logs."""
    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
    TUNE_VARIABLES.difference_update(keys)


def run_and_finish(search: Search) -> list[Trial]:
    """Run the search with a live table, register its best model and print the result; return every trial.

    Raises:
        BaseException: whatever ended the search, once its MLflow run says so and the command that resumes it is
            printed.
        LeaseLostError: another driver has taken the search over; nothing is said of it.
    """
    started = time.monotonic()
    try:
        with LiveTable(search.plan.num_samples) as table:
            trials = run_search(search, table.show)
        search.lease.confirm()
        finish(search, trials, time.monotonic() - started)
    except BaseException as error:
        search.lease.confirm()
        interrupted = isinstance(error, KeyboardInterrupt)
        search.parent.finish("KILLED" if interrupted else "FAILED", "interrupted" if interrupted else repr(error))
        print(f"resume with: {search.resume_command}", flush=True)
        raise
    finally:
        search.lease.release()
    return trials


def run_search(search: Search, show: Any) -> list[Trial]:
    """Run all trials that have not ended; return every trial. ``show(trial)`` is called whenever one has changed.

    Raises:
        KeyboardInterrupt: the user stopped it; trials under way are recorded as interrupted.
        UserError: the sampler raised an error; likewise.
    """
    set_up_search()
    keep_keys_from_ray()
    scheduler = make_scheduler(search.plan)
    records = TrialStore(search.location)
    known = records.read()
    searcher = OptunaSearcher(search, records, known, scheduler)
    recorder = TrialRecorder(searcher, show)
    for trial in known:
        show(trial)
    num_left = search.plan.num_samples - sum(trial.ended for trial in known)
    scratch = searcher.scratch = tempfile.mkdtemp(prefix="raytrain-tune-")
    try:
        if num_left > 0:
            try:
                make_tuner(search, searcher, recorder, scheduler, num_left).fit()
            except TuneError:
                if searcher.failure is None:
                    raise
        if searcher.failure is not None:
            raise UserError(f"the sampler {search.plan.algorithm} failed: {searcher.failure!r}") from searcher.failure
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        recorder.close()
        records.close()
    return searcher.trials


def make_tuner(
    search: Search, searcher: OptunaSearcher, recorder: TrialRecorder, scheduler: TrialScheduler, num_left: int
) -> tune.Tuner:
    """Return Ray Tune, set to run what is left of the search."""
    alone = search.worker_spec.workers == 1
    # the driver of a worker group takes no CPU from its workers; on the head it outlives every worker node
    resources = search.worker_spec.per_worker if alone else {"CPU": 0, "node:__internal_head__": 0.001}
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
            stop=SearchStopper(recorder, search.time_budget),
            verbose=0,
            # a worker group is restarted by its driver
            failure_config=tune.FailureConfig(max_failures=RETRIES if alone else 0),
        ),
    )
