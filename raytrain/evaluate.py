"""Measure a trained model on a split of a corpus, and the texts that it writes.

    python -m raytrain.evaluate runs/NAME --split test
    python -m raytrain.evaluate models:/hybrid@champion --iw-samples 500 --num-samples 0 --workers 8

The corpus is the one that the model was trained on, unless --data names another.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from raytrain.config.cli import parse_options
from raytrain.config.schema import from_dict
from raytrain.data.corpus import Corpus
from raytrain.data.vocabulary import STOP
from raytrain.storage import check_output
from raytrain.utils.errors import UserError, run_command

if TYPE_CHECKING:
    from raytrain.analysis.evaluation import Task, Totals
    from raytrain.data.batches import EvaluationBatches
    from raytrain.models import Model
    from raytrain.tracking.runs import Run


@dataclass
class EvaluateOptions:
    """Measure a trained model on a split of a corpus, and the texts that it writes."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or s3:// address of a checkpoint or a run, MLflow run id, or models:/NAME@ALIAS."""
    split: Literal["train", "valid", "test"] = "valid"
    """Split of the corpus."""
    data: str | None = None
    """Another corpus than the one that the model was trained on: a source as in raytrain.train."""
    data_path: str | None = None
    """File or folder that holds the source, where it is not where training found it."""
    data_field: str | None = None
    """Field or column that holds the text in .jsonl and .parquet sources."""
    num_samples: int = 1024
    """Samples of the split, evenly spaced; 0 takes all."""
    iw_samples: int = 100
    """Draws of z for each importance-weighted estimate (models with a latent code)."""
    samples: int = 256
    """Texts to draw from the model, and as many texts of the split beside them; 0 leaves this out."""
    seed: int = 0
    """Seed of the texts that are drawn."""
    storage: str | None = None
    """Folder or s3:// address of training, where the corpus may lie ready; default $RAYTRAIN_STORAGE or ./runs."""
    workers: int = 1
    """Tasks on a Ray cluster that share the samples of the split; 1 computes in this process, without Ray."""
    address: str | None = None
    """Ray cluster to use; by default the one that is found, or a new one on this machine."""
    output: Path | None = None
    """JSON file to write, replaced if it is there; default: a new evaluation-SPLIT.json in the working directory."""
    log_to_mlflow: bool = True
    """Log to the MLflow run that the checkpoint belongs to, if there is one."""


def main() -> None:
    """Check everything, then measure, then say it: on the terminal, in a file, and to MLflow."""
    options = parse_options("raytrain.evaluate", EvaluateOptions, sys.argv[1:])
    check_options(options)
    output = output_file(options)

    from raytrain.analysis.evaluation import Task
    from raytrain.analysis.tables import evaluation_summary
    from raytrain.data.cache import address, publish
    from raytrain.runs.references import from_checkpoint, resolve
    from raytrain.runs.workspace import corpus_of
    from raytrain.storage import open_storage_root

    found = resolve(options.checkpoint)
    stored = found.stored
    config = from_dict(stored.config)
    storage = open_storage_root(options.storage)
    corpus = corpus_of(stored, storage, options.data, options.data_path, options.data_field)
    task = Task(stored.config, address(corpus, storage), options.split, options.num_samples or None, options.iw_samples)
    batches = task.batches()
    model = from_checkpoint(stored)

    began = time.perf_counter()
    if options.workers == 1:
        totals = evaluate_here(model, task, batches)
    else:
        if storage.folder is None:
            publish(corpus, storage)
        totals = evaluate_on_cluster(task, stored.tensors("model"), options)
    result: dict[str, Any] = {
        "checkpoint": stored.uri,
        "step": stored.step,
        "model": config.model_name,
        "corpus": {"name": corpus.name, "digest": corpus.digest},
        "split": options.split,
        "over_long_left_out": batches.samples.too_long,
        "metrics": totals.metrics(model),
        "texts": measure_texts(options, model, corpus, batches),
        "seconds": time.perf_counter() - began,
    }
    print(evaluation_summary(result), end="")
    output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(f"written: {output}")
    if options.log_to_mlflow and found.run is not None:
        log_result(found.run, result)
        print(f"logged: {found.run.ui_hint()}")


# ---------------------------------------------------------------------------------------------- checks


def check_options(options: EvaluateOptions) -> None:
    """Refuse numbers that cannot be.

    Raises:
        UserError: one of them is out of range.
    """
    for name, least in {"num_samples": 0, "iw_samples": 1, "samples": 0, "seed": 0, "workers": 1}.items():
        if (value := getattr(options, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: must be at least {least}")
    if options.samples == 1:
        raise UserError("--samples is 1: texts are measured against each other; draw at least 2, or 0 to leave it out")


def output_file(options: EvaluateOptions) -> Path:
    """Where the JSON goes: to the file that was named, or to a new one in the working directory.

    Raises:
        UserError: nothing can be written there.
    """
    path = options.output
    number = 1
    while path is None:
        name = Path(f"evaluation-{options.split}{'' if number == 1 else f'-{number}'}.json")
        path = None if name.exists() else name
        number += 1
    return check_output(path)


# ------------------------------------------------------------------------------------------- measuring


def evaluate_here(model: Model, task: Task, batches: EvaluationBatches) -> Totals:
    """Measure in this process, on its GPU if it has one."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from raytrain.analysis.evaluation import evaluate

    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("samples", total=batches.num_samples)
        return evaluate(model, batches, task.iw_samples, advance=lambda done: progress.advance(bar, done))


def evaluate_on_cluster(task: Task, tensors: dict[str, Any], options: EvaluateOptions) -> Totals:
    """Measure in ``options.workers`` tasks on a Ray cluster; sums are taken in the order of their shares.

    Raises:
        UserError: there is no such cluster, or a task fits on none of its nodes.
    """
    import ray

    from raytrain.cluster.resources import connect, read_cluster
    from raytrain.config.workers import WorkerSpec

    connect(options.address)
    cluster = read_cluster()
    nodes = [*cluster.up, *(node for node, count in cluster.possible if count > 0)]
    cpus, gpus = 1.0, 1.0 if cluster.has_gpus else 0.0
    if not cluster.has_gpus:
        cpus = max(1.0, min(cluster.total("CPU") // options.workers, max(node.get("CPU", 0.0) for node in nodes)))
    cluster.admit(WorkerSpec(1, cpus, gpus), 1, head_memory=float("inf"))
    device = "cuda" if gpus else "cpu"
    share = ray.remote(num_cpus=cpus, num_gpus=gpus)(type(task).share)
    weights = ray.put(tensors)
    parts = [share.remote(task, weights, rank, options.workers, cpus, device) for rank in range(options.workers)]
    return reduce(add, ray.get(parts))


def measure_texts(
    options: EvaluateOptions, model: Model, corpus: Corpus, batches: EvaluationBatches
) -> dict[str, Any] | None:
    """Measures of texts that the model writes and, to hold them against, of as many texts of the split."""
    from raytrain.analysis.text_metrics import text_metrics
    from raytrain.data.batches import EvaluationBatches
    from raytrain.models.sampling import sample

    if options.samples == 0:
        return None
    written = [item.text for item in sample(model, options.samples, seed=options.seed)]
    chosen = EvaluationBatches(batches.samples.split, batches.config, options.samples)
    rows = [row for batch in chosen.batches() for row in batch.tokens.tolist()]
    real = [bytes(token for token in row if token < STOP) for row in rows]
    return text_metrics({"model": written, "split": real}, corpus.split("train").stream)


# --------------------------------------------------------------------------------------------- logging


def log_result(run: Run, result: dict[str, Any]) -> None:
    """Log every single number as a metric at the checkpoint's step, and all of the result as a JSON artifact."""
    from mlflow.entities import Metric

    from raytrain.tracking.client import connect, patiently
    from raytrain.tracking.queries import CORPUS

    client = connect(run.uri)
    trained_on = patiently(lambda: client.get_run(run.run_id)).data.tags.get(CORPUS)
    corpus, step = result["corpus"], result["step"]
    same = trained_on in (None, corpus["digest"])
    now_ms = time.time_ns() // 1_000_000
    values = metric_values(result, prefix="" if same else f"{corpus['name']}/")
    metrics = [Metric(key, value, now_ms, step) for key, value in values.items()]
    patiently(lambda: client.log_batch(run.run_id, metrics=metrics))
    where = "" if same else f"-{corpus['name']}"
    run.log_dict(result, f"evaluation/{result['split']}{where}-step-{step:08d}.json")


def metric_values(result: dict[str, Any], prefix: str) -> dict[str, float]:
    """Return the metrics that are single numbers, by their MLflow names: ``test/bound``, ``samples/self_bleu``.

    ``train`` and ``valid`` are the training loop's own names, of other samples: theirs become
    ``evaluation/valid/bound``. ``prefix`` goes before all that is of another corpus than the one of training.
    """
    split = result["split"] if result["split"] == "test" else f"evaluation/{result['split']}"
    groups = {split: result["metrics"]}
    if result["texts"] is not None:
        groups |= {"samples": result["texts"]["model"], f"{split}/texts": result["texts"]["split"]}
    return {
        f"{prefix}{group}/{name}": float(value)
        for group, values in groups.items()
        for name, value in values.items()
        if isinstance(value, (int, float))
    }


if __name__ == "__main__":
    run_command(main)
