"""The writer of metrics: every step once, whatever dies, on a real sqlite store."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from raytrain.tracking import metric_writer as writer_module
from raytrain.tracking.__main__ import main
from raytrain.tracking.metric_writer import MetricWriter, parse_record
from raytrain.tracking.runs import Experiment, Run
from raytrain.tracking.system import SystemMetrics
from raytrain.utils.errors import run_command
from tests.support.mlflow_server import new_store

NOWHERE = "http://127.0.0.1:9"
"""An address where nothing answers."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    experiment = Experiment.open(new_store(tmp_path), "search", str(tmp_path / "artifacts"))
    return experiment.open_run("abc", "a name", parameters={}, tags={})


def history(run: Run, key: str) -> list[tuple[int, float]]:
    """(step, value) in the order in which they were logged."""
    metrics = MlflowClient(run.uri).get_metric_history(run.run_id, key)
    return [(metric.step, metric.value) for metric in sorted(metrics, key=lambda metric: metric.timestamp)]


def test_what_is_logged_is_stored(run: Run) -> None:
    writer = MetricWriter(run.uri, run.run_id)
    writer.log(1, {"train/loss": 2.5, "kl": float("nan")}, timestamp_ms=1000)
    writer.log(2, {"train/loss": float("inf"), "kl": 3}, timestamp_ms=2000)
    assert writer.flush(20)
    assert writer.pending() == []
    assert writer.close() == 0
    first, second = MlflowClient(run.uri).get_metric_history(run.run_id, "train/loss")
    assert (first.step, first.value, first.timestamp) == (1, 2.5, 1000)
    assert second.value > 1e308
    assert math.isnan(history(run, "kl")[0][1])
    assert history(run, "kl")[1] == (2, 3.0)


@pytest.mark.parametrize("first", ["the new one", "the old one"])
def test_a_writer_that_was_given_up_and_comes_back_repeats_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setattr(writer_module, "SILENCE_S", 0.2)
    old = MetricWriter(run.uri, run.run_id, interval_s=60)
    for step in (1, 2, 3):
        old.log(step, {"loss": step}, timestamp_ms=step)
    assert old.flush(20)
    for step in (4, 5, 6):
        old.log(step, {"loss": step}, timestamp_ms=step)
    time.sleep(0.3)  # its host is off the network
    # another worker group has resumed from step 3
    new = MetricWriter(run.uri, run.run_id, interval_s=60)
    new.log(4, {"loss": 4}, timestamp_ms=104)
    assert new.flush(20)
    if first == "the old one":
        assert old.flush(20)
    for step in (5, 6, 7):
        new.log(step, {"loss": step}, timestamp_ms=100 + step)
    assert new.flush(20)
    assert old.close() == 0
    assert new.close() == 0
    assert sorted(history(run, "loss")) == [(step, float(step)) for step in range(1, 8)]


def test_more_than_a_batch_at_once(run: Run) -> None:
    writer = MetricWriter(run.uri, run.run_id, interval_s=60)
    writer.log(1, {f"wide{number}": number for number in range(2345)})
    for step in range(1, 1502):
        writer.log(step, {"a": step, "b": -step}, timestamp_ms=step)
    assert writer.close(60) == 0
    assert history(run, "a") == [(step, float(step)) for step in range(1, 1502)]
    assert len(history(run, "b")) == 1501
    assert len(MlflowClient(run.uri).get_run(run.run_id).data.metrics) == 2347


def test_a_step_is_not_logged_twice(run: Run) -> None:
    writer = MetricWriter(run.uri, run.run_id)
    for step in (1, 2, 2, 1, 3):
        writer.log(step, {"loss": step})
    writer.log(0, {"valid/loss": 9.0})
    assert writer.close(20) == 0
    reopened = MetricWriter(run.uri, run.run_id)
    for step in (2, 3, 4):
        reopened.log(step, {"loss": step})
    assert reopened.close(20) == 0
    assert history(run, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert history(run, "valid/loss") == [(0, 9.0)]


def test_a_name_that_mlflow_refuses_is_refused_at_once(run: Run) -> None:
    writer = MetricWriter(run.uri, run.run_id)
    with pytest.raises(ValueError, match="kl%"):
        writer.log(1, {"kl%": 1.0})
    assert writer.close(20) == 0


def test_logging_costs_microseconds_while_the_store_is_away() -> None:
    writer = MetricWriter(NOWHERE, "run", interval_s=0.01)
    metrics = {f"metric{number}": float(number) for number in range(12)}
    slowest = 0.0
    for step in range(5000):
        start = time.perf_counter()
        writer.log(step, metrics)
        slowest = max(slowest, time.perf_counter() - start)
    print(f"{writer.seconds_logging / 5000 * 1e6:.1f} us a call of 12 metrics, slowest {slowest * 1e3:.2f} ms")
    assert writer.seconds_logging / 5000 < 100e-6
    assert len(writer.pending()) == 5000
    assert writer.close(0) == 5000


# -------------------------------------------------------------------------------------------- crashes and resumes

LOOP = """
import json, os, signal, sys
from pathlib import Path
from raytrain.tracking.metric_writer import MetricWriter

uri, run_id, checkpoint, interval_s, die_at = sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(float, sys.argv[4:])
state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "pending": []}
writer = MetricWriter(uri, run_id, interval_s=interval_s)
writer.replay(state["pending"])
for step in range(state["step"] + 1, 101):
    writer.log(step, {"loss": 1 / step, "learning_rate": step})
    if step % 10 == 0:
        writer.log(step, {"valid/bound": float("nan") if step == 20 else -step})
    if step % 25 == 0:
        checkpoint.write_text(json.dumps({"step": step, "pending": writer.pending()}, allow_nan=False))
    if step == die_at:
        if interval_s < 1:
            writer.flush(20)
        os.kill(os.getpid(), signal.SIGKILL)
assert writer.close(20) == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("interval_s", [0.05, 60], ids=["sent past the checkpoint", "nothing sent before the crash"])
def test_a_killed_run_has_each_step_once(run: Run, tmp_path: Path, interval_s: float) -> None:
    command = [sys.executable, "-c", LOOP, run.uri, run.run_id, str(tmp_path / "checkpoint.json"), str(interval_s)]
    assert subprocess.run([*command, "63"]).returncode == -9
    assert len(history(run, "loss")) == (63 if interval_s < 1 else 0)
    subprocess.run([*command, "0"], check=True)
    assert history(run, "loss") == [(step, 1 / step) for step in range(1, 101)]
    assert history(run, "learning_rate") == [(step, float(step)) for step in range(1, 101)]
    assert [step for step, _ in history(run, "valid/bound")] == list(range(10, 101, 10))


class UnreliableClient:
    """A real client whose requests fail at random: half of the failures after the store has done the work."""

    def __init__(self, client: MlflowClient, chance: random.Random) -> None:
        self._client = client
        self._chance = chance

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            fate = self._chance.random()
            if fate < 0.25:
                raise MlflowException("no answer")
            answer = getattr(self._client, name)(*arguments, **options)
            if fate < 0.5:
                raise MlflowException("the answer was lost")
            return answer

        return call


@pytest.mark.parametrize("seed", range(4))
def test_lost_requests_and_answers_and_crashes_together(run: Run, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    client = UnreliableClient(MlflowClient(run.uri), chance)
    monkeypatch.setattr(writer_module, "connect", lambda uri: client)
    monkeypatch.setattr(writer_module, "MAX_PAUSE_S", 0.01)
    step = furthest = 0
    pending: list[Any] = []
    for crash in range(4):
        writer = MetricWriter(run.uri, run.run_id, interval_s=0.002)
        writer.replay(pending)
        now = step
        # the last one goes beyond what any before it has sent
        for _ in range(chance.randrange(10, 40) + (furthest - step if crash == 3 else 0)):
            now += 1
            writer.log(now, {"loss": now, "other": -now})
            time.sleep(chance.random() * 0.01)
            if chance.random() < 0.15:
                step, pending = now, json.loads(json.dumps(writer.pending()))
        furthest = max(furthest, now)
        if crash < 3:
            writer.close(0)
            writer._thread.join()
        else:
            assert writer.close(60) == 0
    assert history(run, "loss") == [(number, float(number)) for number in range(1, now + 1)]
    assert history(run, "other") == [(number, -float(number)) for number in range(1, now + 1)]


# ----------------------------------------------------------------------------------------------- gone for good


def test_what_could_not_be_sent_is_kept_and_sent_later(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unsent = tmp_path / "logs" / "unsent.jsonl"
    sent = MetricWriter(run.uri, run.run_id)
    sent.log(1, {"loss": 1.0})
    assert sent.close(20) == 0
    monkeypatch.setattr(writer_module, "MAX_PAUSE_S", 0.05)
    writer = MetricWriter(NOWHERE, run.run_id, interval_s=0.01)
    for step in range(1, 31):
        writer.log(step, {"loss": 1 / step, "bad": float("-inf")})
    start = time.monotonic()
    assert writer.close(0.5, unsent) == 30
    assert time.monotonic() - start < 5
    assert writer.error is not None
    assert f"python -m raytrain.tracking send {unsent}" in caplog.text
    assert sum("kept and sent later" in message for message in caplog.messages) == 1, "said once, not at each attempt"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)
    for _ in range(2):
        main(["send", str(unsent)])
    assert history(run, "loss") == [(step, 1 / step) for step in range(1, 31)]
    assert len(history(run, "bad")) == 30


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), ("{}\n", "line 1"), ('{"run_id": "a"}\nx', "line 1"), ("[1]", "line 1")],
)
def test_a_file_that_cannot_be_sent_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    path = tmp_path / "unsent.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda: main(["send", str(path)]))
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_a_wrong_option_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda: main(["push"]))
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------------------- system metrics


def test_system_metrics_have_mlflows_names_and_grow_over_a_restart(run: Run) -> None:
    before = set(threading.enumerate())
    for count in (2, 4):
        writer = MetricWriter(run.uri, run.run_id, interval_s=0.1)
        system = SystemMetrics(writer, run.created_ms, interval_s=0.5)
        deadline = time.monotonic() + 20
        while len(history(run, "system/cpu_utilization_percentage")) < count and time.monotonic() < deadline:
            time.sleep(0.1)
        system.close()
        assert writer.close(20) == 0
    steps = [step for step, _ in history(run, "system/cpu_utilization_percentage")]
    assert len(steps) >= 4
    assert steps == sorted(set(steps))
    memory = [value for _, value in history(run, "system/system_memory_usage_percentage")]
    assert all(0 < value < 100 for value in memory)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("raytrain-")]


def test_a_record_reads_back_from_json_and_anything_else_is_a_value_error() -> None:
    record = json.loads(json.dumps([7, 1, {"a": 1, "b": 0.5, "c": "nan", "d": "-inf"}]))
    step, timestamp_ms, metrics = parse_record(record)
    assert (step, timestamp_ms, metrics["a"], metrics["b"], metrics["d"]) == (7, 1, 1.0, 0.5, -math.inf)
    assert math.isnan(metrics["c"])
    assert parse_record([1, 2, {"a": 10**400}])[2] == {"a": math.inf}
    for bad in (
        None, [], [1, 2], "abc", [1, 2, 3], ["x", 2, {}], [1.5, 2, {}], [math.inf, 2, {}], [True, 2, {}], [-1, 2, {}],
        [2**63, 2, {}], [1, None, {}], [1, 2, {"a": []}], [1, 2, {"a": None}], [1, 2, {"a": "1"}], [1, 2, {"a": True}],
    ):  # fmt: skip
        with pytest.raises(ValueError):
            parse_record(bad)
