from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

from raytrain.config.schema import ObjectiveConfig, RunConfig, to_dict
from raytrain.config.workers import WorkerSpec
from raytrain.metrics import RUNG, SearchObjective
from raytrain.runs.records import OUTCOME
from raytrain.search.algorithms import Halving
from raytrain.storage import base
from raytrain.storage.base import Storage, StorageError
from raytrain.storage.lease import Holder, Lease, LeaseLostError, take
from raytrain.storage.local import FolderStorage
from raytrain.tracking.metric_writer import MetricWriter
from raytrain.training import supervisor, worker
from raytrain.training.divergence import DivergedError
from raytrain.training.early_stopping import EarlyStoppedError
from raytrain.training.preemption import PreemptedError
from raytrain.training.supervisor import WorkerGroupLostError, run_with_retries
from raytrain.training.trainer import World
from raytrain.training.worker import Job, RayReporter, run_in_process
from raytrain.utils import retry as retry_module
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.unit.storage.test_storage import Away


def a_job(config: RunConfig[Any], location: Path | str = "", **changes: Any) -> Job:
    return Job(config=to_dict(config), corpus={}, storage=str(location), tracking={}, cpus=1.0, **changes)


@pytest.mark.parametrize(
    ("objective", "comparable"),
    [
        (ObjectiveConfig(annealing="linear", start=0.0, end=0.5), [50, 75]),
        (ObjectiveConfig(annealing="cyclical", start=0.0, end=0.3), [50, 75]),
        (ObjectiveConfig(annealing="constant"), [25, 50, 75]),
    ],
)
def test_a_trial_can_be_stopped_only_between_its_annealing_and_its_last_step(
    objective: ObjectiveConfig, comparable: list[int]
) -> None:
    config = tiny_config("hybrid", steps=100, evaluate_every=25, objective=objective)
    reported: list[dict[str, Any]] = []
    report = RayReporter(a_job(config), config, rank=1, node=None, send=reported.append)
    for step in (25, 50, 75, 100):
        report.evaluated(step, {"bound": 1.0})
    assert [result["step"] for result in reported if RUNG in result] == comparable
    # the scheduler looks at nothing else
    assert Halving(config.steps, SearchObjective())._time_attr == RUNG


def test_evaluations_that_the_driver_has_not_recorded_are_sent_again_and_judged_as_before() -> None:
    config = tiny_config("hybrid", steps=400, objective=ObjectiveConfig(annealing="constant"))
    sent: list[dict[str, Any]] = []
    job = a_job(config, reported=100, baseline=1.0)
    report = RayReporter(job, config, rank=1, node=None, send=sent.append)
    metrics = {"bound": 40.0, "bits_per_byte": 1.0, "reconstruction": 40.0}
    report.resumed([{"step": step, **metrics} for step in (100, 150, 200)])
    assert sent == [{"step": 150, **metrics, RUNG: 150}, {"step": 200, **metrics, RUNG: 200}]
    with pytest.raises(EarlyStoppedError):
        report.resumed([{"step": 300, **metrics, "bits_per_byte": 2.0}])


def test_a_resumed_search_stops_what_earlier_trials_have_beaten() -> None:
    from types import SimpleNamespace

    fresh, told = Halving(80, SearchObjective()), Halving(80, SearchObjective())
    for number in range(4):
        told.recall(f"known-{number}", [{"step": 10, "bits_per_byte": 2.0 + number / 10, RUNG: 10}, {"step": 5}])
    for scheduler, decision in ((fresh, "CONTINUE"), (told, "STOP")):
        scheduler.set_search_properties("bits_per_byte", "min")
        trial = SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, {"bits_per_byte": 2.4, RUNG: 10}) == decision


class Silent:
    """Takes the place of the report that writes to MLflow."""

    closed = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def close(self, storage: Any) -> int:
        Silent.closed += 1
        return 0


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the worker of a run whose training raises the given error; returns its outcome."""
    monkeypatch.setattr(worker, "RayReporter", Silent)
    monkeypatch.setattr("raytrain.training.worker.open_anywhere", lambda address: None)
    monkeypatch.setattr(Silent, "closed", 0)
    job = a_job(tiny_config("hybrid"), tmp_path)

    def fail(error: BaseException, world: World | None = None) -> Any:
        def train(*arguments: Any) -> None:
            raise error

        monkeypatch.setattr("raytrain.training.worker.train", train)
        if world is not None:
            return worker.run(job, world, print, node=None)
        return run_in_process(job, WorkerSpec(1, 1.0, 0.0), print)

    return fail


def test_an_error_that_comes_back_ends_a_run_at_once(failing: Any) -> None:
    assert failing(DivergedError("not finite", last_good=20)) == {
        "early_stopped": "not finite",
        "last_good": 20,
        "unsent": 0,
    }
    assert failing(ValueError("no such layer"))["error"] == "ValueError: no such layer"
    assert Silent.closed == 2


def test_a_run_that_is_to_leave_losses_and_finds_no_corpus_leaves_the_error(
    failing: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def open_anywhere(address: Any) -> None:
        raise ValueError("the corpus is damaged")

    monkeypatch.setattr("raytrain.training.worker.open_anywhere", open_anywhere)
    outcome = run_in_process(a_job(tiny_config("hybrid"), tmp_path, losses=True), WorkerSpec(1, 1.0, 0.0), print)
    assert outcome == {"error": "ValueError: the corpus is damaged", "samples": [], "unsent": 0}


def test_an_error_that_may_not_come_back_is_left_to_those_who_start_the_run_again(failing: Any, tmp_path: Path) -> None:
    for error in (StorageError("away"), RuntimeError("connection closed by peer")):
        with pytest.raises(type(error)):
            failing(error)
    # another worker of the group may be waiting for this one
    with pytest.raises(ValueError, match="only here"):
        failing(ValueError("only here"), World(rank=1, size=2))
    assert not (tmp_path / OUTCOME).exists()


def test_a_worker_whose_driver_was_followed_by_another_records_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(worker, "RayReporter", Silent)
    monkeypatch.setattr("raytrain.training.worker.open_anywhere", lambda address: None)
    monkeypatch.setattr(Silent, "closed", 0)
    held = Lease(FolderStorage(tmp_path), 1, Holder.here())
    job = a_job(tiny_config("hybrid"), tmp_path / "trials" / "a", fence=held.fence.address())

    def train(config: Any, corpus: Any, world: Any, storage: Storage, *_: Any) -> None:
        storage.write("step-1/model", b"before")
        take(FolderStorage(tmp_path), 1, "s").release()
        storage.write("step-2/model", b"after")

    monkeypatch.setattr("raytrain.training.worker.train", train)
    with pytest.raises(LeaseLostError, match="was taken over by user"):
        run_in_process(job, WorkerSpec(1, 1.0, 0.0), print)
    assert FolderStorage(tmp_path / "trials").list() == ["a/checkpoints/step-1/model"]
    assert Silent.closed == 1


def test_a_stopped_trial_leaves_no_thread_to_the_next_one_in_its_process(failing: Any) -> None:
    with pytest.raises(SystemExit):
        failing(SystemExit(0))
    assert Silent.closed == 1


@pytest.mark.parametrize(
    "record", [[1, 2], [1, 2, {"a": []}], ["x", 2, {}], [1e999, 2, {}], [1, 2, 3], [1, 2, {"a\n": 1}]]
)
def test_metrics_of_a_checkpoint_that_are_none_end_the_run_by_one_line(record: list[Any]) -> None:
    report = object.__new__(RayReporter)
    report.writer = MetricWriter("http://127.0.0.1:9", "0" * 32)
    with pytest.raises(UserError, match="the newest checkpoint keeps metrics that are none"):
        report.replay([record])
    assert report.writer.close(0.0) == 0


class Dying:
    """Stands in for a worker group: each of its runs ends as scripted, and may have completed a checkpoint before."""

    def __init__(self, location: Path, *ends: tuple[Exception | None, int | None]) -> None:
        self.location, self.ends = location, list(ends)

    def train(self, job: dict[str, Any], send: Any) -> None:
        error, step = self.ends.pop(0)
        if step is not None:
            FolderStorage(self.location).write(f"checkpoints/step-{step:08}/manifest.json", b"{}")
        if error is not None:
            raise error
        FolderStorage(self.location).write(OUTCOME, b'{"early_stopped": "as scripted"}')


def died(which: str = "one") -> Exception:
    return WorkerGroupError("a worker died", {0: RayActorError(error_msg=f"Worker {which} died.\nSIGKILL")})


def noticed(which: str) -> Exception:
    """A death as Ray Train's controller tells it, with what Ray itself knows of it."""
    said = f"""The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tpid: 12
\tip: 10.0.0.{which}
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"""
    failure = WorkerHealthCheckFailedError("A worker health check failed.", RayActorError(error_msg=said))
    return WorkerGroupError("a worker died", {0: failure})


def dead_controller() -> Exception:
    return ControllerError(RayActorError(error_msg="The controller died."))


def raised(error: Exception) -> Exception:
    return WorkerGroupError("a worker raised", {1: error})


def outlive(location: Path, *ends: tuple[Exception | None, int | None]) -> dict[str, Any]:
    worker_spec: Any = Dying(location, *ends)
    outcome = run_with_retries(a_job(tiny_config("hybrid"), location), worker_spec, print)
    assert not worker_spec.ends
    return outcome


def test_a_run_outlives_as_many_deaths_as_come_while_it_gets_on(tmp_path: Path) -> None:
    deaths = [(died(), step) for step in (None, None, None, 10, None, None, 20, None)]
    assert outlive(tmp_path, *deaths, (None, None)) == {"early_stopped": "as scripted"}


def test_processes_that_ray_ends_for_lack_of_memory_have_died_like_others(tmp_path: Path) -> None:
    """Of a worker, of the controller and of the coordinator: each is followed by another group."""
    full = OutOfMemoryError("the node's memory is nearly used up")
    ends = (raised(full), ControllerError(full), full)
    assert outlive(tmp_path, *((end, None) for end in ends), (None, None)) == {"early_stopped": "as scripted"}


def test_a_worker_group_that_dies_while_the_storage_is_away_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the S3 server that was killed at the end of a trial: what failed first is not all that fails."""
    monkeypatch.setattr(retry_module.time, "sleep", lambda seconds: None)
    monkeypatch.setenv(base.PATIENCE, "60")
    monkeypatch.setattr(supervisor, "open_storage", lambda uri: Away(Path(uri)))

    class Unreachable(Dying):
        def train(self, job: dict[str, Any], send: Any) -> None:
            Away.refusals = 5
            super().train(job, send)

    worker_spec: Any = Unreachable(tmp_path, (raised(StorageError("nobody answers")), None), (None, None))
    job = a_job(tiny_config("hybrid"), tmp_path)
    assert run_with_retries(job, worker_spec, print) == {"early_stopped": "as scripted"}
    assert worker_spec.ends == []


def test_to_wait_for_places_is_no_failure(tmp_path: Path) -> None:
    nowhere: list[tuple[Exception | None, int | None]] = [
        (ControllerError(WorkerGroupStartupTimeoutError(2)), None)
    ] * 9
    assert outlive(tmp_path, (died(), None), *nowhere, (died(), None), (None, None)) == {"early_stopped": "as scripted"}


def test_a_run_that_dies_without_getting_on_ends_with_the_first_cause(tmp_path: Path) -> None:
    with pytest.raises(WorkerGroupLostError, match=r"4 worker groups in a row.*Worker one died") as lost:
        outlive(
            tmp_path, (died("zero"), 10), (died("one"), 20), (dead_controller(), None), (died(), None), (died(), None)
        )
    assert "SIGKILL" not in str(lost.value)


def test_deaths_that_the_controller_tells_of_are_deaths(tmp_path: Path) -> None:
    assert outlive(tmp_path / "thrice", *[(noticed("7"), None)] * 3, (None, None)) == {"early_stopped": "as scripted"}
    where = r"the first: RayTrainWorker on 10\.0\.0\.7: The actor is dead because its worker process has died$"
    with pytest.raises(WorkerGroupLostError, match=where):
        outlive(tmp_path / "lost", *[(noticed(which), None) for which in "7895"])


def test_an_error_that_comes_back_ends_a_run_and_a_certain_one_at_once(tmp_path: Path) -> None:
    reset = raised(RuntimeError("connection reset by peer"))
    assert outlive(tmp_path / "once", (reset, None), (None, None)) == {"early_stopped": "as scripted"}
    resets = [(raised(RuntimeError(f"connection reset by 10.0.0.{number}")), None) for number in range(3)]
    assert outlive(tmp_path / "thrice", *resets, (None, None)) == {"early_stopped": "as scripted"}
    with pytest.raises(WorkerGroupLostError, match=r"2 worker groups in a row.*connection reset by peer"):
        outlive(tmp_path / "again", (reset, None), (reset, None))
    with pytest.raises(WorkerGroupLostError, match=r"3 worker groups in a row.*Worker one died"):
        outlive(tmp_path / "meanwhile", (died(), None), (reset, None), (reset, None))
    assert outlive(tmp_path / "later", (reset, None), (reset, 10), (None, None)) == {"early_stopped": "as scripted"}
    with pytest.raises(WorkerGroupError):
        outlive(tmp_path / "certain", (raised(ValueError("no such layer")), None))


def test_a_trial_whose_machine_is_to_go_ends_in_the_error_that_tune_does_not_count(
    failing: Any, tmp_path: Path
) -> None:
    with pytest.raises(RayActorError) as raised:
        failing(PreemptedError("saved at step 7"))
    assert raised.value.preempted
    assert str(raised.value) == "saved at step 7"
    assert Silent.closed == 1
    assert not (tmp_path / OUTCOME).exists()
