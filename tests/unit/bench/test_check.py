"""The check of a device, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytrain.bench import __main__ as bench
from raytrain.bench import sections
from raytrain.bench.check import find_problems, table
from raytrain.bench.sections import Check, difference
from raytrain.data.corpus import Corpus
from raytrain.models.lstm import has_narrow_lstm
from raytrain.training.trainer import Trainer
from tests.support.refusal import refusal

QUICK = ["--check", "--device", "cpu", "--quick", "--models", "byte_lstm"]


def run(monkeypatch: pytest.MonkeyPatch, corpus: Corpus, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *QUICK, "--corpus", str(corpus.path), *arguments])
    bench.main()


def test_every_section_runs_and_the_file_has_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, corpus, "--output", str(tmp_path / "check.json"))
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "check.json").read_text())
    assert tuple(found) == sections.SECTIONS
    assert printed.endswith("\nall right\n")
    assert found["resume"] == [
        {"model": "byte_lstm", "precision": found["resume"][0]["precision"]}
        | dict.fromkeys(("repeats", "resumes", "as without graphs"), True)
        | {"recorded": False}
    ]
    steps = {row["step"]: row for row in found["steps"]}
    plain = ["plain float32", *["plain autocast"] * has_narrow_lstm()]
    assert list(steps) == [*plain, "float32", "bfloat16"]
    assert steps["bfloat16"]["x plain float32"] == pytest.approx(steps["plain float32"]["ms"] / steps["bfloat16"]["ms"])
    assert steps["float32"]["of ceiling"] > 0
    for name in sections.SECTIONS:
        assert str(getattr(Check, name).__doc__) in printed


def test_what_is_not_right_is_said_and_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Check) -> Any:
        raise RuntimeError("out of memory")

    load = Trainer.load
    monkeypatch.setattr(Check, "noise", fail)
    monkeypatch.setattr(Trainer, "load", lambda self, stored: (load(self, stored), self.raw.output.bias.data.add_(1)))
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, corpus, "--only", "noise", "resume")
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "NOT RIGHT: noise: failed: RuntimeError: out of memory",
        "NOT RIGHT: resume: byte_lstm: resumes: no",
    ]


def test_gradients_far_from_the_cpus_are_a_problem() -> None:
    wanted = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    found: dict[str, Tensor] = {**wanted, "b": torch.tensor([[4.1]])}
    assert difference(found, wanted) == pytest.approx(0.02)
    rows = [{"model": "hybrid", "gradients": 0.02}, {"model": "lstm_vae", "gradients": 1e-5}]
    assert find_problems(rows) == ["hybrid: gradients differ by 2.0e-02"]


def test_no_section_begins_after_the_time(
    monkeypatch: pytest.MonkeyPatch, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, corpus, "--seconds", "-1", "--only", "machine", "group")
    assert capsys.readouterr().out == "left out after -1 s: machine\nleft out after -1 s: group\nall right\n"


def test_a_table_has_a_column_for_each_key() -> None:
    rows = [{"model": "a", "ms": 0.12345, "right": True}, {"model": "longer", "right": False, "n": 7}]
    assert table(rows).split("\n") == [
        "model   ms     right  n",
        "a       0.123  yes     ",
        "longer         NO     7",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--device", "cuda"), "argument --device: there is no GPU that PyTorch can use"),
        (("--only", "speed"), "argument --only: invalid choice: 'speed'"),
        (("--output", "none/check.json"), "--output none/check.json cannot be written"),
    ],
)
def test_mistakes_are_refused(
    arguments: tuple[str, ...], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert line in refusal(bench.main, ("--check", *arguments), monkeypatch, capsys)


def test_it_needs_pytorch_numpy_and_safetensors_alone(corpus: Corpus) -> None:
    others = {"ray", "mlflow", "boto3", "pyarrow", "tyro", "psutil", "rich", "optuna", "numba", "matplotlib", "triton"}
    code = (
        "import importlib.util, sys\n"
        f"others = {others}\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name in others else real(name, package)\n"
        "sys.modules |= dict.fromkeys(others)\n"
        "from raytrain.bench import __main__ as bench\n"
        "bench.main()\n"
    )
    arguments = [*QUICK, "--corpus", str(corpus.path), "--only", "machine", "noise", "bound"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("all right\n")
