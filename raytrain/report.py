"""Draw a run, a search or a figure of the paper.

    python -m raytrain.report run CHECKPOINT
    python -m raytrain.report search NAME --experiment raytrain
    python -m raytrain.report paper_fig4 --experiment raytrain
    python -m raytrain.report bios CHECKPOINT

CHECKPOINT is a folder, an s3:// address, an MLflow run id, or models:/NAME@alias. What is drawn is written
to --output and logged to the MLflow run that it is of.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from raytrain.config.cli import parse_options
from raytrain.utils.errors import UserError, run_command

if TYPE_CHECKING:
    from raytrain.runs.references import ResolvedModel

PAPER = ("paper_fig3", "paper_fig4", "paper_fig5", "paper_fig6", "paper_tweets")


@dataclass
class RunOptions:
    """Options of ``run``: the figures of one training run."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint's folder or s3:// address, an MLflow run id, or models:/NAME@alias."""
    output: Path | None = None
    """Folder; default: figures/ beside a local run's checkpoints, otherwise report-NAME here."""
    storage: str | None = None
    """Folder or s3:// address of training, where the corpus may lie ready; default $RAYTRAIN_STORAGE or ./runs."""
    data: str | None = None
    """Another corpus than the one that the model was trained on: a source as in raytrain.train."""
    data_path: str | None = None
    """File or folder that holds the source, where it is not where training found it."""
    data_field: str | None = None
    """Field or column that holds the text in .jsonl and .parquet sources."""


@dataclass
class SearchOptions:
    """Options of ``search``: all that a search has found, as figures and one HTML page."""

    name: tyro.conf.Positional[str]
    """Name of the search."""
    experiment: str = "raytrain"
    """MLflow experiment."""
    output: Path | None = None
    """Folder; default: report-NAME here."""


@dataclass
class PaperOptions:
    """Options of a figure of the paper."""

    experiment: str = "raytrain"
    """MLflow experiment."""
    search: tuple[str, ...] = ()
    """Names of the searches to draw; default: the newest of the search space that is called as the figure."""
    output: Path = Path("report")
    """Folder."""


@dataclass
class BiosOptions:
    """Options of ``bios``: texts of a byte LSTM at T = 1.0 and T = 0.05 side by side."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint's folder or s3:// address, an MLflow run id, or models:/NAME@alias."""
    num: int = 10
    """Texts at each temperature."""
    seed: int = 0
    """Seed of the texts."""
    output: Path | None = None
    """Folder; default: figures/ beside a local run's checkpoints, otherwise report-NAME here."""


def main() -> None:
    """Do what the first word says."""
    actions: dict[str, Callable[[str, list[str]], None]] = {
        "run": report_run,
        "search": report_search,
        **dict.fromkeys(PAPER, report_paper),
        "bios": report_bios,
    }
    words = sys.argv[1:]
    if words and words[0] in ("-h", "--help"):
        print(f"{__doc__}\nfigures: {', '.join(actions)}\n\npython -m raytrain.report FIGURE --help lists its options.")
        return
    if not words or words[0] not in actions:
        named = f"unknown figure {words[0]!r}" if words else "name a figure"
        raise UserError(f"{named}: python -m raytrain.report takes {', '.join(actions)}")
    actions[words[0]](words[0], words[1:])


def report_run(action: str, words: list[str]) -> None:
    """Figures of the run that a checkpoint belongs to."""
    options = parse_options(f"raytrain.report {action}", RunOptions, words)
    from raytrain.analysis.run_report import write_run_report
    from raytrain.config.schema import from_dict
    from raytrain.runs.references import from_checkpoint, resolve
    from raytrain.runs.workspace import corpus_of
    from raytrain.storage import open_storage_root

    found = resolve(options.checkpoint)
    config = from_dict(found.stored.config)
    storage = open_storage_root(options.storage)
    corpus = corpus_of(found.stored, storage, options.data, options.data_path, options.data_field)
    folder = check_folder(options.output or default_folder(found, options.checkpoint))
    paths = write_run_report(from_checkpoint(found.stored), config, corpus, folder, found.run)
    show(paths)
    if found.run is None:
        print("no MLflow run of this checkpoint is known: without its metrics there is no figure of the losses")
    else:
        print(f"logged: {found.run.ui_hint()}")


def report_search(action: str, words: list[str]) -> None:
    """Figures and the page of a search."""
    options = parse_options(f"raytrain.report {action}", SearchOptions, words)
    from raytrain.analysis.search_report import write_search_report
    from raytrain.tracking.client import check_tracking, tracking_uri
    from raytrain.tracking.queries import find_search

    check_tracking(uri := tracking_uri())
    search = find_search(uri, options.experiment, options.name)
    folder = check_folder(options.output or Path(f"report-{options.name}"))
    show(write_search_report(search.run, folder))
    print(f"logged: {search.run.ui_hint()}")


def report_paper(action: str, words: list[str]) -> None:
    """A figure of the paper, and the tables of samples that belong to it."""
    options = parse_options(f"raytrain.report {action}", PaperOptions, words)
    from raytrain.analysis.paper_report import collect, find_searches, write_paper_figure
    from raytrain.tracking.client import check_tracking, tracking_uri

    check_tracking(uri := tracking_uri())
    found = find_searches(uri, options.experiment, action, options.search)
    collected = collect(found, action, everything=bool(options.search))
    if not collected.records:
        raise UserError(f"{', '.join(search.name for search in found)}: no trial has been evaluated yet")
    paths = write_paper_figure(action, collected, check_folder(options.output))
    print(f"drawn from {', '.join(search.name for search in collected.searches)}")
    show(paths)
    print(f"logged: {collected.searches[0].run.ui_hint()}")


def report_bios(action: str, words: list[str]) -> None:
    """The table of the bios post."""
    options = parse_options(f"raytrain.report {action}", BiosOptions, words)
    for name in ("num", "seed"):
        if (value := getattr(options, name)) < (least := 1 if name == "num" else 0):
            raise UserError(f"--{name} is {value}: must be at least {least}")
    from raytrain.analysis.run_report import bios_table
    from raytrain.models.byte_lstm import ByteLstm
    from raytrain.runs.references import from_checkpoint, resolve

    found = resolve(options.checkpoint)
    model = from_checkpoint(found.stored)
    if not isinstance(model, ByteLstm):
        name = found.stored.config["model"]["name"]
        raise UserError(f"{options.checkpoint} is a {name}: the table of bios is of a byte_lstm")
    folder = check_folder(options.output or default_folder(found, options.checkpoint))
    path = folder / "bios.md"
    text = bios_table(model, options.num, options.seed)
    path.write_text(text, encoding="utf-8")
    print(text)
    show([path])
    if found.run is not None:
        found.run.log_file(path, "figures")
        print(f"logged: {found.run.ui_hint()}")


# ----------------------------------------------------------------------------------------- where to


def default_folder(found: ResolvedModel, reference: str) -> Path:
    """Beside the checkpoints of a run of this machine, otherwise a folder here that is named after the reference."""
    location = found.stored.uri
    if "://" not in location and Path(location).parent.name == "checkpoints":
        return Path(location).parent.parent / "figures"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", reference.removesuffix("/").rpartition("/")[2]).strip("-.")
    return Path(f"report-{name or 'checkpoint'}")


def check_folder(folder: Path) -> Path:
    """``folder``, made if need be.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {(error.strerror or str(error)).lower()}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {folder} cannot be written: permission denied")
    return folder


def show(paths: list[Path]) -> None:
    """Say what was written."""
    for path in paths:
        print(f"written: {path}")


if __name__ == "__main__":
    run_command(main)
