"""The command that lets a model write: what it prints, and that a mistake is one line."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain import models, sample
from raytrain.config.schema import to_dict
from raytrain.models import sampling
from raytrain.models.sampling import Sample
from raytrain.runs import trained_model
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.storage import open_storage
from raytrain.utils.errors import run_command
from raytrain.utils.text import readable
from tests.conftest import TINY_MODELS, tiny_config
from tests.support.refusal import refusal

NAMES = pytest.mark.parametrize("name", list(TINY_MODELS))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint of each model, by name; it has seen nothing, so its text is noise."""
    found = {}
    for name in TINY_MODELS:
        folder = tmp_path_factory.mktemp(name)
        config = tiny_config(name, sampling="documents")
        model = models.build(config)
        with torch.no_grad():
            model.output.bias[256] += 2
        with CheckpointWriter(open_storage(folder)) as writer:
            writer.save(Snapshot(20, {"model": model.state_dict()}, {}, to_dict(config)))
        found[name] = str(folder / "step-00000020")
    return found


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command and returns what it prints."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sample", *arguments])
        run_command(sample.main)
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Runs the command, which must be refused, and returns its one line."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        return refusal(sample.main, arguments, monkeypatch, capsys)

    return run


def objects(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


@NAMES
def test_json_lines_have_the_exact_bytes(checkpoints: dict[str, str], command: Callable[..., str], name: str) -> None:
    options = ["--num", "6", "--temperature", "0.9", "--top-p", "0.95", "--max-length", "10", "--seed", "3"]
    written = objects(command(checkpoints[name], *options, "--prefix", "né", "--format", "jsonl"))
    expected = sampling.sample(
        trained_model.load(checkpoints[name]),
        6,
        temperature=0.9,
        top_p=0.95,
        max_length=10,
        seed=3,
        prefix="né".encode(),
    )
    assert [base64.b64decode(item["bytes"]) for item in written] == [item.text for item in expected]
    assert any(b"\xff" > item.text[-1:] >= b"\x80" for item in expected), "some bytes are not valid UTF-8"
    assert [item["text"] for item in written] == [readable(item.text) for item in expected]
    for item, sample_ in zip(written, expected, strict=True):
        assert (item["log_probability"], item["entropy"]) == (sample_.log_probability, sample_.entropy)
        assert item["truncated"] is sample_.truncated


@NAMES
def test_text_is_one_line_a_sample(checkpoints: dict[str, str], command: Callable[..., str], name: str) -> None:
    printed = command(checkpoints[name], "--num", "30")
    assert printed.count("\n") == len(printed.splitlines()) == 30
    assert "\ufffd" not in printed
    assert command(checkpoints[name], "--num", "30", "--seed", "1") != printed


def test_a_line_shows_what_would_break_it() -> None:
    item = Sample("one\ntwo\r\tthree\u2028four 👩\u200d💻 é".encode() + b"\xff\x00", -1.0, 1.0, False)
    assert sample.as_line(item) == "one\\ntwo\\r\\tthree\\u2028four 👩\u200d💻 é \\x00"
    assert base64.b64decode(json.loads(sample.as_json(item))["bytes"]) == item.text


@pytest.mark.parametrize("name", ["hybrid", "lstm_vae"])
def test_it_interpolates_and_reconstructs(
    checkpoints: dict[str, str], command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    between = objects(command(checkpoints[name], "--interpolate", "a b", "später", "--steps", "4", "--format", "jsonl"))
    assert len(between) == 4
    data = "a b\r\n\nspäter".encode()
    (tmp_path / "texts.txt").write_bytes(data)
    ends = objects(command(checkpoints[name], "--reconstruct", str(tmp_path / "texts.txt"), "--format", "jsonl"))
    assert [item["bytes"] for item in ends] == [between[0]["bytes"], between[-1]["bytes"]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert objects(command(checkpoints[name], "--reconstruct", "-", "--format", "jsonl")) == ends
    warm = command(checkpoints[name], "--reconstruct", str(tmp_path / "texts.txt"), "--temperature", "1.0")
    assert len(warm.splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("hybrid", ["--temperature", "-1"], "--temperature is -1.0: must be 0"),
        ("hybrid", ["--temperature", "nan"], "--temperature is nan"),
        ("hybrid", ["--top-p", "0"], "--top-p is 0.0"),
        ("hybrid", ["--num", "0"], "--num is 0"),
        ("hybrid", ["--max-length", "0"], "--max-length is 0"),
        ("hybrid", ["--max-length", "25"], "the model's length of 24"),
        ("hybrid", ["--prefix", "x" * 25], "the prefix has 25 bytes"),
        ("hybrid", ["--format", "xml"], "--format is 'xml': must be one of text, jsonl"),
        ("hybrid", ["--colour"], "unknown option '--colour'"),
        ("hybrid", ["--interpolate", "a", "b", "--steps", "1"], "--steps is 1"),
        ("hybrid", ["--interpolate", "a", "b", "--reconstruct", "-"], "give one of them"),
        ("hybrid", ["--interpolate", "a", "b", "--prefix", "c"], "--prefix is for samples"),
        ("hybrid", ["--interpolate", "a", "b" * 25], "has 25 bytes"),
        ("hybrid", ["--reconstruct", "none.txt"], "cannot read none.txt"),
        ("hybrid", ["--reconstruct", "empty.txt"], "holds no text"),
        ("hybrid", ["--reconstruct", "long.txt"], "has 30 bytes: the model takes 24 symbols"),
        ("byte_lstm", ["--interpolate", "a", "b"], "the model has no latent code"),
        ("byte_lstm", ["--reconstruct", "long.txt"], "the model has no latent code"),
    ],
)
def test_a_mistake_is_one_line(
    checkpoints: dict[str, str], refused: Callable[..., str], tmp_path: Path, name: str, arguments: list[str], line: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "long.txt").write_text("short\n" + "y" * 30)
    assert line in refused(checkpoints[name], *arguments)


def test_a_bad_checkpoint_is_one_line(checkpoints: dict[str, str], refused: Callable[..., str], tmp_path: Path) -> None:
    assert "none" in refused(str(tmp_path / "none"))
    assert "missing: checkpoint" in refused()
    damaged = tmp_path / "runs" / "one" / "step-00000020"
    damaged.mkdir(parents=True)
    for file in Path(checkpoints["hybrid"]).iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[:-1])
    assert "step-00000020" in refused(str(damaged))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_json_lines_are_json_whatever_the_output_can_show(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a terminal would obey is escaped as JSON has it, before the output would."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    text = "ü\x1b[2J\x7f\x9b31m\u202e\N{GRINNING FACE}\n\\"
    run_command(lambda: print(sample.as_json(Sample(text.encode(), -1.0, 1.0, False))))
    line = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert json.loads(line)["text"] == text
    assert not any(character in line for character in "\x1b\x7f\x9b\u202e")
    assert ("ü" in line) == (encoding == "utf-8")
