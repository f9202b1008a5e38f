"""Malformed inputs of every kind: a clean error or a correct result, within 5 seconds, and no file altered."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytrain.config import ByteLstmConfig, from_dict, to_dict
from raytrain.data.batches import EvaluationBatches, TrainingBatches
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.data.prepare import prepare
from raytrain.errors import UserError, run_command
from raytrain.models import from_checkpoint
from raytrain.session import check_samples, reopen_session
from raytrain.space import check_space, read_space
from raytrain.storage import open_storage
from raytrain.tracking.__main__ import main as send
from raytrain.trials import Records, Trial
from tests.conftest import tiny_config

ROOT = Path(__file__).parents[1]


def fuzzed(count: int, folder: Path) -> str:
    """What ``python -m tests.malformed`` prints, in a process of its own: it sets limits and forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.malformed", "--count", str(count), "--failures", str(folder / "failures")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_few_hundred_malformed_inputs(tmp_path: Path) -> None:
    rows = [line.split("|")[1:-1] for line in fuzzed(200, tmp_path).splitlines() if line.startswith("| all ")]
    _, inputs, clean, correct, failures, _ = (cell.strip() for cell in rows[0])
    assert int(inputs) >= 200
    assert int(clean) > 0
    assert int(correct) > 0
    assert int(failures) == 0


@pytest.mark.long
def test_five_thousand_malformed_inputs(tmp_path: Path) -> None:
    print(fuzzed(5000, tmp_path))


# ---------------------------------------------------------------------------------------------- corpora


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    with CorpusWriter(tmp_path / "corpus", name="c", source="tests") as writer:
        for number in range(200):
            writer.add("valid" if number % 4 == 0 else "train", f"text {number} of a corpus".encode())
    return Corpus.open(tmp_path / "corpus")


def overwrite(path: Path, place: int = 20) -> None:
    """Change a byte in the file, as an editor or a broken disk would: its size stays."""
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"#")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))  # whatever the resolution of the file system's clock


def test_a_corpus_that_was_altered_is_refused_before_anything_starts(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrain.session._open_places", lambda storage: (open_storage(tmp_path / "runs"), ""))
    overwrite(corpus.path / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin was altered"):
        prepare(str(corpus.path))
    with pytest.raises(UserError, match=r"train\.bin was altered"):
        reopen_session(None, corpus.digest, str(corpus.path))


@pytest.mark.parametrize("sampling", ["windows", "documents"])
def test_a_corpus_that_is_altered_under_a_run_ends_it(corpus: Corpus, sampling: str) -> None:
    config = tiny_config("byte_lstm", sampling=sampling)
    training, validation = TrainingBatches(corpus, config), EvaluationBatches(corpus.split("valid"), config)
    training.batch(0)
    next(validation.batches())
    overwrite(corpus.path / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin was altered while it was in use"):
        training.batch(1)
    next(validation.batches())
    overwrite(corpus.path / "valid.by_length", 0)
    with pytest.raises(UserError, match=r"valid\.by_length was altered while it was in use"):
        next(validation.batches())


def test_a_corpus_that_is_only_touched_or_removed_under_a_run_stays_as_it_was(corpus: Corpus) -> None:
    training = TrainingBatches(corpus, tiny_config("byte_lstm"))
    before = training.batch(1).tokens
    os.utime(corpus.path / "train.bin")
    assert training.batch(1).tokens.equal(before)
    (corpus.path / "train.bin").rename(corpus.path / "elsewhere")
    (corpus.path / "train.bin").write_bytes(b"something else")
    assert training.batch(1).tokens.equal(before)


def test_numbers_that_are_no_offsets_are_refused_whatever_the_sums_say(corpus: Corpus) -> None:
    from random import Random

    from tests.malformed.data_kinds import reseal

    info = json.loads((corpus.path / "corpus.json").read_bytes())
    path = corpus.path / "train.offsets"
    for place, value in ((3, 10**6), (3, -(2**63)), (-1, 2**62), (0, 1)):
        values = np.fromfile(path, "<i8")
        kept = values.copy()
        values[place] = value
        values.tofile(path)
        reseal(corpus.path, info, Random(0))
        with pytest.raises(UserError, match="the numbers of train are not its documents"):
            prepare(str(corpus.path))
        kept.tofile(path)


def test_a_text_that_changes_while_it_is_prepared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(b"line %d\n" % number for number in range(1000)))
    add = CorpusWriter.add

    def slow(self: CorpusWriter, split: Any, document: bytes) -> None:
        if document == b"line 500":
            overwrite(path)
        add(self, split, document)

    monkeypatch.setattr(CorpusWriter, "add", slow)
    with pytest.raises(UserError, match=r"a\.txt changed while it was read"):
        prepare(str(path), output=tmp_path / "out", cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_a_line_of_100_megabytes_takes_memory_in_proportion(tmp_path: Path) -> None:
    """Prepared in a process of its own: what it takes beyond a small text is a few copies of the line."""
    code = (
        "import resource, sys; from pathlib import Path; from raytrain.data.prepare import prepare\n"
        "prepare(sys.argv[1], cache=Path(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    (tmp_path / "small.txt").write_bytes(b"".join(b"line %d\n" % number for number in range(1000)))
    with open(tmp_path / "large.txt", "wb") as file:
        file.write((tmp_path / "small.txt").read_bytes() + b"ab " * 33_333_333 + b"\nend\n")
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / f"{name}.txt"), str(tmp_path / "cache")],
                cwd=ROOT, capture_output=True, text=True, check=True,
            ).stdout
        )
        for name in ("small", "large")
    ]  # fmt: skip
    print(f"MiB at most: {peaks[0]} of a small text, {peaks[1]} with a line of 100 MB")
    assert peaks[1] - peaks[0] < 450


def test_lengths_that_no_document_has_cost_nothing(corpus: Corpus) -> None:
    config = tiny_config("byte_lstm", sampling="documents", length=10**12)
    training = TrainingBatches(corpus, config)
    assert training.lengths == [32]
    assert (
        training.lengths == TrainingBatches(corpus, tiny_config("byte_lstm", sampling="documents", length=64)).lengths
    )


# ------------------------------------------------------------------------------- configs, records, arguments


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": {"name": ["hybrid"]}}, "model.name must be one of"),
        ({"model": {"name": "byte_lstm", "layers": 10**9}}, r"model.layers is 1000000000: must be in \[1, 256\]"),
        ({"optimizer": {"learning_rate": 10**400}}, "must be a finite number"),
        ({"steps": 2**63}, "steps is a number of 64 bits"),
        ({"data": "\ud800"}, "config: data is not valid UTF-8"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        from_dict({**to_dict(tiny_config("hybrid")), **change})


def test_a_model_that_cannot_be_built_is_one_line(corpus: Corpus) -> None:
    config = dataclasses.replace(tiny_config("byte_lstm"), model=ByteLstmConfig(1, 2**40, 0.0))
    with pytest.raises(UserError, match="the model of this config cannot be built"):
        check_samples(config, corpus, 1)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    import torch

    from raytrain.checkpoint import Checkpoint
    from raytrain.models import build

    config = tiny_config("byte_lstm")
    weights = dict(build(config).state_dict())

    def stored(changed: dict[str, torch.Tensor], model: dict[str, Any] | None = None) -> Checkpoint:
        values = to_dict(config)
        values["model"] |= model or {}
        return Checkpoint(1, None, {}, values, "here", {"model": changed})

    from_checkpoint(stored(weights))
    name = sorted(weights)[0]
    for changed, model, line in (
        ({**weights, "more": torch.zeros(1)}, None, "its weights differ in 'more'"),
        ({key: value for key, value in weights.items() if key != name}, None, f"its weights differ in '{name}'"),
        ({**weights, name: weights[name][:1]}, None, f"{name} is "),
        ({**weights, name: weights[name].half()}, None, "float16"),
        (weights, {"hidden": 2**40}, "its config is not that of a model"),
        (weights, {"hidden": 2**20}, "the model of its config has"),
        (weights, {"layers": 0}, "its config is not that of a model"),
    ):
        with pytest.raises(UserError, match=line):
            from_checkpoint(stored(changed, model))


@pytest.mark.parametrize(
    "change",
    [{"identity": "../../x"}, {"number": "1"}, {"best": {"bits_per_byte": "low"}}, {"status": "gone"}, {"run": [1]}],
)
def test_a_record_with_a_value_that_cannot_be_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    values = json.loads(Trial(0, "0" * 16, tiny_config("hybrid"), {}, {}, {}).to_json())
    file = tmp_path / "trials" / "0" / "trial.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(values | change))
    with pytest.raises(UserError, match="is not the record of a trial"):
        Records(open_storage(tmp_path)).read()


@pytest.mark.parametrize(
    "source",
    [
        "raise SystemExit(0)\n",
        "def space(trial):\n    return {'model.latent': trial.suggest_int('z', 1, 10**15)}\n",
        "def space(trial):\n    return {'objective.alpha': trial.suggest_float('a', 0, 1, step=1e-15)}\n",
    ],
)
def test_a_space_that_ends_python_or_has_no_end_is_one_line(source: str) -> None:
    with pytest.raises(UserError, match=r"SystemExit|the grid has more than 10,000 points"):
        check_space(read_space("mine", source), {"hybrid": tiny_config("hybrid")}, None, "grid", 0)


@pytest.mark.parametrize("change", [{"step": 2**70}, {"step": -1}, {"timestamp_ms": 1.5}, {"run_id": "../x"}])
def test_metrics_that_no_store_can_hold_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    record = {"run_id": "0" * 32, "step": 1, "timestamp_ms": 1, "metrics": {"a": 1.0}}
    (tmp_path / "unsent.jsonl").write_text(json.dumps(record | change))
    with pytest.raises(UserError, match="line 1: not a metric record"):
        send(["send", str(tmp_path / "unsent.jsonl")])


def test_an_argument_that_is_no_text_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "x", "\udcff"])
    started: list[Callable[[], None]] = []
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: started.append(run_command))
    assert ended.value.code == 2
    assert not started
    assert capsys.readouterr().err == "error: an argument is not valid UTF-8: '\\udcff'\n"
