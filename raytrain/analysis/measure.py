"""Measurement of a trained model: its likelihood on a split, the texts that it writes, and the record of both."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import reduce
from operator import add
from typing import Any

import ray
import torch
from mlflow.entities import Metric
from rich.progress import Progress

from raytrain.analysis.evaluation import Task, Totals, evaluate
from raytrain.analysis.options import EvaluateOptions
from raytrain.analysis.text_metrics import text_metrics
from raytrain.cluster.connection import connect
from raytrain.cluster.resources import read_cluster
from raytrain.config.schema import from_dict
from raytrain.config.workers import WorkerSpec
from raytrain.data.batches import EvaluationBatches
from raytrain.data.cache import address, publish
from raytrain.data.corpus import Corpus
from raytrain.models import Model
from raytrain.models.ladder import reference_ladder
from raytrain.models.sampling import sample
from raytrain.runs.references import ResolvedModel, resolve
from raytrain.runs.trained_model import from_checkpoint
from raytrain.runs.workspace import corpus_of
from raytrain.storage import open_storage_root
from raytrain.tracking.client import connect as connect_tracking
from raytrain.tracking.client import retry_tracking
from raytrain.tracking.queries import CORPUS
from raytrain.tracking.runs import Run
from raytrain.utils.output import console


def measure(options: EvaluateOptions) -> tuple[dict[str, Any], ResolvedModel]:
    """Measure a model on a split and the texts that it writes; return the result as JSON, and the model's origin.

    Raises:
        UserError: there is no such model, split, corpus or cluster.
    """
    found = resolve(options.checkpoint)
    stored = found.stored
    config = from_dict(stored.config)
    storage = open_storage_root(options.storage)
    corpus = corpus_of(stored, storage, options.data, options.data_path, options.data_field)
    samples = options.evaluate_samples or None
    model = from_checkpoint(stored)
    vocabulary = None if model.vocabulary.is_bytes else model.vocabulary.values()
    # a worker copies only the split that it measures
    place = address(corpus, storage, in_pools=True)
    task = Task(stored.config, place, options.split, samples, options.iw_draws, vocabulary)
    batches = task.batches()

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
        "ngrams": asdict(reference_ladder(corpus, batches)),
        "texts": measure_texts(options, model, corpus, batches),
        "seconds": time.perf_counter() - began,
    }
    return result, found


def evaluate_here(model: Model, task: Task, batches: EvaluationBatches) -> Totals:
    """Measure in this process, on its GPU if it has one."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with Progress(console=console(stderr=True), transient=True) as progress:
        bar = progress.add_task("samples", total=batches.num_samples)
        return evaluate(model, batches, task.iw_samples, advance=lambda done: progress.advance(bar, done))


def evaluate_on_cluster(task: Task, tensors: dict[str, Any], options: EvaluateOptions) -> Totals:
    """Measure in ``options.workers`` tasks on a Ray cluster; add up their totals in the order of their shares.

    Raises:
        UserError: there is no such cluster, or a task fits on none of its nodes.
    """
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
    """Measure texts that the model writes and, for comparison, as many texts of the split."""
    if options.num_texts == 0:
        return None
    written = [item.text for item in sample(model, options.num_texts, seed=options.seed)]
    chosen = EvaluationBatches(batches.samples.split, batches.config, options.num_texts, model.vocabulary)
    real = [model.vocabulary.decode(row) for batch in chosen.batches() for row in batch.tokens.tolist()]
    return text_metrics({"model": written, "split": real}, corpus.split("train").stream)


def log_result(run: Run, result: dict[str, Any]) -> None:
    """Log every single number as a metric at the checkpoint's step, and the whole result as a JSON artifact."""
    client = connect_tracking(run.uri)
    trained_on = retry_tracking(lambda: client.get_run(run.run_id)).data.tags.get(CORPUS)
    corpus, step = result["corpus"], result["step"]
    same = trained_on in (None, corpus["digest"])
    now_ms = time.time_ns() // 1_000_000
    values = metric_values(result, prefix="" if same else f"{corpus['name']}/")
    metrics = [Metric(key, value, now_ms, step) for key, value in values.items()]
    retry_tracking(lambda: client.log_batch(run.run_id, metrics=metrics))
    where = "" if same else f"-{corpus['name']}"
    run.log_dict(result, f"evaluation/{result['split']}{where}-step-{step:08d}.json")


def metric_values(result: dict[str, Any], prefix: str) -> dict[str, float]:
    """Return the single numbers of a result by their MLflow names: ``test/bound``, ``samples/self_bleu``.

    ``train`` and ``valid`` are the training loop's own names, for other samples: here they become
    ``evaluation/valid/bound``. ``prefix`` precedes every name if the corpus is not the one of training.
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
