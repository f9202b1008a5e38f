"""Malformed inputs of every kind: a clean error or a correct result, within 5 seconds, and no file altered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytrain.data.batches import EvaluationBatches, TrainingBatches
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.data.prepare import prepare
from raytrain.runs.workspace import reopen_workspace
from raytrain.search.space import load_space
from raytrain.storage import check_output, open_storage
from raytrain.tracking.__main__ import main as send
from raytrain.utils.errors import UserError, run_command
from tests.conftest import tiny_config
from tests.faults.malformed import oracle
from tests.faults.malformed.mutate import overwrite
from tests.faults.malformed.stock import small_corpus

ROOT = Path(__file__).parents[2]


def fuzzed(count: int, folder: Path) -> str:
    """What ``python -m tests.faults.malformed`` prints, in a process of its own: it sets limits and forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.malformed", "--count", str(count), "--failures", str(folder / "failures")],
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


def test_what_has_no_end_or_is_blocked_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "LIMIT_S", 0.2)
    for part in ("in", "work"):
        (tmp_path / part).mkdir()

    def busy() -> None:
        while True:
            pass

    for act, result in ((busy, "slow"), (lambda: time.sleep(60), "slow"), (lambda: None, "correct")):
        assert oracle.judge(oracle.Case(tmp_path, act)).result == result


def test_a_process_that_others_keep_from_the_processor_is_not_slow() -> None:
    core = str(min(os.sched_getaffinity(0)))
    work = ["taskset", "-c", core, sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(work) for _ in range(5)]
    try:
        time.sleep(1)  # they have started
        watch, began = oracle.Stopwatch(processes[0].pid), time.monotonic()
        time.sleep(3)
        assert watch.seconds() < 0.5 * (time.monotonic() - began)
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.long
def test_five_thousand_malformed_inputs(tmp_path: Path) -> None:
    print(fuzzed(5000, tmp_path))


# ---------------------------------------------------------------------------------------------- corpora


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return small_corpus(tmp_path / "corpus")


def test_a_corpus_that_was_altered_is_refused_before_anything_starts(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "raytrain.runs.workspace._open_locations", lambda storage: (open_storage(tmp_path / "runs"), "")
    )
    overwrite(corpus.path / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin was altered"):
        prepare(str(corpus.path))
    with pytest.raises(UserError, match=r"train\.bin was altered"):
        reopen_workspace(None, corpus.digest, str(corpus.path))


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

    from tests.faults.malformed.data_kinds import reseal

    info = json.loads((corpus.path / "corpus.json").read_bytes())
    path = corpus.path / "train.offsets"
    for location, value in ((3, 10**6), (3, -(2**63)), (-1, 2**62), (0, 1)):
        values = np.fromfile(path, "<i8")
        kept = values.copy()
        values[location] = value
        values.tofile(path)
        reseal(corpus.path, info, Random(0))
        with pytest.raises(UserError, match="the numbers of train are not its documents"):
            prepare(str(corpus.path))
        kept.tofile(path)


@pytest.mark.parametrize("change", [{"sha256": None}, {"sha256": 7}, None])
def test_a_corpus_that_tells_no_sum_of_a_file_is_one_line(corpus: Corpus, change: dict[str, Any] | None) -> None:
    info = json.loads((corpus.path / "corpus.json").read_bytes())
    files = info["splits"]["valid"]["files"]
    if change is None:
        del files["valid.bin"]["sha256"]
    else:
        files["valid.bin"] |= change
    (corpus.path / "corpus.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"corpus\.json is incomplete .*sha256|corpus\.json is incomplete .*the sum of"):
        prepare(str(corpus.path))


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


# -------------------------------------------------------------------------------------------- arguments


def test_names_that_no_file_can_have_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for address in ("~nobody-of-that-name/x", "~~", "~nobody-of-that-name"):
        with pytest.raises(UserError, match="there is no such home folder"):
            open_storage(address)
    with pytest.raises(UserError, match="no search space"):
        load_space("x" * 5000)
    with pytest.raises(UserError, match="no source"):
        prepare("x" * 5000)
    for location in ("x" * 5000, "/nowhere/at/all", str(tmp_path)):
        with pytest.raises(UserError, match=r"--output .* cannot be written"):
            check_output(Path(location))
    with pytest.raises(UserError, match=r"--folder .* cannot be made"):
        send(["serve", "--folder", "/dev/null/x", "--storage", str(tmp_path)])
    with pytest.raises(UserError, match="--port is 70000"):
        send(["serve", "--port", "70000", "--storage", str(tmp_path)])


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
