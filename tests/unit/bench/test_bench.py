"""The bench: operations counted by hand, the plain step against ours, the rounds, and the command end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytrain.bench import __main__ as bench
from raytrain.bench import baseline, measure, record
from raytrain.bench.baseline import PlainTrainer
from raytrain.bench.flops import count_operations
from raytrain.bench.machine import NoiseWatch
from raytrain.bench.options import parse_command
from raytrain.bench.peak import Ceiling
from raytrain.bench.rounds import Contender, Series, confidence, ratio, take_turns
from raytrain.bench.steps import Steps
from raytrain.bench.table import summary
from raytrain.bench.worker import share_of
from raytrain.config.models import ByteLstmConfig, HybridConfig, LstmVaeConfig
from raytrain.config.presets import preset
from raytrain.config.schema import ObjectiveConfig, RunConfig, to_dict
from raytrain.data.corpus import Corpus
from raytrain.models import Model
from raytrain.models.noise import Noise
from raytrain.training.trainer import Trainer, World
from tests.conftest import TINY_VARIANTS, tiny_config
from tests.support.refusal import refusal

TINY = (
    "--model.layers 2 --model.hidden 16 --length 16 --group-size 8 --evaluate-samples 16 --batch-size 16 "
    "--precision float32 --quick"
).split()


# ------------------------------------------------------------------------------------------ operations


def test_operations_of_a_byte_lstm_are_those_counted_by_hand() -> None:
    config = RunConfig(model=ByteLstmConfig(layers=2, hidden=8, dropout=0.0), length=5)
    symbols, gates = 16 * 5, 4 * 8
    first = 2 * symbols * gates * (259 + 8)  # forward; as many for the gradients of the weights
    second = 2 * symbols * gates * (8 + 8)
    inputs = 2 * symbols * gates * 8  # the second layer's gradient for its inputs; one-hot vectors take none
    states = 2 * (2 * 16 * 4 * gates * 8)  # both layers' gradients for their states, of which the first is given
    output = 3 * 2 * symbols * 8 * 257
    counted = count_operations(config, 16, 5)
    assert counted.all == 2 * first + 2 * second + inputs + states + output
    assert counted.all - counted.necessary == 2 * 2 * symbols * gates * 259
    assert count_operations(config, 48, 5).all == 3 * counted.all


def test_operations_of_a_hybrid_are_those_counted_by_hand() -> None:
    config = RunConfig(model=HybridConfig((4,), (6,), latent=3, hidden=8), length=8)
    batch, length, gates = 16, 6, 4 * 8  # a batch of shorter texts: the convolutions see them padded to 8
    symbols = batch * length
    convolution = 2 * (2 * batch * 4 * 3 * 259 * 4)
    code = 3 * 2 * batch * (4 * 4) * (2 * 3) + 3 * 2 * batch * 3 * (4 * 4)
    deconvolution = 3 * 2 * batch * 4 * 3 * 4 * 6
    lstm = 3 * 2 * symbols * gates * (6 + 259) + 2 * 2 * symbols * gates * 8 + 2 * batch * (length - 1) * gates * 8
    heads = 3 * 2 * symbols * 6 * 257 + 3 * 2 * symbols * 8 * 257
    counted = count_operations(config, batch, length)
    assert counted.all == convolution + code + deconvolution + lstm + heads
    assert counted.all - counted.necessary == convolution + 3 * 2 * symbols * gates * 259


# ------------------------------------------------------------------------------------------ plain step


def plain_names(model: Model) -> dict[str, str]:
    """The plain model's name for each of our parameters."""
    names = {}
    for name, _ in model.named_parameters():
        head, _, rest = name.partition(".")
        number, _, leaf = rest.partition(".")
        match head:
            case "layers":  # of byte_lstm: one-layer LSTMs
                names[name] = f"lstm.{leaf.replace('l0', f'l{number}')}"
            case "convolutions" | "deconvolutions":
                names[name] = f"{head}.{3 * int(number)}.{leaf}"
            case "encoder_norms" | "decoder_norms":
                location = "convolutions" if head == "encoder_norms" else "deconvolutions"
                names[name] = f"{location}.{3 * int(number) + 1}.{leaf}"
            case "lstm":
                names[name] = f"top.{rest}"
            case "bytenet":
                names[name] = (
                    name.replace("bytenet.resize.", "top.resize.0.")
                    .replace("bytenet.resize_norm.", "top.resize.1.")
                    .replace("bytenet.convolutions.", "top.blocks.")
                    .replace("bytenet.norms.", "top.blocks.")
                )
                if ".blocks." in names[name]:
                    location, block, leaf = names[name].rsplit(".", 2)
                    names[name] = f"{location}.{block}.{'0' if 'convolutions' in name else '1'}.{leaf}"
            case _:
                names[name] = name
    return names


@pytest.mark.parametrize(
    "model",
    [
        HybridConfig((16, 32), (32, 16), latent=8, hidden=32),
        HybridConfig((16,), (16,), latent=8, hidden=16, decoder="bytenet", decoder_layers=2),
        LstmVaeConfig(latent=8, hidden=32),
        ByteLstmConfig(layers=2, hidden=32, dropout=0.0),
        *(config for config in TINY_VARIANTS.values() if config.weight_dropout == 0 and not config.layer_norm),
    ],
)
def test_the_plain_step_is_ours_without_noise(corpus: Corpus, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # one group: its batch statistics are those of the batch
    objective = ObjectiveConfig(annealing="constant", weight=0.7, alpha=0.3)
    config = replace(tiny_config("hybrid", batch_size=16), model=model, objective=objective)
    trainer = Trainer(config, corpus, World())
    plain = PlainTrainer(config, torch.device("cpu"))
    weights = dict(trainer.model.named_parameters())
    theirs = dict(plain.model.named_parameters())
    for name, other in plain_names(trainer.model).items():
        theirs[other].data.copy_(weights[name].data)

    def nothing(noise: Noise, *shape: int) -> Tensor:
        return torch.zeros(16, *shape)

    monkeypatch.setattr(Noise, "normal", nothing)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    for step in range(3):
        batch, terms, _ = trainer.train_step(step)
        ours = terms.reconstruction.sum() + 0.7 * terms.kl.sum() + 0.3 * terms.auxiliary.sum()
        assert plain.train_step(batch.tokens, step).item() == pytest.approx(ours.item() / 16, rel=1e-4)
    assert isinstance(plain.model, nn.Module)


def test_the_plain_step_drops_outputs_of_the_last_layer_too() -> None:
    model = baseline.PlainByteLstm(ByteLstmConfig(layers=1, hidden=32, dropout=0.5))
    tokens = torch.randint(256, (4, 8), generator=torch.Generator().manual_seed(0))
    assert len({model(tokens, 1.0, 0.0, 0.0).item() for _ in range(3)}) == 3
    model.eval()
    assert len({model(tokens, 1.0, 0.0, 0.0).item() for _ in range(3)}) == 1


def test_a_regularised_lstm_has_no_plain_step() -> None:
    assert baseline.has_plain(tiny_config("byte_lstm"))
    assert not baseline.has_plain(tiny_config("byte_lstm, regularised"))


# ---------------------------------------------------------------------------------------------- rounds


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def contender(name: str) -> Contender:
        def block(number: int) -> dict[str, float]:
            order.append(f"{name}{number}")
            return {"rate": float(len(order))}

        return Contender(name, block)

    measured = take_turns([contender("a"), contender("b")], 3, lambda line: None)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert measured["b"]["rate"].values == [2.0, 4.0, 6.0]
    assert ratio(measured["b"]["rate"], measured["a"]["rate"]).values == [2.0, 4 / 3, 6 / 5]


def test_the_confidence_interval_is_students() -> None:
    # logarithms 0.1 and 0.3: mean 0.2, its standard error 0.1, t of one degree of freedom 12.71
    low, high = confidence(Series([2.718281828**0.1, 2.718281828**0.3])) or (0, 0)
    assert (low, high) == pytest.approx((2.718281828 ** (0.2 - 1.271), 2.718281828 ** (0.2 + 1.271)))
    assert confidence(Series([1.0])) is None


def test_a_noisy_machine_is_said_to_be_noisy() -> None:
    watch = NoiseWatch()
    watch.load, watch.switches = 0.0, 10**9  # as if it had been alone
    assert watch.report({"float32": Series([1.0, 1.05])})["noisy"] == []
    watch.load = 3.0
    reasons = " ".join(watch.report({"float32": Series([1.0, 1.5])})["noisy"])
    assert "float32 matrix product varied by 40%" in reasons
    assert "3.0 other processes" in reasons


@pytest.mark.parametrize(("size", "shares"), [(1, [[0, 1, 2]]), (2, [[0], [1, 2]]), (4, [[0], [1], [2], [0]])])
def test_workers_have_cores_of_their_own(size: int, shares: list[list[int]]) -> None:
    assert [share_of([0, 1, 2], rank, size) for rank in range(size)] == shares


# --------------------------------------------------------------------------------------------- command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "RAYTRAIN_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def command(
    home: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Runs the command on a tiny model; returns its JSON, and what it has printed."""

    def run(*arguments: str) -> tuple[dict[str, Any], str]:
        given = ["byte_lstm", *TINY, "--data", str(corpus.path), "--output", "bench.json", *arguments]
        monkeypatch.setattr(sys, "argv", ["bench", *given])
        cores = os.sched_getaffinity(0)
        bench.main()
        assert os.sched_getaffinity(0) == cores
        return json.loads((home / "bench.json").read_text()), capsys.readouterr().out

    return run


def positive(part: Any) -> bool:
    """Whether all figures of a part of the JSON that were taken in rounds are above 0."""
    if isinstance(part, dict) and "values" in part:
        return len(part["values"]) == 2 and 0 < part["min"] <= part["median"] <= part["max"]
    items = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    return all(positive(item) for item in items)


def test_the_bench_of_one_process(command: Callable[..., tuple[dict[str, Any], str]], home: Path) -> None:
    sections = ["ceiling", "step", "plain", "checkpoint", "sampling", "data"]
    result, output = command("--only", *sections, "--batch-size", "16", "32", "--storage", "kept")
    assert positive(result)
    assert {(row["batch_size"], row["precision"]) for row in result["step"]} == {(16, "float32"), (32, "float32")}
    for row in [*result["step"], *result["plain"]]:
        assert 0 < row["share_without_look_ups"] < row["share_of_ceiling"] < 1.2
        assert row["bytes_per_second"]["median"] < result["data"]["bytes_per_second"]["median"]
    assert all(row["times_plain"]["median"] > 0.05 for row in result["step"])
    assert {"square 512", "output", "LSTM, one step"} <= result["ceiling"]["products"]["float32"].keys()
    assert result["checkpoint"]["share_inside_save"]["median"] <= result["checkpoint"]["share_of_stall"]["median"]
    assert result["data"]["times_fastest_step"]["median"] > 1
    run = result["run"]
    steps = preset("laptop", "byte_lstm").steps
    assert run["training_seconds"] == pytest.approx(steps * result["step"][0]["step_seconds"]["median"])
    assert run["hours"] * 3600 == pytest.approx(run["training_seconds"] + run["evaluation_seconds"])
    assert f"a run of {steps} steps (batch 16, float32) would take here" in output
    assert output.count("round ") == 2
    assert not list((home / "kept").glob("*"))  # the checkpoints that it wrote


@pytest.mark.slow
def test_the_bench_of_several_processes(command: Callable[..., tuple[dict[str, Any], str]]) -> None:
    result, output = command("--only", "ddp", "memory", "--workers", "1", "2", "--threads", "1")
    assert positive(result)
    alone, both = result["ddp"]["workers"]
    assert alone["fixed_batch_efficiency"]["median"] == alone["fixed_share_efficiency"]["median"] == 1
    assert 0 < both["fixed_batch_efficiency"]["median"] < 1.5
    assert 0 < both["fixed_share_efficiency"]["median"] < 1.5
    assert both["oversubscribed"]
    assert "2 (more than cores)" in output
    (memory,) = result["memory"]
    assert 10e6 < memory["peak_bytes"]["anonymous"] < memory["peak_bytes"]["resident"]


def test_without_ray_its_part_is_left_out(
    command: Callable[..., tuple[dict[str, Any], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "find_spec", lambda name: None if name == "ray" else object())
    result, output = command("--only", "ray", "data")
    assert result["ray"] == {"skipped": "ray not installed"}
    assert "ray: left out, ray not installed" in output


@pytest.mark.long
def test_ray_beside_torchrun(command: Callable[..., tuple[dict[str, Any], str]]) -> None:
    result, output = command("--only", "ray", "--workers", "1", "--threads", "1", "--experiment", "benches")
    part = result["ray"]
    assert positive(part)
    assert 0 < part["share_inside_reports"] < 1.2
    low, high = part["ray_over_torchrun"]["confidence_95"]
    assert low < part["ray_over_torchrun"]["median"] < high
    assert 0 <= part["idle_cores"] < 2
    assert "Ray Train beside torchrun" in output
    assert "logged: " in output


def test_ray_and_mlflow_are_not_imported(home: Path, corpus: Corpus) -> None:
    code = (
        "import sys; from raytrain.bench import __main__ as bench\n"
        "sys.argv[1:] = sys.argv[2:]; bench.main()\n"
        "print(sorted({'ray', 'mlflow', 'boto3', 'pyarrow', 'tyro', 'psutil'} & sys.modules.keys()))"
    )
    config = tiny_config("byte_lstm", data=str(corpus.path), batch_size=16)
    (home / "config.json").write_text(json.dumps(to_dict(config)))
    arguments = ["-", "byte_lstm", "--config", "config.json", "--quick", "--only", "data"]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "name the model first: python -m raytrain.bench MODEL"),
        (["gpt"], "unknown model 'gpt'"),
        (["hybrid", "--preset", "big"], "unknown preset 'big'"),
        (["hybrid", "--only", "speed"], "argument --only: invalid choice: 'speed'"),
        (["hybrid", "--rounds", "0"], "argument --rounds: '0' is not a number of at least 1"),
        (["hybrid", "--seconds", "soon"], "argument --seconds: 'soon' is not a number"),
        (["hybrid", "--batch-size", "32", "40"], "batch_size is 40: must be a multiple of group_size (16)"),
        (["hybrid", "--precision", "float16"], "only GPUs compute in it"),
        (["hybrid", "--workers", "5"], "5 workers cannot share a batch of 32"),
        (["hybrid", "--output", "none/bench.json"], "--output none/bench.json cannot be written"),
        (["hybrid", "--stepz", "3"], "unknown option '--stepz'"),
        (["hybrid", "--model.layers", "3"], "unknown option '--model.layers'"),
        (["hybrid", "--data", "none.txt"], "none.txt"),
        (["hybrid", "--storage", "ftp://host/x", "--only", "checkpoint"], "s3://bucket/prefix"),
    ],
)
def test_a_mistake_is_one_line(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    assert line in refusal(bench.main, tuple(arguments), monkeypatch, capsys)


def test_medians_are_named_by_their_place() -> None:
    series = Series([1.0, 2.0, 4.0]).json()
    result = {"config": {"length": 3}, "step": [{"batch_size": 32, "precision": "float32", "bytes_per_second": series}]}
    metrics = record.medians(result | {"ceiling": {"LSTM, inputs": series}})
    assert metrics["step/32/float32/bytes_per_second"] == 2.0
    assert metrics["ceiling/LSTM inputs"] == 2.0
    assert not any(name.startswith("config") for name in metrics)


def test_the_options_of_a_preset() -> None:
    options = parse_command(["byte_lstm", "--preset", "bios", "--threads", "4", "--only", "plain", "step"])
    assert options.batch_sizes == [64, 256]
    assert options.workers == [1, 2, 4]
    assert options.precisions[0] == "float32"
    assert options.config.precision in options.precisions
    assert options.sections == ["step", "plain"]
    assert summary({"model": "x", "machine": {"cpu": "c", "cpu_features": [], "threads": 1}, "noise": {"noisy": []}})


def test_a_model_without_a_plain_version_is_measured_without_it(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("byte_lstm")
    monkeypatch.delitem(baseline.PLAIN, type(config.model))
    cpu = torch.device("cpu")
    steps = Steps(config, corpus, cpu, [64], ["float32"], 0.01, plain=True)
    peak = Ceiling(config, ["float32"], cpu, 0.01, quick=True)
    contenders = [*steps.contenders(), *peak.contenders()]
    measured = take_turns(contenders, 2, lambda _: None)
    rows = steps.result(measured)
    assert set(rows) == {"step"}
    assert rows["step"][0]["bytes_per_second"]["median"] > 0
    assert not {"operations_per_second", "share_of_ceiling", "times_plain"} & set(rows["step"][0])
    assert set(peak.shapes) == {"square 512"}
    assert Steps(config, corpus, cpu, [64], [], 0.01, plain=True).contenders() == []
