"""Leases: one driver at a time, whose it is, when it is taken over, and that the one before writes nothing more."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytrain.storage import lease as lease_module
from raytrain.storage import local, open_storage
from raytrain.storage.base import NotFoundError, Storage, StorageError
from raytrain.storage.lease import (
    LEASES,
    Fence,
    Holder,
    LeaseHeldError,
    LeaseLostError,
    driving,
    find_free,
    read_holder,
    take,
)
from raytrain.storage.local import FolderStorage
from raytrain.utils.errors import UserError

ELSEWHERE = {"host": "other", "user": "ann", "machine": "another boot", "pid": 1}


@pytest.fixture(params=["folder", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.05)
    # a heartbeat must not take much of the time between two: on a busy machine the S3 server takes tenths of a second
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05 if request.param == "folder" else 0.5)
    monkeypatch.setattr(lease_module, "TAKEOVER_S", 0.5 if request.param == "folder" else 2.0)
    if request.param == "folder":
        return open_storage(tmp_path / "s")
    request.getfixturevalue("s3_server").use(monkeypatch)
    return open_storage(f"s3://raytrain/{tmp_path.name}/s")


def left_by(location: Storage, **changes: Any) -> None:
    """Leave the lease of a driver that is no more, or on another host."""
    holder = dataclasses.replace(Holder.here(), **changes)
    location.write(f"{LEASES}/00000001.json", lease_module._to_json(holder))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_driver_keeps_others_out_says_who_it_is_and_lets_them_in_at_its_end(location: Storage) -> None:
    assert find_free(location, "s") == 0
    with driving(location, 0, "s"):
        before, holder = None, read_holder(location, 1)
        while before != holder:  # no heartbeat between the refusal and what it is compared with
            before = holder
            with pytest.raises(LeaseHeldError) as refused:
                find_free(location, "--resume s: the search")
            holder = read_holder(location, 1)
        assert str(refused.value) == (
            f"--resume s: the search is driven by user {holder.user} on host {os.uname().nodename} "
            f"(process {os.getpid()}) since {lease_module._time(holder.since)}, "
            f"last heartbeat {lease_module._time(holder.heartbeat)}; wait for its end, or stop that process first"
        )
        wait_until(lambda: read_holder(location, 1).heartbeat > holder.since)
        with pytest.raises(LeaseHeldError, match="the search s is driven by user"):
            take(location, 0, "the search s")
    assert find_free(location, "s") == 1
    assert read_holder(location, 1).released
    assert location.list() == [f"{LEASES}/00000001.json"]


def test_a_process_of_this_host_that_is_gone_is_followed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "TAKEOVER_S", 1e6)
    location = open_storage(tmp_path)
    code = (
        "import os, signal, sys\n"
        "from raytrain.storage import open_storage\n"
        "from raytrain.storage.lease import take\n"
        f"take(open_storage({str(tmp_path)!r}), 0, 's')\n"
        "print('taken', flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as driver:
        assert driver.stdout.readline() == "taken\n"  # type: ignore[union-attr]
        with pytest.raises(LeaseHeldError, match=rf"\(process {driver.pid}\)"):
            find_free(location, "s")
        driver.kill()
        # also before its parent has asked how it ended
        wait_until(lambda: read_holder(location, 1).has_ended)
        assert find_free(location, "s") == 1


def test_a_process_that_has_only_the_number_of_the_driver_is_not_the_driver(tmp_path: Path) -> None:
    location = open_storage(tmp_path)
    left_by(location, started="1")
    assert find_free(location, "s") == 1


@pytest.mark.parametrize("changes", [{"host": "other"}, {"machine": "another boot"}])
def test_no_process_is_looked_for_on_another_host_or_in_another_container(changes: dict[str, Any]) -> None:
    gone = dataclasses.replace(Holder.here(), started="1")
    assert gone.has_ended
    assert not dataclasses.replace(gone, **changes).has_ended


def test_a_process_of_another_user_counts_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not Holder.here().has_ended
    assert not dataclasses.replace(Holder.here(), pid=2**30, started="1").has_ended  # hidden


def test_a_driver_on_another_host_that_is_silent_is_followed(
    location: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    left_by(location, **ELSEWHERE)
    began = time.monotonic()
    assert find_free(location, "--resume s: the search") == 1
    assert time.monotonic() - began >= 0.5
    assert "--resume s: the search was last driven by user ann on host other (process 1)" in capsys.readouterr().out


@pytest.mark.parametrize("clock", [-1e6, 1e6])
def test_a_driver_on_another_host_that_beats_is_not_followed_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    monkeypatch.setattr(lease_module, "TAKEOVER_S", 30.0)
    location = open_storage(tmp_path)
    left_by(location, **ELSEWHERE, heartbeat=time.time() + clock)
    beat = threading.Timer(0.3, lambda: left_by(location, **ELSEWHERE, heartbeat=time.time() + clock))
    beat.start()
    with pytest.raises(LeaseHeldError, match="by user ann on host other"):
        find_free(location, "s")
    beat.join()


def test_what_the_driver_before_still_writes_is_refused(location: Storage, tmp_path: Path) -> None:
    first = take(location, 0, "s")
    trial = first.fence.guard(location).child("trials/1")
    trial.write("trial.json", b"first")
    worker = Fence.at(first.fence.address()).guard(open_storage(trial.uri()))
    worker.write("outcome.json", b"first")
    second = take(location, 1, "s")
    file = tmp_path / "file"
    file.write_bytes(b"late")
    for late in (trial, worker, pickle.loads(pickle.dumps(trial)), trial.without_retries()):
        for change in (
            lambda late=late: late.write("trial.json", b"late"),
            lambda late=late: late.create("new.json", b"late"),
            lambda late=late: late.upload("trial.json", file),
            lambda late=late: late.delete("outcome.json"),
            lambda late=late: late.child("a").delete_prefix("b"),
        ):
            with pytest.raises(LeaseLostError, match=r"taken over by user .*; this driver writes nothing more"):
                change()
    assert trial.read("trial.json") == worker.read("outcome.json") == b"first"
    assert trial.list() == ["outcome.json", "trial.json"]
    second.fence.guard(location).write("trials/1/trial.json", b"second")
    assert trial.read("trial.json") == b"second"
    wait_until(lambda: first.lost)
    with pytest.raises(LeaseLostError):
        first.check()
    with pytest.raises(LeaseLostError):
        first.confirm()
    first.release()  # which is not its own any more
    second.confirm()
    second.release()
    assert (read_holder(location, 1).released, read_holder(location, 2).released) == (False, True)


def test_an_outage_of_the_store_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.02)
    location = open_storage(tmp_path)
    held = take(location, 0, "s")
    away = threading.Event()
    calls = []

    def exists(storage: FolderStorage, key: str) -> bool:
        calls.append(key)
        if away.is_set():
            raise StorageError("away")
        return storage._path(key).is_file()

    monkeypatch.setattr(FolderStorage, "exists", exists)
    away.set()
    before = len(calls)
    wait_until(lambda: len(calls) > before + 2)
    held.confirm()
    with pytest.raises(StorageError):
        held.fence.check()
    away.clear()
    beat = read_holder(location, 1).heartbeat
    wait_until(lambda: read_holder(location, 1).heartbeat > beat)
    held.release()
    assert not held.lost


@pytest.mark.parametrize("damage", ["altered", "deleted"])
def test_a_driver_whose_lease_is_not_its_own_any_more_has_lost_it(
    location: Storage, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the store ignores the condition of a write, so that two drivers have created one lease."""
    held = take(location, 0, "s")

    def lost() -> bool:
        """Whether it knows; a heartbeat that was just being written undoes the damage."""
        if damage == "deleted":
            location.delete_prefix(LEASES)
        else:
            left_by(location)
        time.sleep(0.01)
        return held.lost

    wait_until(lost)
    for look in (held.check, held.confirm):
        with pytest.raises(LeaseLostError, match="the lease of this driver was altered or deleted"):
            look()
    held.release()


# --------------------------------------------------------------------------------------------- races


RACES = [
    pytest.param("folder", 60, marks=pytest.mark.slow),
    pytest.param("s3", 10, marks=pytest.mark.slow),
    pytest.param("s3", 60, marks=pytest.mark.long),
]
"""A store, and how often two try it. Ten races on S3 take as long as 60 in a folder."""


def race(location: Storage, start: Any, answers: Any) -> None:
    """One of two drivers that take the same search at the same moment."""
    lease_module.SETTLE_S = 0.2
    number = find_free(location, "s")
    start.wait(60)
    try:
        held = take(location, number, "s")
    except LeaseHeldError:
        answers.put("held")
    else:
        answers.put("won")
        start.wait(60)
        held.release()
        return
    start.wait(60)


def races(locations: list[Storage]) -> list[list[str]]:
    """What two processes were told for each location, which they take at the same moment."""
    context = multiprocessing.get_context("fork")
    told = []
    for location in locations:
        start, answers = context.Barrier(2), context.Queue()
        racers = [context.Process(target=race, args=(location, start, answers)) for _ in range(2)]
        for racer in racers:
            racer.start()
        told.append(sorted(answers.get(timeout=60) for _ in racers))
        for racer in racers:
            racer.join(60)
            assert racer.exitcode == 0
    return told


def test_of_two_drivers_at_the_same_moment_one_wins(tmp_path: Path) -> None:
    assert races([open_storage(tmp_path / str(number)) for number in range(8)]) == [["held", "won"]] * 8


@pytest.mark.parametrize(("kind", "times"), RACES)
def test_of_two_drivers_at_the_same_moment_one_wins_many_times(
    kind: str, times: int, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    if kind == "s3":
        request.getfixturevalue("s3_server").use(monkeypatch)
        root = f"s3://raytrain/{tmp_path.name}"
    assert races([open_storage(f"{root}/{number}") for number in range(times)]) == [["held", "won"]] * times


class Ignores(FolderStorage):
    """A store that ignores the condition of a write, as some S3 servers do."""

    def create(self, key: str, data: bytes) -> bool:
        super().write(key, data)
        return True

    @property
    def folder(self) -> None:  # type: ignore[override]
        return None


def test_where_conditions_are_ignored_the_last_to_write_wins(tmp_path: Path) -> None:
    assert races([Ignores(tmp_path / str(number)) for number in range(4)]) == [["held", "won"]] * 4


def test_a_file_system_without_hard_links_has_one_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(local.os, "link", refuse)
    storage = open_storage(tmp_path)
    assert storage.create("a/k", b"one")
    assert not storage.create("a/k", b"two")
    assert storage.read("a/k") == b"one"
    assert storage.list() == ["a/k"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["k"]


# ------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"token": 1}', b'{"since": 1e400}', b"\xff", b'{"unheard": 1}'], ids=repr
)
def test_a_lease_that_cannot_be_read_is_one_line(tmp_path: Path, text: bytes) -> None:
    location = open_storage(tmp_path)
    location.write(f"{LEASES}/00000003.json", text)
    with pytest.raises(UserError, match=r"00000003\.json is not a lease \(.*\): delete it"):
        find_free(location, "s")


def test_times_that_are_none_are_refused(tmp_path: Path) -> None:
    location = open_storage(tmp_path)
    left_by(location, since=1e300)
    with pytest.raises(UserError, match="is not a lease"):
        find_free(location, "s")
    with pytest.raises(NotFoundError):
        read_holder(location, 2)
