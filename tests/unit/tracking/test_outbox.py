"""How runs have ended, told to MLflow from the background: in order, later where it is away, never of a deleted run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from raytrain.tracking import outbox as outboxes
from raytrain.tracking import unsent
from raytrain.tracking.metric_writer import MetricWriter
from raytrain.tracking.outbox import Outbox, send_record
from raytrain.tracking.runs import Experiment, Run
from raytrain.utils.errors import UserError
from tests.support.mlflow_server import new_store


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("store")
    return Experiment.open(new_store(folder), "outbox", str(folder / "artifacts"))


def new_run(experiment: Experiment, identity: str) -> Run:
    return experiment.open_run(identity, identity, parameters={}, tags={})


def test_what_is_said_of_a_run_is_sent_in_order(experiment: Experiment, tmp_path: Path) -> None:
    run, client = new_run(experiment, "in-order"), MlflowClient(experiment.uri)
    outbox = Outbox(experiment.uri)
    outbox.log_samples(run.run_id, ["one\ntwo", "three"])
    before = time.time_ns() // 1_000_000
    outbox.end(run.run_id, "FAILED", "it diverged")
    assert outbox.close(60) == []
    found = client.get_run(run.run_id)
    assert (found.info.status, found.data.tags["raytrain.reason"]) == ("FAILED", "it diverged")
    assert before <= found.info.end_time <= time.time_ns() // 1_000_000
    text = Path(client.download_artifacts(run.run_id, "samples.txt", str(tmp_path))).read_text()
    assert text == "one\\ntwo\nthree\n"


def test_what_mlflow_does_not_take_is_kept_and_sent_later(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, client = new_run(experiment, "later"), MlflowClient(experiment.uri)
    monkeypatch.setattr(outboxes, "FIRST_PAUSE_S", 0.01)

    def away(uri: str, record: object) -> None:
        raise MlflowException("Max retries exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(outboxes, "send_record", away)
        outbox = Outbox(experiment.uri)
        outbox.log_samples(run.run_id, ["a text"])
        outbox.end(run.run_id, "FINISHED")
        started = time.monotonic()
        kept = outbox.close(0.3)
    assert time.monotonic() - started < 5
    assert [sorted(record) for record in kept] == [
        ["name", "run_id", "text"],
        ["ended_ms", "reason", "run_id", "status"],
    ]
    assert sum("kept and sent later" in message for message in caplog.messages) == 1
    assert client.get_run(run.run_id).info.status == "RUNNING"

    file = tmp_path / "unsent_metrics.jsonl"
    metrics = {"run_id": run.run_id, "step": 3, "timestamp_ms": 5, "metrics": {"loss": 1.5}}
    file.write_text("".join(json.dumps(record) + "\n" for record in [metrics, *kept]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", experiment.uri)
    assert [line.partition(" of run")[0] for line in unsent.send_file(file, 30)] == ["sent 3 records"]
    found = client.get_run(run.run_id)
    assert (found.info.status, found.info.end_time) == ("FINISHED", kept[1]["ended_ms"])
    assert found.data.metrics == {"loss": 1.5}
    assert [item.path for item in client.list_artifacts(run.run_id)] == ["samples.txt"]


def test_what_mlflow_refuses_holds_up_nothing_behind_it(experiment: Experiment) -> None:
    """As of a run that the store has never had: it may be the wrong store, so it is kept."""
    run = new_run(experiment, "refused")
    outbox = Outbox(experiment.uri)
    outbox.end("0" * 32, "FINISHED")
    outbox.end(run.run_id, "FINISHED")
    assert [record["run_id"] for record in outbox.close(30)] == ["0" * 32]
    assert MlflowClient(experiment.uri).get_run(run.run_id).info.status == "FINISHED"


def test_a_run_that_was_deleted_stays_so_and_is_said_once(
    experiment: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    run, client = new_run(experiment, "deleted"), MlflowClient(experiment.uri)
    assert experiment.deleted_run("deleted") is None
    assert experiment.deleted_run("another") is None
    writer = MetricWriter(experiment.uri, run.run_id, interval_s=0.01)
    writer.log(1, {"loss": 2.0})
    assert writer.flush(30)
    client.delete_run(run.run_id)
    for step in range(2, 5):
        writer.log(step, {"loss": 2.0})
        assert writer.flush(30), "an evaluation would wait for nothing"
    assert (writer.pending(), writer.close()) == ([], 0)
    outbox = Outbox(experiment.uri)
    outbox.end(run.run_id, "KILLED", "stopped")
    assert outbox.close(30) == []
    assert sum("has been deleted" in message for message in caplog.messages) == 2  # by the worker and by the driver
    assert experiment.deleted_run("deleted") == run
    assert experiment.deleted_run("deleted", parent="0" * 32) is None
    found = client.get_run(run.run_id)
    assert (found.info.lifecycle_stage, found.info.status) == ("deleted", "RUNNING")


def test_what_is_said_of_a_run_whose_experiment_was_deleted_is_kept_until_that_is_restored(
    experiment: Experiment,
) -> None:
    run, client = new_run(experiment, "restored"), MlflowClient(experiment.uri)
    writer = MetricWriter(experiment.uri, run.run_id, interval_s=0.01)
    client.delete_experiment(experiment.experiment_id)
    writer.log(1, {"loss": 2.0})
    assert not writer.flush(0.3)
    outbox = Outbox(experiment.uri)
    outbox.end(run.run_id, "FINISHED")
    (record,) = outbox.close(30)
    client.restore_experiment(experiment.experiment_id)
    assert writer.flush(30)
    writer.close()
    send_record(experiment.uri, record)
    found = client.get_run(run.run_id)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"loss": 2.0})


@pytest.mark.parametrize(
    "change",
    [
        {"status": "WELL"},
        {"ended_ms": -1},
        {"ended_ms": "1"},
        {"reason": 5},
        {"more": 1},
        {"text": "x", "name": "../x"},
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    record = {"run_id": "0" * 32, "status": "FINISHED", "reason": None, "ended_ms": 1}
    file = tmp_path / "unsent.jsonl"
    file.write_text(json.dumps(record))
    assert unsent.read_file(file) == {"0" * 32: [record]}
    file.write_text(json.dumps(record | change))
    with pytest.raises(UserError, match="line 1: not a record that raytrain wrote"):
        unsent.read_file(file)


def test_of_descriptions_that_wait_only_the_newest_is_sent(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is only so for now: it follows what else waits, is not kept, and no end of a search waits for it."""
    run, sent, away = new_run(experiment, "described"), list[str](), [True]
    monkeypatch.setattr(outboxes, "FIRST_PAUSE_S", 0.01)

    def send(uri: str, record: dict[str, object]) -> None:
        if away[0]:
            raise MlflowException("Max retries exceeded")
        sent.append(str(record.get("description", record.get("status"))))
        send_record(uri, record)

    monkeypatch.setattr(outboxes, "send_record", send)
    outbox = Outbox(experiment.uri)
    outbox.describe(run.run_id, "0 of 3")
    time.sleep(0.1)
    outbox.describe(run.run_id, "1 of 3")
    outbox.end(run.run_id, "FINISHED")
    outbox.describe(run.run_id, "2 of 3")
    away[0] = False
    assert outbox.close(30) == []
    assert sent == ["FINISHED", "2 of 3"]
    assert MlflowClient(experiment.uri).get_run(run.run_id).data.tags["mlflow.note.content"] == "2 of 3"

    away[0] = True
    outbox = Outbox(experiment.uri)
    outbox.describe(run.run_id, "3 of 3")
    started = time.monotonic()
    assert outbox.close(30) == []
    assert time.monotonic() - started < 5
    # nor is it said again and again of a run that somebody has deleted
    away[0] = False
    MlflowClient(experiment.uri).delete_run(run.run_id)
    outbox = Outbox(experiment.uri)
    outbox.describe(run.run_id, "4 of 3")
    assert outbox.close(30) == []
    assert not any("deleted" in message for message in caplog.messages)
