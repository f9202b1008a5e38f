"""Reports: the figures and pages of a run, a search, a figure of the paper, and the table of bios."""

from __future__ import annotations

import os
import re
from pathlib import Path

from raytrain.analysis.paper_report import collect, find_searches, write_paper_figure
from raytrain.analysis.run_report import bios_table, write_run_report
from raytrain.analysis.search_report import write_search_report
from raytrain.config.schema import from_dict
from raytrain.runs.references import ResolvedModel, resolve
from raytrain.runs.trained_model import from_checkpoint
from raytrain.runs.workspace import corpus_of
from raytrain.storage import open_storage_root
from raytrain.tracking.client import check_tracking, tracking_uri
from raytrain.tracking.queries import find_search
from raytrain.tracking.runs import Run
from raytrain.utils.errors import UserError
from raytrain.utils.files import local_path, output_file


def report_run(
    reference: str,
    output: Path | None = None,
    *,
    storage: str | None = None,
    data: str | None = None,
    data_path: str | None = None,
    data_field: str | None = None,
) -> tuple[list[Path], Run | None]:
    """Draw the run that a checkpoint belongs to; return the files and its MLflow run, where they are logged too.

    ``data`` names a corpus other than the one of training.

    Raises:
        UserError: there is no such checkpoint or corpus, or ``output`` cannot be written.
    """
    found = resolve(reference)
    corpus = corpus_of(found.stored, open_storage_root(storage), data, data_path, data_field)
    folder = writable_folder(output or default_folder(found, reference))
    config = from_dict(found.stored.config)
    return write_run_report(from_checkpoint(found.stored), config, corpus, folder, found.run), found.run


def report_search(name: str, experiment: str, output: Path | None = None) -> tuple[list[Path], Run]:
    """Draw a search and write its page; return the files and its MLflow run.

    Raises:
        UserError: there is no such search, or ``output`` cannot be written.
    """
    check_tracking(uri := tracking_uri())
    search = find_search(uri, experiment, name)
    return write_search_report(search.run, writable_folder(output or Path(f"report-{name}"))), search.run


def report_paper(
    figure: str, experiment: str, searches: tuple[str, ...], output: Path
) -> tuple[list[Path], list[str], Run]:
    """Draw a figure of the paper; return the files, the searches that it shows, and the MLflow run of the first.

    ``searches`` names them; if empty, take the newest search of the space that has the figure's name.

    Raises:
        UserError: there is no such search, none of its trials has been evaluated, or ``output`` cannot be written.
    """
    check_tracking(uri := tracking_uri())
    found = find_searches(uri, experiment, figure, searches)
    collected = collect(found, figure, everything=bool(searches))
    if not collected.records:
        raise UserError(f"{', '.join(search.name for search in found)}: no trial has been evaluated yet")
    paths = write_paper_figure(figure, collected, writable_folder(output))
    return paths, [search.name for search in collected.searches], collected.searches[0].run


def report_bios(reference: str, num: int, seed: int, output: Path | None = None) -> tuple[list[Path], str, Run | None]:
    """Write the table of the bios post; return the file, its text and the MLflow run.

    Raises:
        UserError: there is no such checkpoint, its model has a latent code, or ``output`` cannot be written.
    """
    found = resolve(reference)
    model = from_checkpoint(found.stored)
    if model.latent:
        name = found.stored.config["model"]["name"]
        raise UserError(f"{reference} is a {name}: the table of bios is of a language model without a latent code")
    path = writable_folder(output or default_folder(found, reference)) / "bios.md"
    text = bios_table(model, num, seed)
    with output_file(path) as file:
        file.write_text(text, encoding="utf-8")
    if found.run is not None:
        found.run.log_file(path, "figures")
    return [path], text, found.run


def default_folder(found: ResolvedModel, reference: str) -> Path:
    """Return ``figures`` beside the checkpoints of a local run, otherwise a folder here, named after the reference."""
    location = found.stored.uri
    if "://" not in location and Path(location).parent.name == "checkpoints":
        return Path(location).parent.parent / "figures"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", reference.removesuffix("/").rpartition("/")[2]).strip("-.")
    return Path(f"report-{name or 'checkpoint'}")


def writable_folder(folder: Path) -> Path:
    """Return ``folder``, created if necessary.

    Raises:
        UserError: it cannot be written.
    """
    folder = local_path(folder, "--output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {(error.strerror or str(error)).lower()}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {folder} cannot be written: permission denied")
    return folder
