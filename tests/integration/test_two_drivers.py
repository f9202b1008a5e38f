"""Two drivers of one search or run: the second is told whose it is, by one line and status 2, before Ray is joined."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

import raytrain.train as train
import raytrain.tune as tune
from raytrain.config.schema import to_dict
from raytrain.config.workers import WorkerOptions
from raytrain.data.prepare import prepare
from raytrain.runs.records import PLAN, claim_name
from raytrain.search.plan import Plan
from raytrain.search.space import read_space
from raytrain.storage.base import Storage
from raytrain.storage.lease import LEASES, LeaseLostError, driving, read_holder, take
from raytrain.storage.local import FolderStorage
from raytrain.training import torchrun
from raytrain.utils.errors import run_command
from tests.conftest import tiny_config
from tests.integration.test_commands import TEXT
from tests.support.refusal import refusal

SPACE = "def space(trial):\n    return {'objective.alpha': trial.suggest_float('alpha', 0.0, 1.0)}\n"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderStorage:
    """A storage with a search ``s`` and a run ``r``, as ``--resume`` finds them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT)
    storage = FolderStorage(tmp_path / "runs")
    corpus = prepare("text.txt", cache=tmp_path / "runs" / ".cache")
    config = tiny_config("hybrid", data="text.txt")
    claim_name(storage, "r", config, corpus, experiment="raytrain", worker_options=WorkerOptions())
    plan = Plan(
        identity="0" * 16, space=read_space("mine", SPACE), bases={"hybrid": config}, budget=None, algorithm="tpe",
        corpus=corpus.digest, num_samples=2, seed=0, workers={}, experiment="raytrain", corpus_path=str(corpus.path),
    )  # fmt: skip
    storage.write(f"s/{PLAN}", plan.to_json())
    return storage


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["tune", "--resume", "s"], "--resume s: the search is driven by user"),
        (["tune", "hybrid", "--data", "text.txt", "--name", "s"], "--name s: the search is driven by user"),
        (["train", "--resume", "r"], "--resume r: the run is driven by user"),
        (["train", "hybrid", "--data", "text.txt", "--name", "r"], "--name r: the run is driven by user"),
    ],
)
def test_the_second_driver_is_told_whose_it_is(
    runs: FolderStorage,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    line: str,
) -> None:
    before = ray.is_initialized()
    name = "s" if command[0] == "tune" else "r"
    monkeypatch.setattr(sys, "argv", command)
    with driving(runs.child(name), 0, name):
        known = runs.list()
        with pytest.raises(SystemExit) as ended:
            run_command({"tune": tune.main, "train": train.main}[command[0]])
        assert runs.list() == known
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {line}")
    assert f"on host {os.uname().nodename} (process {os.getpid()}) since " in told
    assert ", last heartbeat " in told
    assert told.count("\n") == 1
    assert ray.is_initialized() == before
    assert runs.list(name)[0] == f"{name}/{LEASES}/00000001.json"


def test_torchrun_does_not_share_a_folder_either(
    runs: FolderStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus,) = (tmp_path / "runs" / ".cache" / "corpora").iterdir()
    Path("config.json").write_text(json.dumps(to_dict(tiny_config("hybrid", steps=2))))
    storage = runs.child("loop")
    command = ["loop", "config.json", "--corpus", str(corpus), "--storage", storage.uri()]
    with driving(storage, 0, "loop"):
        line = refusal(torchrun.main, tuple(command[1:]), monkeypatch, capsys)
    assert line.startswith(f"error: --storage {storage.uri()}: the run is driven by user")
    monkeypatch.setattr(sys, "argv", command)
    torchrun.main()
    assert storage.exists("step-00000002/manifest.json")
    assert read_holder(storage, 2).released

    def followed(config: Any, corpus: Any, world: Any, given: Storage, report: Any) -> None:
        take(storage, 3, "loop").release()
        given.write("late", b"")

    monkeypatch.setattr(torchrun, "train", followed)
    with pytest.raises(LeaseLostError):
        torchrun.main()
    assert not storage.exists("late")
