"""The campaign's own parts, and a short one; the long one is started by hand or with ``pytest -m campaign``."""

from __future__ import annotations

import http.client
import http.server
import json
import random
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.faults.campaign import episode as episode_module
from tests.faults.campaign.episode import Episode, Injected, Stuck
from tests.faults.campaign.journal import Fault, Journal, choose, summary
from tests.faults.campaign.kinds import KINDS, Kind, NotNow
from tests.faults.campaign.scenario import Result, Scenario
from tests.faults.campaign.steps import progress, read_steps, toll
from tests.support import lab
from tests.support.fault_proxy import FaultProxy

ROOT = Path(__file__).parents[2]
BODY = bytes(range(256)) * 40


class Answers(http.server.BaseHTTPRequestHandler):
    """Sends ``BODY`` and takes anything."""

    protocol_version = "HTTP/1.1"
    taken: bytes = b""

    def do_GET(self) -> None:
        kind = "application/xml" if self.path == "/listing" else "application/octet-stream"
        self._answer(BODY, kind)

    def do_HEAD(self) -> None:
        self._answer(BODY)

    def do_PUT(self) -> None:
        Answers.taken = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"")

    def _answer(self, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing is said."""


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    """A proxy in front of a server that answers."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = FaultProxy(("127.0.0.1", server.server_address[1]), seed=3)
    yield proxy
    proxy.close()
    server.shutdown()
    server.server_close()


def get(proxy: FaultProxy, path: str = "") -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{proxy.port}/{path}", timeout=10) as answer:
        return bytes(answer.read())


def put(proxy: FaultProxy) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{proxy.port}/", data=BODY, method="PUT")
    urllib.request.urlopen(request, timeout=10).close()
    return Answers.taken


def test_a_proxy_passes_everything_on(proxy: FaultProxy) -> None:
    assert get(proxy) == BODY
    assert put(proxy) == BODY
    assert proxy.touched == 0


def test_a_proxy_alters_one_bit_of_as_many_bodies_as_it_is_told(proxy: FaultProxy) -> None:
    proxy.mode, proxy.budget = "corrupt", 2
    for body in (get(proxy), put(proxy)):
        different = [(mine, other) for mine, other in zip(body, BODY, strict=True) if mine != other]
        assert [(mine ^ other).bit_count() for mine, other in different] == [1]
    assert get(proxy) == put(proxy) == BODY
    proxy.budget = 1
    assert get(proxy, "listing") == BODY
    assert proxy.touched == 2
    # on one connection, after an answer that has a length and no body
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    connection.request("HEAD", "/")
    assert connection.getresponse().read() == b""
    connection.request("GET", "/")
    assert connection.getresponse().read() != BODY
    connection.close()


def test_a_proxy_drops_connections_half_way(proxy: FaultProxy) -> None:
    proxy.mode = "drop"
    failed = 0
    for _ in range(30):
        try:
            assert get(proxy) == BODY
        except (urllib.error.URLError, OSError, http.client.IncompleteRead):
            failed += 1
    assert 5 <= failed <= 25
    assert proxy.touched >= failed
    proxy.mode = "pass"
    assert get(proxy) == BODY


def test_a_proxy_delays(proxy: FaultProxy) -> None:
    proxy.mode, proxy.delay_s = "delay", 0.4
    began = time.monotonic()
    for _ in range(3):
        assert get(proxy) == BODY
    assert time.monotonic() - began > 0.3


def test_a_proxy_without_a_server_behind_it_refuses(proxy: FaultProxy) -> None:
    orphan = FaultProxy(("127.0.0.1", 9))
    with pytest.raises(OSError):
        get(orphan)
    orphan.close()


def write_steps(folder: Path, process: str, steps: list[tuple[float, int]]) -> None:
    (folder / f"{process}.steps").write_bytes(b"".join(struct.pack("<dq", *step) for step in steps))


def test_what_a_fault_has_cost_is_read_from_the_steps(tmp_path: Path) -> None:
    write_steps(tmp_path, "run-one-1", [(100 + step, step) for step in range(1, 11)])
    # killed after step 10; another process goes on from the checkpoint of step 7, 20 s later
    write_steps(tmp_path, "run-two-2", [(123 + step, step) for step in range(8, 15)])
    with (tmp_path / "run-two-2.steps").open("ab") as file:
        file.write(b"half")
    steps = read_steps(tmp_path)
    assert progress(steps) == 14
    fault = toll(steps, 110.5, 200)
    assert fault.repeated == 3
    assert fault.stood_s == pytest.approx(134 - 110.5)
    assert toll(steps, 102.5, 109) == toll(steps[:9], 102.5, 109)
    assert toll(steps, 102.5, 109).repeated == 0
    assert toll(steps, 102.5, 109).stood_s == pytest.approx(1)
    # nothing moves any more
    assert toll(steps, 140, 150).stood_s == 10


def fault(kind: str, wrong: str = "", repeated: int = 0) -> Fault:
    return Fault(1, 0, "run", kind, 1.0, 10, repeated, 2.0, wrong)


def test_kinds_are_chosen_until_every_quota_is_met() -> None:
    names, faults = list(KINDS), list[Fault]()
    for episode in range(22):
        chosen = choose(faults, random.Random(episode), 7, names)
        assert len(chosen) == 7
        faults += [fault(kind.name) for kind in chosen]
    counts = {name: sum(fault.kind == name for fault in faults) for name in names}
    assert all(count >= KINDS[name].quota for name, count in counts.items()), counts
    first, again = (choose([], random.Random(1), 6, names) for _ in range(2))
    assert first == again
    assert len(set(first)) == 6


def test_a_campaign_goes_on_from_its_log(tmp_path: Path) -> None:
    log = Journal(tmp_path / "log.jsonl")
    result = Result({"run": {"model.safetensors": "1"}}, {"run": "2"}, "")
    log.add_reference("key", asdict(result))
    log.close_episode(0, 12.34, [], [fault("worker", repeated=30), fault("driver")])
    log.close_episode(1, 1.0, ["no end"], [fault("worker", wrong="no end", repeated=50)])
    again = Journal(tmp_path / "log.jsonl")
    assert again.faults == log.faults
    assert again.episodes == 2
    assert Result.from_json(again.reference("key")) == result
    assert again.reference("other") is None
    lines = summary(again.faults).splitlines()
    assert lines[2] == "| SIGKILL to a worker | 2 | 1 | 40, 50 | 2.0, 2.0 |"
    assert lines[-1] == "| all, in 1 runs and searches | 3 | 2 |  |  |"


def test_results_that_differ_are_told() -> None:
    mine = Result({"0": {"model": "a"}, "1": {"model": "b"}}, {"0": "x", "1": "y"}, "1")
    assert mine.differences(mine) == []
    other = Result({"0": {"model": "a"}, "1": {"model": "c"}}, {"0": "x"}, "0")
    assert mine.differences(other) == [
        "other tensors of 1",
        "there are metrics of ['0'] instead of ['0', '1']",
        "the best trial is 0 instead of 1",
    ]


class Pretended:
    """Stands for a cluster: a thread that makes steps; one that is killed goes on from its newest checkpoint."""

    EVERY, LAST, PACE_S, AWAY_S = 50, 600, 0.005, 0.5

    def __init__(self, steps: Path, lost: int = 0) -> None:
        self.steps = steps
        self.pace_s = self.PACE_S
        self.lost = lost
        self.reached = 0
        self.killed = threading.Event()
        self.status: int | None = None

    def begin(self, folder: Path, command: list[str], name: str, last_step: int) -> None:
        threading.Thread(target=self.train, daemon=True).start()

    def ended(self) -> int | None:
        return self.status

    def coordinators(self) -> list[Any]:
        return []

    def train(self) -> None:
        attempt = 0
        while self.reached < self.LAST:
            with (self.steps / f"run-one-1-{attempt}.steps").open("ab", buffering=0) as file:
                while self.reached < self.LAST and not self.killed.is_set():
                    time.sleep(self.PACE_S)
                    self.reached += 1
                    file.write(struct.pack("<dq", time.time(), self.reached))
            if self.killed.is_set():
                self.reached, attempt = self.reached // self.EVERY * self.EVERY - self.lost, attempt + 1
                time.sleep(self.AWAY_S)
                self.killed.clear()
        self.status = 0


class Killed(Kind):
    name, what, another_group = "worker", "ends the pretended worker", True

    def inject(self, cluster: Any, chance: random.Random) -> None:
        if cluster.reached < 160:  # later than all that may be lost
            raise NotNow
        cluster.killed.set()


@pytest.mark.parametrize(("lost", "survived"), [(0, True), (100, False)])
def test_an_episode_measures_what_its_faults_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int, survived: bool
) -> None:
    monkeypatch.setattr(episode_module, "PAUSE_S", (0.4, 0.6))
    cluster: Any = Pretended(tmp_path, lost)
    scenario = Scenario("pretended", Pretended.LAST, Pretended.EVERY, 100)
    episode, injected = Episode(cluster, scenario, "pretended", tmp_path / "run"), list[Injected]()
    episode.play([Killed, Killed], random.Random(1), injected)
    episode.wait(lambda: cluster.ended() is not None, 30, "end")
    faults = episode.costs(injected, seed=1, number=0)
    assert [fault.kind for fault in faults] == ["worker", "worker"]
    assert [not fault.wrong for fault in faults] == [survived] * 2
    for fault in faults:
        assert abs(fault.repeated - fault.step % Pretended.EVERY - lost) < 3
        assert Pretended.AWAY_S <= fault.back_s < 10
    assert faults[0].step < faults[1].step <= Pretended.LAST


def test_a_run_that_ends_badly_is_told(tmp_path: Path) -> None:
    cluster: Any = Pretended(tmp_path)
    cluster.begin = lambda *arguments: setattr(cluster, "status", 2)
    episode = Episode(
        cluster, Scenario("pretended", Pretended.LAST, Pretended.EVERY, 100), "pretended", tmp_path / "run"
    )
    with pytest.raises(Stuck, match="status 2 instead of a first step"):
        episode.play([Killed], random.Random(1), [])


def campaign(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.campaign", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def a_lab() -> None:
    """Skips where there can be none."""
    lab.needed()


@pytest.mark.long
@pytest.mark.usefixtures("a_lab")
def test_a_short_campaign(tmp_path: Path) -> None:
    log, kinds = tmp_path / "log.jsonl", ["worker", "S3 drops"]
    done = campaign(
        "--log", str(log), "--faults", "2", "--per-episode", "2", "--scenarios", "short", "--work",
        str(tmp_path / "work"), "--kinds", *kinds,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    faults = [json.loads(line)["fault"] for line in log.read_text().splitlines() if "fault" in json.loads(line)]
    assert sorted(fault["kind"] for fault in faults) == sorted(kinds)
    again = campaign("--table", str(log))
    assert "runs and searches | 2 | 2 |" in again.stdout.splitlines()[-1]


@pytest.mark.campaign
@pytest.mark.usefixtures("a_lab")
def test_a_campaign_of_a_hundred_faults(tmp_path: Path) -> None:
    done = campaign("--log", str(tmp_path / "log.jsonl"), "--work", str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
