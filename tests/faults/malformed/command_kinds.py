"""Command lines of every command, and addresses of storages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import raytrain.train as train
import raytrain.tune as tune
from raytrain import evaluate, registry, report, sample
from raytrain.bench import __main__ as bench_command
from raytrain.cluster import __main__ as cluster_command
from raytrain.cluster import spot
from raytrain.data import __main__ as data_command
from raytrain.storage import check as storage_check
from raytrain.storage import open_storage
from raytrain.storage.check import check_writable
from raytrain.tracking import __main__ as tracking_command
from raytrain.training import torchrun as loop
from tests.faults.malformed.oracle import command, get_as_far
from tests.faults.malformed.stock import Stock

Act = Callable[[], None]

JUNK = (
    "", "x", "-", "--", "0", "-1", "1", "1e400", "nan", "inf", "10" * 30, "9" * 5000, "1e-400", "0x10", "1_0", "True",
    "None", "[]", "1,2", "a=b", "../..", "/dev/null", "/proc/self/mem", "~nobody-at-all/x", "x" * 300, "x" * 5000,
    "\udcff", "é", "\N{SNOWMAN}", "a\nb", "[red]", "%s", "{}", "$HOME", "s3://", "s3://b", "s3://b/k", "s3:/x", "ftp://x",
    "http://127.0.0.1:9", "models:/", "models:/x@y", "127.0.0.1:1", "hybrid", "laptop", "ptb", "--help", "--steps",
    "-h",
)  # fmt: skip


SERVE = ("--host", "--host=10.0.0.1", "--port", "--folder", "--storage", "--interval")


def trains(stock: Stock, given: Path, random: Random) -> Act:
    """train, tune, bench and the loop without Ray: any option with any value, on a small text."""
    options = (
        "--steps", "--length", "--batch-size", "--group-size", "--seed", "--model.latent", "--model.feature-maps",
        "--model.decoder-maps", "--model.decoder", "--objective.alpha", "--objective.annealing", "--optimizer.decay",
        "--data", "--data-path", "--data-field", "--sampling", "--preset", "--config", "--workers", "--cpus-per-worker",
        "--gpus-per-worker", "--name", "--storage", "--experiment", "--best-of", "--resume", "--precision", "--space",
        "--evaluate-samples", "--num-samples", "--budget", "--algorithm", "--search-objective", "--min-used",
        "--warm-start",
        "--time-budget", "--max-concurrent", "--workers-per-trial", "--optimizer.learning-rate", "--log-every",
        "--threads", "--rounds", "--seconds", "--samples", "--only", "--quick", "--output",
        "--device", "--bench", "--price-per-hour",
    )  # fmt: skip
    main = random.choice((train.main, train.main, tune.main, tune.main, bench_command.main, loop.main))
    if main is loop.main:
        corpus = random.choice((str(stock.corpus), random.choice(JUNK)))
        whole = random.choice((str(stock.folder / "config.json"), random.choice(JUNK)))
        arguments = [whole, "--corpus", corpus, "--storage", "runs", *_options(("--corpus", "--storage"), random)]
        with_work = command(main, *arguments)

        def without_work() -> None:
            with mock.patch.object(loop, "train", get_as_far):
                with_work()

        return without_work
    model = random.choice(("hybrid", "hybrid", "lstm_vae", "byte_lstm", random.choice(JUNK)))
    fixed = ["--data", str(stock.corpus), "--storage", "runs"] if random.random() < 0.7 else []
    return command(main, model, *fixed, *_options(options, random))


def models(stock: Stock, given: Path, random: Random) -> Act:
    """sample, evaluate and the figures of one model."""
    options = (
        "--num", "--temperature", "--top-p", "--max-length", "--seed", "--prefix", "--interpolate", "--steps",
        "--reconstruct", "--format", "--split", "--data", "--data-path", "--evaluate-samples", "--iw-draws",
        "--num-texts", "--storage", "--workers", "--output", "--no-log-to-mlflow",
    )  # fmt: skip
    main = random.choice((sample.main, sample.main, evaluate.main))
    location = random.choice((str(stock.checkpoint), str(stock.checkpoint), random.choice(JUNK)))
    # few samples of each kind, unless the option says otherwise
    small = (
        ("--num", "2") if main is sample.main else ("--num-texts", "0", "--evaluate-samples", "4", "--iw-draws", "1")
    )
    return command(main, location, *small, *_options(options, random))


def others(stock: Stock, given: Path, random: Random) -> Act:
    """report, registry, data, storage, tracking, cluster and spot."""
    kinds: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
        report.main: (("run", "search", "bios", "paper_fig3"), ("--output", "--experiment", "--search", "--num")),
        registry.main: (("list", "promote", "rollback"), ("raytrain-hybrid", "1", "x", "--alias")),
        data_command.main: (("prepare", "info"), ("--output", "--field", "--data-path", str(stock.corpus), "bios")),
        storage_check.main: (("check",), ("there", str(given), "--help")),
        tracking_command.main: (("send", "serve"), ("--timeout", str(stock.corpus), "/dev/null", *SERVE)),
        cluster_command.main: (("check",), (str(stock.corpus), "/dev/null", str(given))),
        spot.read_options: (("--interval", "--deadline"), ("--address", "--node-id", "--rebalance", "--deadline")),
    }
    main = random.choice(sorted(kinds, key=lambda main: main.__module__))
    words, more = kinds[main]
    first = random.choice((*words, *words, random.choice(JUNK)))
    return command(main, first, *_options(more, random))


def _options(names: tuple[str, ...], random: Random) -> list[str]:
    chosen: list[str] = []
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        name, value = random.choice(names), random.choice((*JUNK, str(random.randint(-3, 40))))
        chosen += random.choice(
            ([name, value], [name, value], [f"{name}={value}"], [name], [value], [name, value, value])
        )
    # of several gigabytes of a model or hours of sampling nothing is learned here
    return [item for item in chosen if "\0" not in item]


def address(stock: Stock, given: Path, random: Random) -> Act:
    """An address of a storage."""
    (given / "file").write_bytes(b"in the way")
    parts = ("s3://", "S3://", "bucket", "b", "/", "//", "..", "?x=1", "#f", "a:b@", "\0", "\udcff", " ", "é",
             str(given / "file" / "x"),
             "/nowhere", "/proc/x", "~", "~nobody-at-all", "x" * 300, "file://", "C:\\", "\n", "%2e", ".")  # fmt: skip
    text = "".join(random.choice(parts) for _ in range(random.randint(1, 4)))

    def act() -> None:
        storage = open_storage(text)
        check_writable(storage)
        assert storage.folder is not None

    return act
