"""The S3 server goes away: for a while during a run, and for good while a search promotes its best model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raytrain.runs import checkpoint
from raytrain.search.registry import CHAMPION
from raytrain.storage import open_storage
from raytrain.tracking.client import connect
from tests.support.machine import Machine, wait_for
from tests.support.mlflow_server import MlflowServer, new_store
from tests.support.s3_server import S3Server
from tests.support.tiny import SPACE, TINY, write_text

AT_PROMOTION = """
import pathlib, sys, time
import raytrain.search.finish as finish, raytrain.tracking.client as client
from raytrain.utils.errors import run_command
from raytrain.tune import main

client.PATIENCE_S = 5
promote = getattr(finish, sys.argv[1])

def wait_then_promote(*arguments, **options):
    flag = pathlib.Path("at-promotion")
    flag.touch()
    while flag.exists():
        time.sleep(0.1)
    return promote(*arguments, **options)

setattr(finish, sys.argv.pop(1), wait_then_promote)
run_command(main)
"""
"""The command, which stops and asks to be let on where the step of promotion begins that its argument names."""


@pytest.mark.parametrize(("away_s", "steps"), [(10, 1000), pytest.param(60, 3000, marks=pytest.mark.long)])
def test_a_run_outlives_an_outage_of_its_storage(
    machines: Callable[..., Machine],
    s3: S3Server,
    mlflow_server: MlflowServer,
    ray_cpu: str,
    tmp_path: Path,
    away_s: float,
    steps: int,
) -> None:
    here = machines("here")
    write_text(here.folder / "text.txt")
    often = ["--steps", str(steps), "--evaluate-every", "250", "--checkpoint-every", "100", "--data", "text.txt"]
    often += ["--cpus-per-worker", "1"]
    name = f"outage-{away_s}"
    process = here.start("-m", "raytrain.train", "hybrid", *TINY, *often, "--name", name)
    location = open_storage(f"s3://raytrain/home/{name}/checkpoints")
    try:
        wait_for(
            lambda: checkpoint.newest_step(location) is not None or process.poll() is not None, 120, "a checkpoint"
        )
        s3.kill()
        time.sleep(away_s)
        assert process.poll() is None, here.output()[-3000:]
    finally:
        s3.start()
    assert process.wait(240) == 0, here.output()[-3000:]

    undisturbed = machines("undisturbed", RAYTRAIN_STORAGE=str(tmp_path / "runs"), RAY_ADDRESS=ray_cpu)
    write_text(undisturbed.folder / "text.txt")
    undisturbed.run("-m", "raytrain.train", "hybrid", *TINY, *often, "--name", f"{name}-not")
    whole = checkpoint.latest(open_storage(tmp_path / f"runs/{name}-not/checkpoints"))
    ended = checkpoint.latest(location)
    assert whole is not None
    assert ended is not None
    assert ended.step == whole.step == steps
    assert all((ended.tensors("model")[name] == tensor).all() for name, tensor in whole.tensors("model").items())
    client = connect(mlflow_server.uri)
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert len(found) == 1
    history = client.get_metric_history(found[0].info.run_id, "train/bound")
    assert sorted(point.step for point in history) == list(range(10, steps + 1, 10))


@pytest.mark.long
@pytest.mark.parametrize("step", ["log_model", "register_and_compete"])
def test_a_champion_is_there_and_loads_when_the_storage_goes_for_good_during_a_promotion(
    machines: Callable[..., Machine], s3: S3Server, tmp_path: Path, step: str
) -> None:
    # without a server, MLflow's artifacts are in the storage too
    homes = {"RAYTRAIN_STORAGE": f"s3://raytrain/{step}", "MLFLOW_TRACKING_URI": new_store(tmp_path / "store")}
    here = machines("here", **homes)
    write_text(here.folder / "text.txt")
    (here.folder / "space.py").write_text(SPACE)
    search = ["lstm_vae", *TINY[6:], "--model.latent", "4", "--model.hidden", "16", "--data", "text.txt"]
    search += ["--space", "space.py", "--num-samples", "1"]
    here.run("-m", "raytrain.tune", *search, "--name", "first", "--seed", "1")
    client = connect(homes["MLFLOW_TRACKING_URI"])
    before = client.get_model_version_by_alias("raytrain-lstm_vae", CHAMPION)

    # more steps: the better model, which would take over
    flag = here.folder / "at-promotion"
    process = here.start("-c", AT_PROMOTION, step, *search, "--name", "second", "--steps", "80")
    wait_for(lambda: flag.exists() or process.poll() is not None, 240, "the promotion")
    assert process.poll() is None, here.output()[-3000:]
    try:
        s3.kill()
        flag.unlink()
        assert process.wait(120) == 2, here.output()[-3000:]
    finally:
        s3.start()
    lines = here.output().splitlines()
    assert any(line.startswith("error: the best model was not") and "--resume second" in line for line in lines)
    assert client.get_model_version_by_alias("raytrain-lstm_vae", CHAMPION).version == before.version

    elsewhere = machines("elsewhere", **homes)
    loads = ["-m", "raytrain.sample", "models:/raytrain-lstm_vae@champion", "--num", "1"]
    elsewhere.run(*loads)
    told = elsewhere.run("-m", "raytrain.tune", "--resume", "second")
    assert "trial 000 finished" in told
    now = client.get_model_version_by_alias("raytrain-lstm_vae", CHAMPION)
    assert int(now.version) > int(before.version)
    assert json.loads(open_storage(f"s3://raytrain/{step}/second").read("search.json"))["num_samples"] == 1
    elsewhere.run(*loads)
