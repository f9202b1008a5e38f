"""Preparing on Ray Data, against one process; ``test_parts.py`` has all kinds of sources."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyarrow
import pytest
import ray

from raytrain.data import __main__ as command
from raytrain.data import distributed
from raytrain.data.documents import Source
from raytrain.data.parts import Parts
from raytrain.data.prepare import prepare
from raytrain.data.read_tasks import read_tasks
from raytrain.data.reading import Selection
from raytrain.utils.errors import UserError
from tests.support.ray_instance import joined
from tests.support.refusal import refusal

SIZE = 2**17
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def ray_of_two(ray_cpu: str) -> Iterator[None]:
    with joined(ray_cpu):
        yield
        with contextlib.suppress(ValueError):  # Ray Data's own, which outlives its jobs: other tests look for leftovers
            ray.kill(ray.get_actor("datasets_stats_actor", namespace="_dataset_stats_actor"))


def posts(path: Path, seed: int) -> None:
    """Write posts of which most stand in several files, with the bios of few accounts."""
    rows = [
        {"id": n, "created_at": "x", "lang": "en", "text": f"@bob post {n * seed % 5000}",
         "user": {"id": n % 900, "description": f"bio {n * seed % 700}"}}
        for n in range(3000)
    ]  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_of_two")
@pytest.mark.parametrize("source", ["tweets", "bios"])
def test_duplicates_and_a_killed_worker_change_nothing(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        posts(tmp_path / "in" / f"{number}.jsonl", 1 + 2 * number)
    common: dict[str, Any] = {"path": str(tmp_path / "in"), "cache": tmp_path / "cache"}
    whole = prepare(source, output=tmp_path / "whole", **common)
    assert whole.info["duplicates_dropped"] > 100
    monkeypatch.setattr(distributed, "Parts", _Dying)
    monkeypatch.chdir(tmp_path)  # relative names are found from here alone
    common["path"] = "in"
    made = prepare(source, output=Path("made"), **common, fill=partial(distributed.fill, size=SIZE))
    assert len(list(tmp_path.glob("died-*"))) == 2
    assert {**made.info, **dict.fromkeys(("key", "source", "report"))} == {
        **whole.info, **dict.fromkeys(("key", "source", "report"))}  # fmt: skip
    assert {name: value for name, value in made.info["report"].items() if name != "guesses"} == {
        name: value for name, value in whole.info["report"].items() if name != "guesses"
    }
    made.verify()
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".made")]


@dataclass(frozen=True)
class _Dying(Parts):
    """Parts of which two workers die: one before its part is written, one when it is."""

    def write(self, number: int) -> None:
        if number == 1:
            self._die_once(number)
        super().write(number)
        if number == 3:
            self._die_once(number)

    def _die_once(self, number: int) -> None:
        mark = self.folder.parent / f"died-{number}"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class _Deadly(Parts):
    """Parts of which one can be written by no worker."""

    def _names_found(self, number: int) -> contextlib.AbstractContextManager[None]:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._names_found(number)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_of_two")
def test_a_task_at_which_all_processes_die_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        posts(tmp_path / "in" / f"{number}.jsonl", 1)
    monkeypatch.setattr(distributed, "Parts", _Deadly)
    with pytest.raises(UserError, match=r"5 processes that read .*in/0\.jsonl have died"):
        prepare(str(tmp_path / "in"), output=tmp_path / "out" / "corpus", cache=tmp_path / "cache",
                fill=partial(distributed.fill, size=SIZE))  # fmt: skip
    assert not list((tmp_path / "out").iterdir())


def parts_of(folder: Path) -> Parts:
    """Parts of a file of repeated lines, of which none is written."""
    (folder / "a.txt").write_text("a line\n" * 100)
    (folder / "scratch").mkdir()
    source = Source("tweets", str(folder / "a.txt"), Selection(), folder)
    return Parts(folder / "scratch", source, read_tasks(source.files()))


def test_a_node_that_does_not_find_the_folders_is_said_whenever_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker beside a head without CPUs is another node, too; later ones are asked by their first task."""
    parts = parts_of(tmp_path)
    nodes = [
        {"NodeID": 28 * name, "NodeManagerAddress": f"10.0.0.{name}", "Alive": True, "Resources": resources}
        for name, resources in (("11", {"CPU": 0.0}), ("22", {"CPU": 4.0}))
    ]

    def remote(**_: int) -> Any:
        return lambda _: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda wanted: wanted[:1]))

    here = SimpleNamespace(get_node_id=lambda: 28 * "11")
    cluster = SimpleNamespace(nodes=lambda: nodes, remote=remote, get=list, get_runtime_context=lambda: here)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "ray", cluster)
        with pytest.raises(UserError, match=r"the node 10\.0\.0\.22 does not find .*scratch: with --distributed"):
            distributed._check_nodes(parts)
        here.get_node_id = lambda: 28 * "22"
        distributed._check_nodes(parts)
    shutil.rmtree(parts.folder)
    assert "does not find" in distributed._write(parts, {"task": 0})["mistake"]


def test_a_part_that_cannot_be_compared_is_a_failure(tmp_path: Path) -> None:
    """A part that is not found must not count as one without texts."""
    parts = parts_of(tmp_path)
    (compared,) = distributed._digests(parts, "texts", 1, pyarrow.table({"task": [0]}))
    noted = distributed._note(parts, "texts", distributed._repeated(compared))
    assert "No such file or directory" in noted["failure"][0].as_py()
    parts.write(0)
    (compared,) = distributed._digests(parts, "texts", 1, pyarrow.table({"task": [0]}))
    assert len(compared) == 1
    again = distributed._repeated(pyarrow.concat_tables([compared, compared]))
    assert distributed._note(parts, "texts", again)["failure"][0].as_py() == ""
    shutil.rmtree(parts.part(0))
    assert "No such file or directory" in distributed._note(parts, "texts", again)["failure"][0].as_py()


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.slow
@pytest.mark.usefixtures("ray_of_two")
def test_the_first_mistake_is_said_and_nothing_left(tmp_path: Path) -> None:
    posts(tmp_path / "in" / "0.jsonl", 1)
    with open(tmp_path / "in" / "0.jsonl", "a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"0\.jsonl line 3001 is not JSON"):
        prepare(str(tmp_path / "in"), output=tmp_path / "out" / "corpus", cache=tmp_path / "cache",
                fill=partial(distributed.fill, size=SIZE))  # fmt: skip
    assert not list((tmp_path / "out").iterdir())


def test_too_little_space_is_said_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a line\n" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(10_000, 9_000, 1_000))
    with pytest.raises(UserError, match=r"GB free, and the text of .*a\.txt takes .* set RAYTRAIN_CACHE or --output"):
        prepare(str(tmp_path / "a.txt"), output=tmp_path / "out" / "corpus", cache=tmp_path / "cache",
                fill=distributed.fill)  # fmt: skip


def test_an_address_without_a_cluster_to_join_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a line\n" * 1000)
    source = ("prepare", tmp_path / "a.txt", "--output", tmp_path / "out")
    assert "--address goes with --distributed" in refusal(
        command.main, (*source, "--address", "10.0.0.1:6379"), monkeypatch, capsys
    )
    assert "write HOST:PORT" in refusal(command.main, (*source, "--distributed", "--address", "x"), monkeypatch, capsys)
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.slow
def test_the_command_gives_the_corpus_of_one_process(tmp_path: Path, ray_cpu: str) -> None:
    posts(tmp_path / "in" / "0.jsonl", 1)
    digests = []
    for output, options in (("whole", []), ("made", ["--distributed", "--address", ray_cpu])):
        prepare_it = [sys.executable, "-m", "raytrain.data", "prepare", "in", "--output", output, *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAYTRAIN_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(prepare_it, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\n") == 1, "the form that was found, and nothing of Ray's"
        digests.append([line for line in done.stdout.splitlines() if line.startswith("digest: ")])
    assert digests[0] == digests[1] != []
