"""Mistakes on the command line: one line, exit status 2, and no Ray started. And the help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

import raytrain.train as train
import raytrain.tune as tune
from raytrain.config.cli import default_config, parse_choice, parse_fields
from raytrain.config.presets import preset
from raytrain.config.schema import to_dict
from raytrain.models.ladder import Ladder
from raytrain.training.launch import TrainedRun
from raytrain.training.options import TrainOptions
from tests.conftest import tiny_config
from tests.support.refusal import refusal

COMMANDS = {"train": train.main, "tune": tune.main}
TEXT = "".join(f"line {number} of a text that is longer than one window of 64 bytes\n" for number in range(300))
BOTH = pytest.mark.parametrize("command", list(COMMANDS))


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; returns its one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "text.txt").write_text(TEXT)

    def run(command: str, *arguments: str) -> str:
        before = ray.is_initialized()
        line = refusal(COMMANDS[command], arguments, monkeypatch, capsys)
        assert ray.is_initialized() == before  # the tests may share an instance
        return line

    return run


@BOTH
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "name the model first"),
        (["gpt"], "unknown model 'gpt': must be one of hybrid, lstm_vae, byte_lstm"),
        (["hybrid", "--stepz", "3"], "unknown option '--stepz'"),
        (["hybrid", "--steps"], "--steps needs a value"),
        (["hybrid", "--steps", "many"], "--steps: invalid literal"),
        (["hybrid", "--steps", "0"], "steps is 0: must be positive"),
        (["hybrid", "--model.layers", "3"], "unknown option '--model.layers'"),
        (["hybrid", "--objective.annealing", "cosine"], "must be one of constant, linear, sigmoid, cyclical"),
        (["hybrid", "--optimizer.schedule", "step"], "must be one of exponential, constant, linear, cosine"),
        (["hybrid", "--length", "3"], "need a length of at least 4"),
        (["hybrid", "--preset", "big"], "unknown preset 'big'"),
        (["hybrid", "--preset", "bios"], "no preset 'bios' for hybrid"),
        (["hybrid", "--preset", "stream"], "no preset 'stream' for hybrid"),
        (["hybrid", "--sampling", "stream"], "sampling is 'stream': hybrid carries no state from one chunk of text"),
        (["hybrid", "--config", "none.json"], "cannot read the config none.json"),
        (["hybrid", "--data", "none.txt"], "none.txt"),
        (["hybrid", "--data", "empty.txt"], "empty.txt"),
        (["hybrid", "--data", "binary.txt"], "binary.txt"),
        (["hybrid", "--data", "short.txt"], "short.txt"),
        (["hybrid", "--data", "text.txt", "--length", "100000"], "less than one sample of length 100000"),
        (["hybrid", "--data", "bios"], "--data-path"),
        (["hybrid", "--data", "text.txt", "--storage", "text.txt/below"], "text.txt"),
        (["hybrid", "--data", "text.txt", "--storage", "ftp://host/x"], "s3://bucket/prefix"),
        (["hybrid", "--data", "text.txt", "--storage", "s3:/bucket/x"], "s3://bucket/prefix"),
        (["hybrid", "--data", "text.txt", "--storage", '"s3://bucket/x"'], "quotes"),
        (["hybrid", "--data", "s3:/bucket/x"], "no source 's3:/bucket/x'"),
        (["hybrid", "--name", "../x"], "--name '../x'"),
    ],
)
def test_a_mistake_is_one_line(
    refused: Callable[..., str], tmp_path: Path, command: str, arguments: list[str], line: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "short.txt").write_text("abc\n")
    assert line in refused(command, *arguments)


@BOTH
def test_a_text_that_is_not_there_is_refused_before_anything_is_made(
    refused: Callable[..., str], tmp_path: Path, command: str
) -> None:
    assert "none.txt" in refused(command, "hybrid", "--data", "none.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("space", "line"),
    [
        ("", "has no function space(trial)"),
        ("def space(trial):\n    return {'objective.alhpa': 0.1}", "unknown field 'objective.alhpa'"),
        ("def space(trial):\n    return {'model.layers': 2}", "unknown field 'model.layers'"),
        ("def space(trial):\n    return {'model.latent': -2}", "model.latent is -2"),
        ("def space(trial):\n    return {'model.feature_maps': [8, 8]}\n", "model.decoder_maps"),
        ("def space(trial):\n    return 3", "must return a dict"),
        ("def space(trial):\n    return {'seed': trial.suggest_int('seed', 5)}", "TypeError"),
        # only some of the points are wrong
        (
            "def space(trial):\n    return {'objective.alpha': trial.suggest_float('a', -1, 1)}",
            "objective.alpha is -0.",
        ),
        ("import nonsense_module", "ModuleNotFoundError"),
        ("def space(trial)", "SyntaxError"),
    ],
)
def test_a_wrong_search_space_is_one_line(refused: Callable[..., str], tmp_path: Path, space: str, line: str) -> None:
    (tmp_path / "space.py").write_text(space)
    maps = ["--model.feature-maps", "8", "--model.decoder-maps", "8"]
    assert line in refused("tune", "hybrid", *maps, "--data", "text.txt", "--space", "space.py")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--space", "none.py"], "--space none.py: there is no such file"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--max-concurrent", "0"], "--max-concurrent is 0"),
        (["--time-budget", "-5"], "--time-budget is -5"),
        (["--workers-per-trial", "5"], "5 workers cannot share a batch of 32"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(refused: Callable[..., str], arguments: list[str], line: str) -> None:
    assert line in refused("tune", "hybrid", "--data", "text.txt", *arguments)


def test_a_config_of_another_model_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny_config("byte_lstm"))))
    assert "is a config of byte_lstm, not of hybrid" in refused("train", "hybrid", "--config", "config.json")
    (tmp_path / "config.json").write_text('{"model": {"name": "hybrid", "latent": "many"}}')
    assert "model.latent is 'many': must be int" in refused("train", "hybrid", "--config", "config.json")


@pytest.mark.slow
@pytest.mark.parametrize("stated", ["--address", "RAY_ADDRESS", "the last one"])
def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path, stated: str) -> None:
    """In a process of its own, as a user sees it: no traceback, and none at exit either."""
    (tmp_path / "text.txt").write_text(TEXT)
    command = [sys.executable, "-m", "raytrain.train", "hybrid", "--data", "text.txt"]
    variables = {"RAYTRAIN_CACHE": str(tmp_path), "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(tmp_path)}
    if stated == "--address":
        command += ["--address", "127.0.0.1:1"]
    elif stated == "RAY_ADDRESS":
        variables["RAY_ADDRESS"] = "127.0.0.1:1"
    else:  # as `ray start` leaves it where the machine has died
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **variables}
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: no Ray cluster answers at 127.0.0.1:1 ({stated}")
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("model", ["hybrid", "lstm_vae", "byte_lstm"])
def test_every_shipped_space_can_be_run_from_the_default(model: str) -> None:
    from raytrain.search.space import check_space, load_space

    points = check_space(load_space(model), {model: preset("laptop", model)}, None, "tpe", 0)  # type: ignore[arg-type, dict-item]
    assert len({json.dumps(to_dict(point)) for point in points}) > 50
    # annealing ends by half of the steps, so that every trial can be compared for as long again
    assert all(point.objective.end <= 0.5 for point in points)


def test_fields_change_the_preset() -> None:
    arguments = ["lstm_vae", "--data", "tweets", "--steps", "7", "--objective.alpha", "0.5", "--workers", "2"]
    choice, rest = parse_choice("raytrain.train", arguments)
    options, config = parse_fields("raytrain.train", TrainOptions(), default_config(choice, "laptop"), rest)
    assert options.workers == "2"
    assert (config.model_name, config.steps, config.objective.alpha) == ("lstm_vae", 7, 0.5)
    # tweets are drawn as whole documents unless said otherwise
    assert (config.data, config.sampling, config.length) == ("tweets", "documents", 128)


def help_of(command: str, *arguments: str) -> tuple[str, set[str]]:
    """What ``--help`` says, and the packages that were imported for it."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"raytrain.{command}", *arguments, "--help"],
        capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    return done.stdout, {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}


@BOTH
def test_help_names_every_option(command: str) -> None:
    said, _ = help_of(command, "hybrid")
    for option in ("--data", "--steps", "--model.feature-maps", "--objective.annealing", "--storage", "--name"):
        assert option in said


@pytest.mark.parametrize(
    "command", "tune train bench evaluate sample report registry data storage spot tracking cluster".split()
)
def test_help_is_quick(command: str) -> None:
    """Nothing is imported for it that takes seconds."""
    said, packages = help_of(command)
    assert f"raytrain.{command}" in said
    assert "raytrain" in packages
    assert not packages & {"torch", "ray", "mlflow", "pandas", "pyarrow", "optuna", "boto3", "matplotlib"}


@pytest.mark.parametrize(("bits", "warned"), [(2.5, True), (2.0, True), (1.9, False)])
def test_the_last_lines_of_a_run_hold_it_against_counting(
    bits: float, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    best = {"bits_per_byte": bits, "bound": 80.0, "reconstruction": 76.0, "kl": 4.0, "active_units": 3.0}
    outcome = {"best": best, "best_step": 20, "precision": "float32", "device": "cpu", "samples": ["a text"]}
    ladder = Ladder((5.0, 4.0, 3.0, 2.0, 2.1, 2.2, 2.3, 2.4), 9, 9, 0.5)
    config = tiny_config("hybrid")
    train.print_outcome(
        TrainedRun(name="r", location="runs/r", config=config, outcome=outcome, ladder=ladder, run=None, view="there")
    )
    lines = capsys.readouterr().out.splitlines()
    assert f"model {bits:.3f}, byte 4-gram 2.000, entropy 0.500 bits per byte" in lines
    warnings = [line for line in lines if line.startswith("warning: ")]
    more = f"{bits / 2 - 1:.1%}"
    text = (
        f"warning: the model has learnt less than counting: it needs {more} more than a byte 4-gram; try more --steps"
    )
    assert warnings == ([text] if warned else [])


@pytest.mark.parametrize(
    ("model", "mended"), [("hybrid", {"mean_norm": 0.4}), ("hybrid, normalised", {"mean_norm": 0.9})]
)
def test_a_collapsed_run_names_an_option_that_mends_it(model: str, mended: dict[str, float]) -> None:
    config = tiny_config(model)
    changed = train.read_command(["hybrid", *train.remedy(config).split()], has_gpus=False)[1].model
    assert {"mean_norm": changed.mean_norm} == mended
