"""Report of a search: its figures as PNG files, and one HTML page that needs no network."""

from __future__ import annotations

import base64
import dataclasses
import html
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.analysis.figures import search as figures
from raytrain.analysis.figures.confirmation import confirmation as confirmation_figure
from raytrain.analysis.figures.curves import code_curves, learning_curves
from raytrain.analysis.figures.importance import importance
from raytrain.analysis.figures.parallel import parallel_coordinates
from raytrain.analysis.figures.records import TrialRow, ranked, read_trials
from raytrain.analysis.figures.schedule import learnt_schedule
from raytrain.analysis.figures.style import save
from raytrain.analysis.figures.tables import TOP, top_trials, trial_cells
from raytrain.config.models import has_latent
from raytrain.config.schema import ObjectiveConfig, from_dict
from raytrain.metrics import collapse_warning, headline
from raytrain.models.ladder import Ladder
from raytrain.runs.records import BEST_CONFIG, search_objective_of
from raytrain.tracking.queries import Child, children, describe, download
from raytrain.utils.errors import UserError
from raytrain.utils.files import output_file
from raytrain.utils.validation import parse_json, validate_type

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

    from raytrain.tracking.runs import Run

TRIALS = "trials.parquet"
CONFIRMATION = "confirmation.json"
"""Artifact of a search that has confirmed its winner; see ``search.confirmation``."""
LADDER = "raytrain.ladder"
"""Tag of a search that has ended: the reference ladder on the samples of its winner, as JSON."""
CAPTIONS = {
    "confirmation": "Confirmation, drawn: each config's value in the search, and its new seeds with the 95% interval "
    "of their mean (Student's t).",
    "best_so_far": "Best so far: the negative ELBO of each trial when it ended, and the lowest until then.",
    "learning_curves": "Learning curves: the negative ELBO of each trial at its evaluations, and what n-grams of the "
    "text reach; a bar is where one of the best ended before its last step.",
    "code_curves": "KL and use of the code: what the code costs, and what the decoder uses of it, at each evaluation.",
    "bound_against_use": "Negative ELBO against use of the code: no trial beats one on the Pareto front in both.",
    "importance": "Importance of the hyperparameters: the share of the negative ELBO's variance that each explains "
    "(fANOVA), with the 95% interval that a jackknife over the trials gives.",
    "parallel_coordinates": "Parameters: each line is a trial; the thick one is the best. Of many, the best have "
    "colours.",
    "schedule": "Schedule: what the best trial's run changed, and when. Its config trains the same run again.",
    "annealing": "Annealing: the KL weight over the steps that were trained, best trials against worst.",
    "top_trials": "The best trials.",
}


def search_figures(
    rows: Sequence[TrialRow],
    objectives: Mapping[str, ObjectiveConfig],
    ladder: Ladder | None = None,
    study: optuna.Study | None = None,
) -> dict[str, Figure]:
    """Draw all figures of a search; return them by name.

    Args:
        objectives: the config of each trial's loss, by run id.
        ladder: the n-grams on the validation samples of the winner, if there is one.
        study: the search's own Optuna study, if at hand; otherwise one is made from ``rows``.
    """
    # parts of a population's runs can be compared only if they end at the same step, and their KL weight changes
    last = max((row.steps for row in rows), default=0)
    whole = [row for row in rows if row.member < 0 or row.steps == last]
    annealed = {} if len(whole) < len(rows) else {"annealing": figures.annealing_curves(rows, dict(objectives))}
    return {
        "best_so_far": figures.best_so_far(rows),
        "learning_curves": learning_curves(rows, ladder),
        "code_curves": code_curves(rows),
        "bound_against_use": figures.bound_against_use(rows),
        "importance": importance(whole, study),
        "parallel_coordinates": parallel_coordinates(whole),
        **annealed,
        "top_trials": top_trials(rows),
    }


def objective_of(parameters: Mapping[str, str]) -> ObjectiveConfig:
    """Read the config of the loss from the flattened parameters of an MLflow run; missing fields take their default."""
    values: dict[str, Any] = dataclasses.asdict(ObjectiveConfig())
    for name, default in values.items():
        if (text := parameters.get(f"objective.{name}")) is not None:
            values[name] = type(default)(text)
    return ObjectiveConfig(**values)


def write_search_report(parent: Run, folder: Path, study: optuna.Study | None = None) -> list[Path]:
    """Draw the report of a search into ``folder``, log it to ``parent`` under ``report/``, and return the files.

    The table is the parent run's ``trials.parquet``, and the configs are those of its children. The last file is
    ``report.html``.

    Raises:
        UserError: the search has no table of trials, or one that cannot be read.
        OSError, UserError: ``folder`` cannot be written.
    """
    search = describe(parent)
    with tempfile.TemporaryDirectory() as scratch:
        file = download(parent, TRIALS, Path(scratch))
        if file is None:
            raise UserError(f"search {search.name} has no {TRIALS} yet: it is written when the search ends")
        rows = [row for row in read_trials(file) if not row.confirms]
        file = download(parent, CONFIRMATION, Path(scratch))
        confirmed = None if file is None else read_confirmation(file)
        file = download(parent, BEST_CONFIG, Path(scratch))
        won = None if file is None else from_dict(parse_json(file.read_bytes()))
    objectives = {child.run.run_id: objective_of(child.parameters) for child in children(parent)}
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, Path] = {}
    drawn = search_figures(rows, objectives, ladder_of(search), study)
    if won is not None and won.changes:
        drawn = {"schedule": learnt_schedule(won), **drawn}
    if confirmed is not None:
        drawn = {"confirmation": confirmation_figure(confirmed), **drawn}
    for name, figure in drawn.items():
        images[name] = save(figure, folder, name, ("png",))[0]
    page = folder / "report.html"
    with output_file(page) as file:
        file.write_text(report_page(search, rows, images, confirmed), encoding="utf-8")
    paths = [*images.values(), page]
    for path in paths:
        parent.log_file(path, "report")
    return paths


# ---------------------------------------------------------------------------------------------- page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0.2em; } h2 { font-size: 1.1em; margin-top: 2.2em; }
figure { margin: 1em 0; } img { max-width: 100%; height: auto; } .quiet { color: #666; }
.warning { background: #fdf0e6; border-left: 4px solid #d55e00; padding: 0.5em 1em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 0.25em 0.8em 0.25em 0; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
"""


def read_confirmation(file: Path) -> dict[str, Any]:
    """Read a ``confirmation.json``.

    Raises:
        UserError: the file is not one.
    """
    try:
        values = validate_type(parse_json(file.read_bytes()), dict[str, Any], "it")
        validate_type(values.get("sentence"), str, "sentence")
        configs = validate_type(values.get("configs"), list[dict[str, Any]], "configs")
        for entry in configs:
            if missing := CONFIG.keys() - entry.keys():
                raise ValueError(f"configs has no {min(missing)}")
            for name, hint in CONFIG.items():
                validate_type(entry.get(name), hint, f"configs.{name}")
            if len(entry["interval"] or "..") != 2:
                raise ValueError("configs.interval has no two ends")
        for name in ("metric", "winner"):
            validate_type(values.get(name), str | None, name)
        return values
    except ValueError as error:
        raise UserError(f"{file.name} is not the confirmation of a search: {error}") from None


CONFIG = {
    "trial": str,
    "searched": float,
    "mean": float | None,
    "interval": list[float] | None,
    "spread": float | None,
    "held": int,
    "seeds": list[int],
    "values": list[float | None],
}
"""Keys of a config in a ``confirmation.json`` that the report shows."""


def _confirmation(values: dict[str, Any] | None) -> list[str]:
    """Return the page's section on the confirmation of the winner; empty without a confirmation."""
    if values is None:
        return []
    head = ["trial", "in the search", "mean", "95% interval", "spread", "held", "seeds", "values"]

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    cells = [
        [
            entry["trial"],
            *map(number, (entry["searched"], entry["mean"])),
            "-" if entry["interval"] is None else " to ".join(map(number, entry["interval"])),
            number(entry["spread"]),
            f"{entry['held']} of {len(entry['seeds'])}",
            ", ".join(map(str, entry["seeds"])),
            ", ".join(map(number, entry["values"])),
        ]
        for entry in values["configs"]
    ]
    return [
        "<h2>Confirmation</h2>",
        f"<p>The best configs again with new seeds, in bits per byte: {html.escape(values['sentence'])}.</p>",
        _cells(head, cells),
    ]


def report_page(
    search: Child, rows: Sequence[TrialRow], images: Mapping[str, Path], confirmation: dict[str, Any] | None = None
) -> str:
    """Return the HTML page: a summary, every image embedded, and the tables of trials as text.

    ``confirmation`` is the result of ``read_confirmation``; ``rows`` are those of the search's own trials.
    """
    sections = []
    for name, file in images.items():
        title, _, text = CAPTIONS[name].partition(":")
        if name == "top_trials":
            title, text = f"The best {min(TOP, len(ranked(rows)))} trials", ""
        data = base64.b64encode(file.read_bytes()).decode()
        sections.append(
            f"<h2>{html.escape(title.rstrip('.'))}</h2>\n<figure><img alt='{html.escape(title)}' "
            f"src='data:image/png;base64,{data}'><figcaption class='quiet'>{html.escape(text.strip())}"
            "</figcaption></figure>"
        )
    others = sorted(rows, key=lambda row: row.number)
    return "\n".join(
        [
            "<!doctype html>",
            f"<html lang='en'><head><meta charset='utf-8'><title>{html.escape(search.name)}</title>",
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(search.name)}</h1>",
            *_summary(search, rows, confirmation),
            *_confirmation(confirmation),
            *sections,
            "<h2>The best trials, in text</h2>",
            _html_table(ranked(rows)[:TOP]),
            "<h2>All trials</h2>",
            f"<details><summary>{len(others)} trials, by number</summary>{_html_table(others, reasons=True)}</details>",
            "</body></html>\n",
        ]
    )


def _summary(search: Child, rows: Sequence[TrialRow], confirmation: dict[str, Any] | None) -> list[str]:
    """Return the summary: the search, how its trials ended, and the best one with what a user should know about it."""
    counts = ", ".join(f"{count} {status}" for status, count in Counter(row.status for row in rows).items())
    models = ", ".join(sorted({row.model for row in rows if row.model}))
    lines = [f"{models or 'no model'}; {len(rows)} trials" + (f" ({counts})" if counts else "")]
    space, corpus = search.tags.get("raytrain.space"), search.tags.get("raytrain.corpus")
    if space:
        lines.append(f"search space {space}")
    if corpus:
        lines.append(f"corpus {corpus[:12]}")
    search_objective = search_objective_of(
        {name: search.parameters.get(f"search.{name}") for name in ("objective", "min_used")}
    )
    lines.append(f"objective: {search_objective}")
    paragraphs = [f"<p class='quiet'>{html.escape('; '.join(lines))}.</p>"]
    if not (best := ranked(rows)[:1]):
        return [*paragraphs, "<p class='warning'>No trial has been evaluated.</p>"]
    row, ladder = best[0], ladder_of(search)
    best_of = "Best" if confirmation is None else "Best before the confirmation"
    paragraphs.append(f"<p>{best_of}: trial {html.escape(row.label)} with {html.escape(headline(row.metrics))}.</p>")
    if search_objective.min_used and not search_objective.may_win(row.metrics):
        lack = f"No trial uses at least {search_objective.min_used:g} nats of its code: none has won."
        paragraphs.append(f"<p class='warning'>{lack}</p>")
    if ladder is not None:
        paragraphs.append(f"<p>Compared with counting: {html.escape(ladder.comparison(row.bits_per_byte))}.</p>")
    if ladder is not None and (warning := ladder.warning(row.bits_per_byte, whose="The best trial's")):
        paragraphs.append(f"<p class='warning'>{html.escape(warning)}.</p>")
    if warning := collapse_warning(row.metrics, has_latent(row.model), whose="The best trial's"):
        paragraphs.append(
            f"<p class='warning'>{html.escape(warning)}. The Pareto front below shows what a used one costs.</p>"
        )
    return paragraphs


def ladder_of(search: Child) -> Ladder | None:
    """Return the reference ladder of a search that has ended with a winner; ``None`` for any other.

    Raises:
        UserError: its tag does not hold a ladder.
    """
    if (text := search.tags.get(LADDER)) is None:
        return None
    try:
        return Ladder.from_json(parse_json(text))
    except ValueError as error:
        raise UserError(f"search {search.name}: its tag {LADDER} is not a ladder: {error}") from None


def _html_table(rows: Sequence[TrialRow], reasons: bool = False) -> str:
    if not rows:
        return "<p class='quiet'>None.</p>"
    head, cells = trial_cells(rows)
    if reasons:
        head, cells = [*head, "reason"], [[*line, row.reason] for line, row in zip(cells, rows, strict=True)]
    return _cells(head, cells)


def _cells(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    def line(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    return f"<div class='wide'><table>{line('th', head)}{''.join(line('td', texts) for texts in cells)}</table></div>"
