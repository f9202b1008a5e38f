"""Searches and runs whose only homes are a real S3 server and a real MLflow server, and what these survive."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytrain.runs import checkpoint
from raytrain.storage import open_storage
from raytrain.tracking.client import connect
from tests.support.machine import Machine, kill, wait_for
from tests.support.mlflow_server import MlflowServer
from tests.support.s3_server import S3Server
from tests.support.tiny import SPACE, TINY, write_text


def children(uri: str, search: str) -> list[Any]:
    """The MLflow runs of a search's trials."""
    client = connect(uri)
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    parents = [run.info.run_id for run in found if run.info.run_name == search]
    assert len(parents) == 1
    return [run for run in found if run.data.tags.get("mlflow.parentRunId") == parents[0]]


def test_a_killed_search_goes_on_elsewhere_and_its_champion_speaks_anywhere(
    machines: Callable[..., Machine], s3: S3Server, mlflow_server: MlflowServer
) -> None:
    started = time.time()
    first = machines("first")
    write_text(first.folder / "text.txt")
    (first.folder / "space.py").write_text(SPACE)
    process = first.start(
        "-m", "raytrain.tune", "hybrid", *TINY, "--data", "text.txt", "--space", "space.py", "--name", "s3",
        "--num-samples", "3", "--max-concurrent", "1",
    )  # fmt: skip
    wait_for(lambda: "trial 001 running at step 5" in first.output() or process.poll() is not None, 240, "trial 001")
    assert process.poll() is None, first.output()[-3000:]
    assert_no_secret_on_command_lines(s3.secret())
    kill(process)
    shutil.rmtree(first.folder)  # the machine is gone

    second = machines("second")
    output = second.run("-m", "raytrain.tune", "--resume", "s3")
    assert "best trial" in output
    assert "models:/raytrain-hybrid@champion" in output or "models:/raytrain-hybrid@challenger" in output
    trials = children(mlflow_server.uri, "s3")
    assert sorted(run.info.run_name for run in trials) == ["000 s3", "001 s3", "002 s3"]
    for run in trials:
        steps = [point.step for point in connect(mlflow_server.uri).get_metric_history(run.info.run_id, "valid/bound")]
        assert sorted(steps) == list(range(5, 5 * len(steps) + 1, 5))
    assert [path.name for path in second.folder.iterdir()] == ["output.txt"]

    third = machines("third")
    text = third.run(
        "-c",
        "import mlflow; model = mlflow.pyfunc.load_model('models:/raytrain-hybrid@champion')\n"
        "print(len(model.predict([''], params={'num_texts': 3})))",
    )
    assert text.splitlines()[-1] == "3"
    assert len(third.run("-m", "raytrain.sample", "models:/raytrain-hybrid@champion", "--num", "2").splitlines()) == 2
    told = third.run("-m", "raytrain.registry", "list")
    assert "champion" in told
    figures = third.run(
        "-m", "raytrain.evaluate", "models:/raytrain-hybrid@champion", "--iw-draws", "5", "--num-texts", "8"
    )
    assert "negative ELBO" in figures
    assert_no_secret_in_files(
        s3.secret(),
        [second.folder, second.home, third.folder, third.home, mlflow_server.folder, *ray_sessions(started)],
    )
    assert_no_secret_in_objects(s3)


@pytest.mark.long
def test_a_run_goes_on_elsewhere_with_the_settings_of_older_servers(
    machines: Callable[..., Machine], s3: S3Server, mlflow_server: MlflowServer
) -> None:
    settings = {
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
    first = machines("first", **settings)
    write_text(first.folder / "text.txt")
    steps = ["--steps", "700", "--evaluate-every", "100", "--checkpoint-every", "100"]
    process = first.start("-m", "raytrain.train", "hybrid", *TINY, *steps, "--data", "text.txt", "--name", "old")
    location = open_storage("s3://raytrain/home/old/checkpoints")
    wait_for(lambda: checkpoint.newest_step(location) is not None or process.poll() is not None, 120, "a checkpoint")
    assert process.poll() is None, first.output()[-3000:]
    kill(process)
    assert not open_storage("s3://raytrain/home/old").exists("outcome.json")
    stopped = checkpoint.latest(location)
    assert stopped is not None

    second = machines("second", **settings)
    output = second.run("-m", "raytrain.train", "--resume", "old")
    assert "best at step" in output
    outcome = json.loads(open_storage("s3://raytrain/home/old").read("outcome.json"))
    assert outcome["step"] == 700
    refused = machines("third").run("-m", "raytrain.train", "--resume", "none", status=2)
    assert "error: --resume none: there is no such run in s3://raytrain/home" in refused


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "another"}, "wrong secret"),
        ({"RAYTRAIN_STORAGE": "s3://missing/home"}, "there is no bucket 'missing'"),
        ({"AWS_ACCESS_KEY_ID": "test:reader", "AWS_SECRET_ACCESS_KEY": "{reader}"}, "no permission"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line_before_ray_starts(
    machines: Callable[..., Machine], s3: S3Server, tmp_path: Path, changes: dict[str, str], line: str
) -> None:
    changes = {name: value.format(reader=s3.secret("test:reader")) for name, value in changes.items()}
    rays = tmp_path / "ray"
    rays.mkdir()
    here = machines("here", RAY_TMPDIR=str(rays), **changes)
    told = here.run("-m", "raytrain.tune", "hybrid", *TINY, status=2, timeout=90).strip()
    assert told.startswith("error: storage")
    assert line in told
    assert "\n" not in told
    assert list(rays.iterdir()) == []


def assert_no_secret_on_command_lines(secret: str) -> None:
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes())
        except OSError:
            continue  # it has ended
    assert len(lines) > 5
    assert not [line for line in lines if secret.encode() in line]


def ray_sessions(since: float) -> list[Path]:
    """The folders of the Ray instances that were started on this machine since then."""
    found = [path for path in Path("/tmp/ray").glob("session_*") if not path.is_symlink()]
    recent = [path for path in found if path.stat().st_mtime >= since]
    assert len(recent) >= 2
    return recent


def assert_no_secret_in_files(secret: str, folders: list[Path]) -> None:
    found, looked = [], 0
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                looked += 1
                found += [file] if secret.encode() in file.read_bytes() else []
    assert looked > 50
    assert not found


def assert_no_secret_in_objects(s3: S3Server) -> None:
    client, looked = s3.client(), 0
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="raytrain"):
        for entry in page.get("Contents", []):
            looked += 1
            assert s3.secret().encode() not in client.get_object(Bucket="raytrain", Key=entry["Key"])["Body"].read()
    assert looked > 20
