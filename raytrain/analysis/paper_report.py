"""Report of the paper: its figures from the trials of searches in MLflow, a table of their values, and samples."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raytrain.analysis.figures.paper import DRAWN
from raytrain.analysis.figures.records import Record
from raytrain.analysis.figures.style import model_look, save
from raytrain.config.models import has_latent
from raytrain.metrics import COLLAPSED
from raytrain.tracking.outbox import SAMPLES
from raytrain.tracking.queries import (
    CONFIRMS,
    CORPUS,
    Child,
    children,
    download,
    find_experiment,
    find_search,
    history,
    searches,
)
from raytrain.utils.errors import UserError
from raytrain.utils.files import output_file
from raytrain.utils.text import cell, mean_and_range, table

if TYPE_CHECKING:
    from raytrain.tracking.runs import Run

TEXTS = 10
"""Number of texts in each table."""
WITH_CURVE = "paper_fig3"
"""The figure that shows the course of training, not its end."""


def find_searches(uri: str, experiment: str, figure: str, names: Sequence[str] = ()) -> list[Child]:
    """Return the searches that a figure is drawn from: those called ``names``, or the newest of the figure's space.

    Raises:
        UserError: there is no such experiment or search.
    """
    if names:
        return [find_search(uri, experiment, name) for name in names]
    found = searches(uri, find_experiment(uri, experiment), space=figure)
    if not found:
        raise UserError(
            f"experiment {experiment} has no search of {figure}; run it first: "
            f"python -m raytrain.tune --space search_spaces/{figure}.py"
        )
    # an older search may have models that the newest lacks: a figure can be searched for one model at a time
    return [search for search in found if search.tags.get(CORPUS) == found[0].tags.get(CORPUS)]


@dataclass(frozen=True)
class Collected:
    """The records that a figure is drawn from, and their origin."""

    records: list[Record]
    runs: dict[str, Run]
    """The MLflow run of each record, by run id."""
    searches: list[Child]
    """The searches that the records are from."""


def collect(found: Sequence[Child], figure: str, *, everything: bool) -> Collected:
    """Return the records of the searches' trials, newest search first; leave out trials that confirm another.

    Without ``everything``, a search adds only models that no newer search has, trained for as many steps: its other
    trials are older versions of those already there.
    """
    records: list[Record] = []
    runs: dict[str, Run] = {}
    used: list[Child] = []
    for search in found:
        have, steps = {record.model for record in records}, {record.steps for record in records}
        before = len(records)
        for child in children(search.run):
            if CONFIRMS in child.tags:
                continue
            record = read_record(child, figure == WITH_CURVE)
            if record is None:
                continue
            if everything or (record.model not in have and (not steps or record.steps in steps)):
                records.append(record)
                runs[record.run_id] = child.run
        if len(records) > before:
            used.append(search)
    return Collected(records, runs, used)


def read_record(child: Child, curve: bool = False) -> Record | None:
    """Return the record of one trial at its last evaluation; None if it has none or one that is not finite."""
    figures = {name: child.metrics.get(f"valid/{name}", math.nan) for name in ("bits_per_byte", "reconstruction", "kl")}
    if not all(map(math.isfinite, figures.values())):
        return None
    given = child.parameters
    layers = given.get("model.decoder_layers")
    return Record(
        model=given["model.name"],
        length=int(given["length"]),
        **figures,
        used=child.metrics.get("valid/used", math.nan),
        alpha=float(given["objective.alpha"]),
        annealing=given["objective.annealing"],
        input_dropout=float(given["objective.input_dropout"]),
        # each block of causal convolutions sees one character more than the block below
        receptive_field=int(layers) + 1 if layers and given.get("model.decoder") == "bytenet" else None,
        step=history(child.run, "valid/bits_per_byte")[-1][0],
        steps=int(given["steps"]),
        seed=int(given["seed"]),
        curve=history(child.run, "train/reconstruction") if curve else [],
        run_id=child.run.run_id,
    )


def record_table(records: Sequence[Record]) -> str:
    """Return a Markdown table of each configuration's figures: their mean over its seeds, the lowest and the highest.

    A configuration is named by the fields in which the records differ.
    """
    fields = {
        "model": lambda record: record.model,
        "length": lambda record: f"{record.length}",
        "alpha": lambda record: f"{record.alpha:g}",
        "annealing": lambda record: record.annealing,
        "input dropout": lambda record: f"{record.input_dropout:g}",
        "receptive field": lambda record: f"{record.receptive_field or 'all'}",
    }
    told = [name for name, value in fields.items() if len({value(record) for record in records}) > 1]
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(fields[name](record) for name in told), []).append(record)
    columns: list[tuple[str, int, Callable[[Record], float]]] = [
        ("bits per byte", 3, lambda record: record.bits_per_byte),
        ("reconstruction, nats", 1, lambda record: record.reconstruction),
        ("KL, nats", 2, lambda record: record.kl),
        ("used, nats", 2, lambda record: record.used),
    ]
    rows = [
        [
            *group,
            f"{len(found)}",
            *(mean_and_range([value(record) for record in found], digits) for _, digits, value in columns),
        ]
        for group, found in groups.items()
    ]
    return table([*told, "seeds", *(name for name, _, _ in columns)], rows)


def sample_tables(records: Sequence[Record], texts: dict[str, list[str]]) -> str:
    """Return Markdown tables of texts by the model with the lowest KL and by the one with the highest.

    Args:
        texts: samples by run id; a record without any is skipped.
    """
    usable = sorted(
        (record for record in records if has_latent(record.model) and texts.get(record.run_id)),
        key=lambda record: record.kl,
    )
    if not usable:
        return "No trial with a latent code has kept samples.\n"
    lowest, highest = usable[0], usable[-1]
    parts = []
    for title, record, expected in (
        ("KL near zero", lowest, lowest.kl < COLLAPSED),
        ("KL above zero", highest, highest.kl >= COLLAPSED),
    ):
        what = (
            f"{model_look(record.model)[0]}, samples of {record.length}, alpha {record.alpha:g}, "
            f"{record.annealing} annealing, input dropout {record.input_dropout:g}: KL {record.kl:.2f} nats, "
            f"{record.bits_per_byte:.3f} bits per byte"
        )
        if not expected:
            what += f" (no trial of this figure has a KL {'below' if record is lowest else 'above'} {COLLAPSED:g})"
        rows = [[str(number), cell(text)] for number, text in enumerate(texts[record.run_id][:TEXTS], 1)]
        parts.append(f"### {title}\n\n{what}.\n\n{table(['', 'sample'], rows)}")
    return "\n".join(parts)


def outer_samples(records: Sequence[Record], runs: dict[str, Run]) -> dict[str, list[str]]:
    """Return the texts, by run id, of the models with the lowest and the highest KL among those that have texts."""
    order = sorted((record for record in records if has_latent(record.model)), key=lambda record: record.kl)
    texts: dict[str, list[str]] = {}
    for direction in (order, order[::-1]):
        for record in direction:
            if record.run_id not in texts:
                texts[record.run_id] = read_samples(runs[record.run_id])
            if texts[record.run_id]:
                break  # a trial that was stopped early has none
    return texts


def read_samples(run: Run) -> list[str]:
    """Return the texts that a trial has logged; none if it has logged none."""
    with tempfile.TemporaryDirectory() as scratch:
        file = download(run, SAMPLES, Path(scratch))
        # texts may contain other line ends than the one that separates them
        return [text for text in file.read_text("utf-8").split("\n") if text] if file is not None else []


def write_paper_figure(figure: str, collected: Collected, folder: Path) -> list[Path]:
    """Draw ``figure`` into ``folder``, with tables of its values and of samples; log all to the first search.

    Return the files.

    Raises:
        OSError, UserError: ``folder`` cannot be written.
    """
    records = collected.records
    folder.mkdir(parents=True, exist_ok=True)
    paths = save(DRAWN[figure](records), folder, figure)
    pages = {"table": record_table(records)}
    if any(has_latent(record.model) for record in records):
        pages["samples"] = sample_tables(records, outer_samples(records, collected.runs))
    for name, text in pages.items():
        paths.append(folder / f"{figure}_{name}.md")
        with output_file(paths[-1]) as file:
            file.write_text(text, encoding="utf-8")
    for path in paths:
        collected.searches[0].run.log_file(path, "report")
    return paths
