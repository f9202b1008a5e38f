"""Draw a run, a search or a figure of the paper.

    python -m raytrain.report run CHECKPOINT
    python -m raytrain.report search NAME --experiment raytrain
    python -m raytrain.report paper_fig4 --experiment raytrain
    python -m raytrain.report bios CHECKPOINT

CHECKPOINT is a folder, an s3:// address, an MLflow run id, or models:/NAME@ALIAS. The figures are written to
--output and logged to the MLflow run that they show.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from raytrain.config.cli import parse_options
from raytrain.utils.errors import UserError, run_command

if TYPE_CHECKING:
    from raytrain.tracking.runs import Run

PAPER = ("paper_fig3", "paper_fig4", "paper_fig5", "paper_fig6", "paper_tweets")


@dataclass
class RunOptions:
    """Options of ``run``: the figures of one training run."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or s3:// address of a checkpoint, a run or a search; MLflow run id; or models:/NAME@ALIAS."""
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
    """Name of the search, or the id of its MLflow run."""
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
    """Folder or s3:// address of a checkpoint, a run or a search; MLflow run id; or models:/NAME@ALIAS."""
    num: int = 10
    """Texts at each temperature."""
    seed: int = 0
    """Seed of the texts."""
    output: Path | None = None
    """Folder; default: figures/ beside a local run's checkpoints, otherwise report-NAME here."""


def main() -> None:
    """Run the action that the first word names."""
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
    """Draw the run that a checkpoint belongs to."""
    options = parse_options(f"raytrain.report {action}", RunOptions, words)

    from raytrain.analysis import reports

    paths, run = reports.report_run(
        options.checkpoint,
        options.output,
        storage=options.storage,
        data=options.data,
        data_path=options.data_path,
        data_field=options.data_field,
    )
    print_files(paths, run)
    if run is None:
        print("no MLflow run of this checkpoint is known: without its metrics there is no figure of the losses")


def report_search(action: str, words: list[str]) -> None:
    """Draw a search and write its page."""
    options = parse_options(f"raytrain.report {action}", SearchOptions, words)

    from raytrain.analysis import reports

    print_files(*reports.report_search(options.name, options.experiment, options.output))


def report_paper(action: str, words: list[str]) -> None:
    """Draw a figure of the paper, and write the tables of samples that belong to it."""
    options = parse_options(f"raytrain.report {action}", PaperOptions, words)

    from raytrain.analysis import reports

    paths, searches, run = reports.report_paper(action, options.experiment, options.search, options.output)
    print(f"drawn from {', '.join(searches)}")
    print_files(paths, run)


def report_bios(action: str, words: list[str]) -> None:
    """Write the table of the bios post."""
    options = parse_options(f"raytrain.report {action}", BiosOptions, words)
    for name in ("num", "seed"):
        if (value := getattr(options, name)) < (least := 1 if name == "num" else 0):
            raise UserError(f"--{name} is {value}: must be at least {least}")

    from raytrain.analysis import reports

    paths, text, run = reports.report_bios(options.checkpoint, options.num, options.seed, options.output)
    print(text)
    print_files(paths, run)


def print_files(paths: list[Path], run: Run | None) -> None:
    """Print the files that were written, and how to look at them in MLflow."""
    for path in paths:
        print(f"written: {path}")
    if run is not None:
        print(f"logged: {run.ui_hint()}")


if __name__ == "__main__":
    run_command(main)
