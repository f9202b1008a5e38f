"""The watcher of a spot instance against a real local metadata service, and the rounds in which workers agree."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
import torch.distributed as dist
from ray.exceptions import ActorDiedError, RayActorError, RpcError
from ray.train.v2.api.exceptions import WorkerGroupError

from raytrain.cluster import spot
from raytrain.cluster.spot import Metadata, Notice, Watcher
from raytrain.data.corpus import Corpus
from raytrain.storage import open_storage
from raytrain.training import preemption as notices
from raytrain.training.loop import train
from raytrain.training.preemption import PreemptedError, Rounds
from raytrain.training.supervisor import was_preempted
from raytrain.training.trainer import World
from tests.conftest import tiny_config
from tests.support.metadata_server import ACTION, REBALANCE, MetadataServer
from tests.unit.training.test_loop import Recorder, final, on_workers

END = {"action": "terminate", "time": "2026-11-21T15:04:05Z"}


class Drained:
    """Keeps the notices that were obeyed; fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.notices: list[Notice] = []

    def __call__(self, notice: Notice) -> None:
        if self.failures:
            self.failures -= 1
            raise RpcError("the GCS is away")
        self.notices.append(notice)


def test_a_notice_that_comes_later_is_obeyed_once(
    metadata_server: MetadataServer, caplog: pytest.LogCaptureFixture
) -> None:
    drained = Drained()
    watcher = Watcher(Metadata(metadata_server.uri + "/"), rebalance=False, drain=drained)
    for _ in range(3):
        watcher.look()
    assert not drained.notices
    assert not caplog.messages
    metadata_server.pages[ACTION] = END
    for _ in range(3):
        watcher.look()
    assert drained.notices == [Notice("EC2 will terminate this instance", END["time"], True)]
    assert caplog.messages == [f"EC2 will terminate this instance at {END['time']}"]
    assert metadata_server.count("PUT", "/latest/api/token", 200) == 1
    del metadata_server.pages[ACTION]
    watcher.look()
    assert caplog.messages[1:] == ["EC2 has taken its notice back"]


def test_a_token_that_has_run_out_is_asked_for_anew(metadata_server: MetadataServer) -> None:
    drained = Drained()
    watcher = Watcher(Metadata(metadata_server.uri), rebalance=False, drain=drained)
    watcher.look()
    metadata_server.expire()
    metadata_server.pages[ACTION] = END
    watcher.look()
    assert len(drained.notices) == 1
    assert metadata_server.count("GET", ACTION, 401) == 1
    assert metadata_server.count("PUT", "/latest/api/token", 200) == 2


@pytest.mark.parametrize("trouble", ["status", "hangs", "no JSON", "gone"])
def test_a_service_in_trouble_is_asked_on(
    metadata_server: MetadataServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(spot, "REQUEST_TIMEOUT_S", 0.2)
    drained = Drained()
    metadata = Metadata(metadata_server.uri)
    watcher = Watcher(metadata, rebalance=False, drain=drained)
    watcher.look()
    if trouble == "status":
        metadata_server.status = 503
    elif trouble == "hangs":
        metadata_server.hang_s = 0.5
    elif trouble == "no JSON":
        metadata_server.pages[ACTION] = "<html>"
    else:
        metadata.endpoint = f"http://127.0.0.1:{free_port()}"
    for _ in range(2):
        watcher.look()
    assert not drained.notices
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("the metadata service does not answer: ")
    metadata_server.status, metadata_server.hang_s, metadata.endpoint = None, 0.0, metadata_server.uri
    metadata_server.pages[ACTION] = END
    watcher.look()
    assert len(drained.notices) == 1
    assert caplog.messages[1] == "the metadata service answers again"


def test_a_notice_is_obeyed_when_ray_is_back_even_if_the_service_has_gone(
    metadata_server: MetadataServer, caplog: pytest.LogCaptureFixture
) -> None:
    drained = Drained(failures=2)
    watcher = Watcher(Metadata(metadata_server.uri), rebalance=False, drain=drained)
    metadata_server.pages[ACTION] = END
    watcher.look()
    metadata_server.status = 500
    for _ in range(3):
        watcher.look()
    assert len(drained.notices) == 1
    assert [message for message in caplog.messages if message.startswith("Ray ")] == [
        "Ray cannot be told yet: the GCS is away"
    ]


def test_advice_to_leave_is_followed_only_where_that_was_asked_for(metadata_server: MetadataServer) -> None:
    metadata_server.pages[REBALANCE] = {"noticeTime": "2026-11-21T15:00:00Z"}
    patient, hasty = Drained(), Drained()
    watchers = [
        Watcher(Metadata(metadata_server.uri), rebalance, drain)
        for rebalance, drain in ((False, patient), (True, hasty))
    ]
    for watcher in watchers:
        watcher.look()
    assert (len(patient.notices), len(hasty.notices)) == (0, 1)
    metadata_server.pages[ACTION] = END
    for watcher in watchers:
        watcher.look()
    assert (len(patient.notices), len(hasty.notices)) == (1, 2)


def test_there_is_no_more_time_than_the_notice_names() -> None:
    notice = Notice("EC2 will stop this instance", "2026-11-21T15:04:05Z", True)
    assert notice.seconds_left(datetime(2026, 11, 21, 15, 4, 0, tzinfo=UTC)) == 5
    assert notice.seconds_left(datetime(2026, 11, 21, 15, 5, 0, tzinfo=UTC)) == 1
    assert replace(notice, at="soon").seconds_left(datetime.now(UTC)) is None
    assert replace(notice, certain=False).seconds_left(datetime.now(UTC)) is None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(endpoint: str, *options: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """The command, to its end; a proxy that does not exist must not matter."""
    environment = {**os.environ, "AWS_EC2_METADATA_SERVICE_ENDPOINT": endpoint, "http_proxy": "http://127.0.0.1:1"}
    return subprocess.run(
        [sys.executable, "-m", "raytrain.spot", *options],
        env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def test_without_a_metadata_service_it_says_so_and_ends(metadata_server: MetadataServer) -> None:
    gone = command(f"http://127.0.0.1:{free_port()}", "--interval", "0.1")
    metadata_server.status = 404  # another cloud's service at the same address
    other = command(metadata_server.uri)
    for done in (gone, other):
        assert done.returncode == 0
        assert done.stderr.count("\n") == 1
        assert "nothing to watch: no EC2 metadata service at http://127.0.0.1:" in done.stderr


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--interval", "6"], "error: --interval is 6: must be above 0 and at most 5"),
        (["--deadline", "0"], "error: --deadline is 0: must be above 0 and at most 120"),
        (["--node", "a", "b"], "error: unrecognized arguments"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], line: str) -> None:
    done = command("http://127.0.0.1:1", *options)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------- the loop


class Noticed(Recorder):
    """A report whose worker has notice when it has been asked ``at`` times."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at = at
        self.asked = 0

    def preemption_notice(self) -> bool:
        self.asked += 1
        return self.at is not None and self.asked > self.at


def test_a_run_that_is_given_notice_has_lost_no_step_and_ends_with_the_same_bits(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "INTERVAL_S", 1e6)  # so that rounds come after 1, 3, 7, 15 and 31 steps
    config = tiny_config("hybrid", steps=40, log_every=1, evaluate_every=40, checkpoint_every=40)
    undisturbed = Noticed(None)
    train(config, corpus, World(), open_storage(tmp_path / "whole"), undisturbed)
    assert undisturbed.asked == 5
    report = Noticed(3)
    with pytest.raises(PreemptedError, match="saved at step 15"):
        train(config, corpus, World(), open_storage(tmp_path / "cut"), report)
    stored = final(tmp_path / "cut")
    assert stored.step == max(report.records) == 15
    train(config, corpus, World(), open_storage(tmp_path / "cut"), Noticed(None))
    assert_same(tmp_path / "whole", tmp_path / "cut")


def assert_same(one: Path, other: Path) -> None:
    first, second = final(one), final(other)
    assert first.step == second.step
    for stem in ("model", "optimizer"):
        tensors = second.tensors(stem)
        assert all((tensors[name] == tensor).all() for name, tensor in first.tensors(stem).items())


@pytest.mark.slow
def test_all_ranks_leave_at_the_same_step_when_one_is_given_notice(corpus: Corpus, tmp_path: Path) -> None:
    on_workers(2, leave_then_go_on, corpus.path, tmp_path)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def leave_then_go_on(world: World, corpus_path: Path, folder: Path) -> None:
    notices.INTERVAL_S = 1e6  # of this process
    config = tiny_config("hybrid", steps=12, log_every=1, evaluate_every=12, checkpoint_every=12)
    corpus = Corpus.open(corpus_path)
    train(config, corpus, world, open_storage(folder / "whole"), Noticed(None))
    # rank 1's machine is the one to go: rank 0 has not heard of it
    with pytest.raises(PreemptedError, match="saved at step 7"):
        train(config, corpus, world, open_storage(folder / "cut"), Noticed(2 if world.rank == 1 else None))
    dist.barrier()
    assert final(folder / "cut").step == 7
    train(config, corpus, world, open_storage(folder / "cut"), Noticed(None))


def test_rounds_come_every_two_seconds_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(notices.time, "monotonic", lambda: clock[0])
    rounds = Rounds(World(), 100)
    asked = []
    for step in range(101, 1200):
        clock[0] += 0.01 if step < 800 else 0.5
        if rounds.due(step):
            assert not rounds.ask(step, False)
            asked.append((step, clock[0]))
    steps = [step for step, _ in asked]
    assert steps[:8] == [101, 103, 107, 115, 131, 163, 227, 355]
    assert spans(steps[8:11]) == [200, 200]
    # steps that take fifty times as long: one round is late, then they are two seconds apart again
    assert spans(steps[-3:]) == [4, 4]


def spans(steps: list[int]) -> list[int]:
    return [later - step for step, later in pairwise(steps)]


def test_a_notice_at_the_last_step_does_not_keep_a_run_from_ending(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "INTERVAL_S", 1e6)
    config = tiny_config("hybrid", steps=7, evaluate_every=7)
    assert train(config, corpus, World(), open_storage(tmp_path), Noticed(2)).step == 7


def test_only_deaths_without_notice_count_as_failures() -> None:
    died = ActorDiedError()
    assert was_preempted(WorkerGroupError("", {0: RuntimeError("peer"), 1: PreemptedError("at step 7")}))
    assert was_preempted(WorkerGroupError("", {1: RayActorError(preempted=True)}))
    assert was_preempted(RayActorError(preempted=True))
    assert not was_preempted(WorkerGroupError("", {0: RuntimeError("peer"), 1: died}))
    assert not was_preempted(died)


def test_all_nodes_of_a_host_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {"b": "127.0.0.1", "a": "127.0.0.1", "c": "198.51.100.7"}
    monkeypatch.setattr("raytrain.cluster.draining.alive_nodes", lambda address: nodes)
    assert spot.own_nodes(None, None) == ["a", "b"]
    assert spot.own_nodes(None, "c") == ["c"]
    for wrong in ("d", "127.0.0.1"):
        with pytest.raises(LookupError, match=f"no node {wrong} among its 3"):
            spot.own_nodes(None, wrong)
    del nodes["a"], nodes["b"]
    with pytest.raises(LookupError, match="no node on this host"):
        spot.own_nodes(None, None)
