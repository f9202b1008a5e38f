from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from raytrain import evaluate
from raytrain.analysis import measure
from raytrain.config.schema import flatten, to_dict
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.runs.records import write_run_address
from raytrain.storage import open_storage
from raytrain.tracking.runs import Experiment
from raytrain.training.loop import train
from raytrain.training.reporters import PrintReporter
from raytrain.training.trainer import World
from tests.conftest import TINY_MODELS, tiny_config
from tests.support.mlflow_server import new_store
from tests.support.ray_instance import assert_nothing_left
from tests.support.refusal import refusal
from tests.unit.analysis.test_evaluation import same

QUICK = ["--evaluate-samples", "48", "--iw-draws", "3", "--num-texts", "8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Callable[[str], Path]:
    """Folders of runs that have trained for a few steps, made when they are first asked for."""
    root = tmp_path_factory.mktemp("trained")

    def folder(model: str) -> Path:
        location = root / model
        if not location.exists():
            documents = {"sampling": "documents", "length": 64} if model == "byte_lstm" else {}
            config = tiny_config(model, steps=4, evaluate_every=4, data=str(corpus.path), **documents)
            train(config, corpus, World(), open_storage(location).child("checkpoints"), PrintReporter(config))
        return location

    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "cache"))
    for name in ("MLFLOW_TRACKING_URI", "RAYTRAIN_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def command(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command and returns what it has printed."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        capsys.readouterr()
        evaluate.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; returns its one line."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        return refusal(evaluate.main, arguments, monkeypatch, capsys)

    return run


@pytest.mark.parametrize("model", list(TINY_MODELS))
def test_every_model_is_measured(
    command: Callable[..., str], trained: Callable[[str], Path], home: Path, corpus: Corpus, model: str
) -> None:
    output = command(trained(model), *QUICK)
    result = json.loads((home / "evaluation-valid.json").read_text())
    metrics, texts = result["metrics"], result["texts"]
    assert result["model"] == model
    assert result["step"] == 4
    assert result["corpus"] == {"name": "synthetic", "digest": corpus.digest}
    assert metrics["samples"] == 48
    assert metrics["bits_per_byte"] == pytest.approx(
        metrics["bound"] * 48 / metrics["text_bytes"] / math.log(2)
    )  # fmt: skip
    for title in ("reconstruction by position", "negative ELBO by length", "self-BLEU", "longest copy (model)"):
        assert title in output
    assert ("importance-weighted NLL (3 draws)" in output) == (model != "byte_lstm")
    assert ("active units" in output) == (model != "byte_lstm")
    assert result["over_long_left_out"] == (0 if model != "byte_lstm" else over_long(corpus, 64))
    assert texts["model"]["texts"] == texts["split"]["texts"] == 8
    assert texts["split"]["valid_utf8"] > texts["model"]["valid_utf8"]  # four steps teach nothing
    assert texts["split"]["copied_mean_bytes"] > texts["model"]["copied_mean_bytes"]
    assert texts["model"]["searched_bytes"] == len(corpus.split("train").stream)


def over_long(corpus: Corpus, length: int) -> int:
    split = corpus.split("valid")
    return sum(len(split.document(number)) >= length for number in range(split.num_documents))


def test_files_are_not_written_over_unless_they_are_named(
    command: Callable[..., str], trained: Callable[[str], Path], home: Path
) -> None:
    few = ["--evaluate-samples", "16", "--num-texts", "0"]
    assert "written: evaluation-train.json" in command(trained("byte_lstm"), "--split", "train", *few)
    first = (home / "evaluation-train.json").read_bytes()
    assert "written: evaluation-train-2.json" in command(trained("byte_lstm"), "--split", "train", *few)
    assert (home / "evaluation-train.json").read_bytes() == first
    (home / "own.json").write_text("old")
    command(trained("byte_lstm"), *few, "--output", "own.json")
    result = json.loads((home / "own.json").read_text())
    assert result["split"] == "valid"
    assert result["texts"] is None


def test_another_corpus_can_be_measured(
    command: Callable[..., str], trained: Callable[[str], Path], home: Path
) -> None:
    with CorpusWriter(home / "other", name="other", source="test") as writer:
        for split in ("train", "valid", "test"):
            for number in range(200):
                writer.add(split, f"{split} document {number * 37 % 200}".encode())  # type: ignore[arg-type]
    command(
        trained("byte_lstm"), "--data", home / "other", "--split", "test", "--evaluate-samples", "0", "--num-texts", "4"
    )
    result = json.loads((home / "evaluation-test.json").read_text())
    assert result["corpus"]["name"] == "other"
    assert result["metrics"]["samples"] == 200


@pytest.mark.slow
def test_results_go_to_the_models_own_run(
    command: Callable[..., str],
    trained: Callable[[str], Path],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    corpus: Corpus,
) -> None:
    uri = new_store(home)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    experiment = Experiment.open(uri, "e", str(home / "artifacts"))
    config = tiny_config("hybrid")
    run = experiment.open_run(
        "identity", "r", config=to_dict(config), parameters=flatten(config), tags={"corpus": corpus.digest}
    )
    location = trained("hybrid")
    write_run_address(open_storage(location), run)
    output = command(location, *QUICK)
    assert f"logged: {run.ui_hint()}" in output

    client = MlflowClient(uri)
    metrics = client.get_run(run.run_id).data.metrics
    result = json.loads((home / "evaluation-valid.json").read_text())
    assert metrics["evaluation/valid/bound"] == pytest.approx(result["metrics"]["bound"])
    assert metrics["evaluation/valid/importance_weighted"] == pytest.approx(result["metrics"]["importance_weighted"])
    assert metrics["samples/self_bleu"] == pytest.approx(result["texts"]["model"]["self_bleu"])
    assert "valid/bound" not in metrics  # the training loop's own
    assert client.get_metric_history(run.run_id, "evaluation/valid/bound")[0].step == 4
    file = client.download_artifacts(run.run_id, "evaluation/valid-step-00000004.json", str(home))
    assert json.loads(Path(file).read_text())["metrics"] == result["metrics"]

    # a second time, with more draws: the newest is the value
    command(location, *QUICK, "--evaluate-samples", "32")
    newest = json.loads((home / "evaluation-valid-2.json").read_text())["metrics"]["bound"]
    assert client.get_run(run.run_id).data.metrics["evaluation/valid/bound"] == pytest.approx(newest)

    # of another corpus than the one of training
    with CorpusWriter(home / "other", name="other", source="test") as writer:
        for split in ("train", "valid", "test"):
            writer.add(split, b"some other text " * 100)  # type: ignore[arg-type]
    command(location, *QUICK, "--data", home / "other", "--split", "test")
    metrics = client.get_run(run.run_id).data.metrics
    assert "other/test/bound" in metrics
    assert "test/bound" not in metrics

    before = client.get_run(run.run_id).data.metrics
    assert "logged" not in command(location, *QUICK, "--no-log-to-mlflow")
    assert client.get_run(run.run_id).data.metrics == before


def test_the_test_split_has_its_own_name() -> None:
    result: dict[str, Any] = {"split": "test", "metrics": {"bound": 1.0, "by_length": []}, "texts": None}
    assert measure.metric_values(result, "") == {"test/bound": 1.0}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--split", "test"], "corpus synthetic has no split 'test'; it has train, valid"),
        (["--split", "dev"], "--split is 'dev': must be one of train, valid, test"),
        (["--iw-draws", "0"], "--iw-draws is 0: must be at least 1"),
        (["--evaluate-samples", "-1"], "--evaluate-samples is -1: must be at least 0"),
        (["--num-texts", "-2"], "--num-texts is -2: must be at least 0"),
        (["--num-texts", "1"], "--num-texts is 1: texts are measured against each other"),
        (["--workers", "0"], "--workers is 0: must be at least 1"),
        (["--workers", "many"], "--workers: invalid literal"),
        (["--output", "nowhere/file.json"], "--output nowhere/file.json cannot be written: No such file"),
        (["--output", "."], "--output . cannot be written: Is a directory"),
        (["--data", "none.txt"], "none.txt"),
        (["--data", "short.txt"], "short"),
        (["--storage", "ftp://host/x"], "s3://bucket/prefix"),
        (["--workers", "2", "--address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
        (["--temperature", "1"], "unknown option '--temperature'"),
    ],
)
def test_a_mistake_is_one_line(
    refused: Callable[..., str], trained: Callable[[str], Path], home: Path, arguments: list[str], line: str
) -> None:
    (home / "short.txt").write_text("abc\n")
    location = trained("byte_lstm")
    assert line in refused(location, *arguments)
    assert not list(home.glob("*.json"))


def test_a_checkpoint_that_is_none_is_one_line(
    refused: Callable[..., str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "does not exist or is empty" in refused("runs/none")
    assert "missing: checkpoint" in refused()
    (home / "file").write_text("text")
    assert "file" in refused("file")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(home))
    assert "there is no models:/none@champion in" in refused("models:/none@champion")


# ------------------------------------------------------------------------------------------ a cluster


@pytest.mark.slow
def test_two_workers_of_a_cluster_measure_what_one_process_does(
    command: Callable[..., str], trained: Callable[[str], Path], ray_cpu: str, home: Path
) -> None:
    arguments = [str(trained("hybrid")), *QUICK, "--evaluate-samples", "100"]
    command(*arguments, "--output", "here.json")
    done = subprocess.run(
        [sys.executable, "-m", "raytrain.evaluate", *arguments, "--workers", "2", "--output", "there.json"],
        cwd=home, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "RAY_ADDRESS": ray_cpu},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    here, there = (json.loads((home / name).read_text()) for name in ("here.json", "there.json"))
    same(there["metrics"], here["metrics"])
    assert there["texts"] == here["texts"]
    assert_nothing_left(ray_cpu)
