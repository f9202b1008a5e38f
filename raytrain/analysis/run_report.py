"""Report of one run: figures of its metrics, and of its model on the validation split."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from raytrain.analysis.evaluation import evaluate
from raytrain.analysis.figures import run as figures
from raytrain.analysis.figures.records import Curve
from raytrain.analysis.figures.style import save
from raytrain.config.schema import RunConfig
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus
from raytrain.data.pools import part_of
from raytrain.models import Model
from raytrain.models.sampling import sample
from raytrain.tracking.queries import describe, history
from raytrain.training.loss import BoundTotals
from raytrain.utils.files import output_file
from raytrain.utils.text import cell, table

if TYPE_CHECKING:
    from raytrain.tracking.runs import Run

NUM_SAMPLES = 1024
"""Maximum number of validation samples in the figures."""
PAIRS = 3
"""Number of interpolations shown."""
STEPS = 7
"""Number of texts in an interpolation, its ends included."""
_MENTION = re.compile(rb"@\w+")


@dataclass(frozen=True)
class Portrait:
    """A model's metrics and codes on samples of the validation split."""

    texts: list[bytes]
    """[samples], in the order of ``EvaluationBatches``."""
    bits: NDArray[np.float64]
    """[positions]: mean bits of the prediction at each position that a sample reaches, STOP included."""
    counts: NDArray[np.float64]
    """[positions]: number of samples that reach each."""
    kl: NDArray[np.float64]
    """[latent]: nats per sample."""
    active: NDArray[np.bool_]
    """[latent]: true if the posterior mean varies over the samples."""
    means: NDArray[np.float64]
    """[samples, latent]: means of q(z | x)."""


def portray(model: Model, config: RunConfig[Any], corpus: Corpus) -> Portrait:
    """Measure ``model``, in evaluation mode, on the validation split.

    Raises:
        UserError: the split has no sample of the model's length.
    """
    batches = EvaluationBatches(
        part_of(corpus, "valid", config), config, min(config.evaluate_samples, NUM_SAMPLES), model.vocabulary
    )
    metrics = evaluate(model, batches, iw_samples=1).metrics()
    texts, means = encode(model, batches)
    return Portrait(
        texts=texts,
        bits=np.array(metrics["by_position"]["bits"]),
        counts=np.array(metrics["by_position"]["predictions"], dtype=np.float64),
        kl=np.array(metrics.get("kl_by_dimension", [])),
        active=means.var(0) > BoundTotals.ACTIVE_VARIANCE,
        means=means,
    )


@torch.inference_mode()
def encode(model: Model, batches: EvaluationBatches) -> tuple[list[bytes], NDArray[np.float64]]:
    """Return the texts of the samples and the means of their codes [samples, latent], in the same order."""
    device = next(model.parameters()).device
    texts: list[bytes] = []
    means: list[NDArray[np.float64]] = []
    for batch in batches.batches():
        texts += [model.vocabulary.decode(row) for row in batch.tokens.tolist()]
        if model.latent == 0:
            means.append(np.zeros((len(batch.tokens), 0)))
        else:
            means.append(model.encode(batch.tokens.to(device))[0].double().cpu().numpy())
    return texts, np.concatenate(means)


def properties(texts: Sequence[bytes]) -> dict[str, list[float] | list[bool]]:
    """Return the properties of each text that a reader can see: its length, and whether it has a mention.

    If all texts have the same length, as windows do, return their numbers of words instead. Return the mentions only if
    some texts have one and others do not.
    """
    lengths = [float(len(text)) for text in texts]
    mentions = [_MENTION.search(text) is not None for text in texts]
    found: dict[str, list[float] | list[bool]] = {}
    if len(set(lengths)) > 1:
        found["length (bytes)"] = lengths
    else:
        found["words"] = [float(len(text.split())) for text in texts]
    if len(set(mentions)) > 1:
        found["has a mention"] = mentions
    return found


def interpolation_table(model: Model, texts: Sequence[bytes], means: NDArray[np.float64]) -> str:
    """Return a Markdown table of texts decoded greedily along the lines between the codes of pairs of ``texts``.

    The first and the last row of a column are the texts themselves. The pairs are the same in every call.
    """
    generator = np.random.default_rng(0)
    distinct = list(dict(zip(texts, range(len(texts)), strict=True)).values())
    num_pairs = min(PAIRS, len(distinct) // 2)
    if num_pairs == 0:
        return "There are not two different texts to interpolate between.\n"
    chosen = generator.choice(distinct, (num_pairs, 2), replace=False)
    columns = []
    for first, last in chosen.tolist():
        weights = torch.linspace(0, 1, STEPS)[:, None]
        ends = torch.from_numpy(means[[first, last]]).float()
        codes = (ends[0] * (1 - weights) + ends[1] * weights).to(next(model.parameters()).device)
        between = [item.text for item in sample(model, STEPS, temperature=0.0, z=codes)]
        columns.append([texts[first], *between, texts[last]])
    marks = ["text", *(f"{weight:.2f}" for weight in np.linspace(0, 1, STEPS)), "text"]
    head = ["", *(f"pair {number + 1}" for number in range(num_pairs))]
    rows = [[mark, *(cell(column[row]) for column in columns)] for row, mark in enumerate(marks)]
    return (
        "Greedy decodings between the codes of two validation texts, which stand in the first and last row.\n\n"
        + table(head, rows)
    )


def read_histories(run: Run) -> dict[str, Curve]:
    """Return the histories of the metrics that a run's figure of losses shows."""
    names = ("reconstruction", "auxiliary", "bound", "bits_per_byte", "kl", "kl_weight")
    keys = [f"{split}/{name}" for split in ("train", "valid") for name in names]
    known = describe(run).metrics
    return {
        key: [(step, value) for step, value in history(run, key) if math.isfinite(value)]
        for key in keys
        if key in known
    }


def write_run_report(
    model: Model, config: RunConfig[Any], corpus: Corpus, folder: Path, run: Run | None = None
) -> list[Path]:
    """Write the figures of a run to ``folder``, log them to ``run`` under ``figures/``, and return the files.

    Without ``run`` there is no history of metrics, so the figure of losses is left out.

    Raises:
        UserError: the validation split has no sample of the model's length.
        OSError, UserError: ``folder`` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    portrait = portray(model, config, corpus)
    paths = save(figures.bits_by_position(portrait.bits, portrait.counts), folder, "bits_by_position")
    if run is not None:
        paths = save(figures.losses(read_histories(run)), folder, "losses") + paths
    if model.latent > 0:
        paths += save(figures.kl_by_dimension(portrait.kl, portrait.active), folder, "kl_by_dimension")
        paths += save(figures.latent_space(portrait.means, properties(portrait.texts)), folder, "latent_space")
        interpolations = folder / "interpolation.md"
        with output_file(interpolations) as file:
            file.write_text(interpolation_table(model, portrait.texts, portrait.means), encoding="utf-8")
        paths.append(interpolations)
    if run is not None:
        for path in paths:
            run.log_file(path, "figures")
    return paths


def bios_table(model: Model, num: int, seed: int, temperatures: tuple[float, ...] = (1.0, 0.05)) -> str:
    """Return a Markdown table of a model's texts at each temperature, with their log-probabilities."""
    columns = [sample(model, num, temperature=temperature, seed=seed) for temperature in temperatures]
    head = [text for temperature in temperatures for text in (f"T = {temperature:g}", "log p")]
    rows = [
        [text for item in drawn for text in (cell(item.text), f"{item.log_probability:.1f}")]
        for drawn in zip(*columns, strict=True)
    ]
    return table(head, rows)
