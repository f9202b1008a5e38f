"""Tables of the best trials, as a figure and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from raytrain.analysis.figures.records import TrialRow, ranked
from raytrain.analysis.figures.style import GREY, INK, PALE, message, new_figure, plain, short
from raytrain.metrics import shown_metrics

TOP = 10


def trial_cells(rows: Sequence[TrialRow]) -> tuple[list[str], list[list[str]]]:
    """Return column names, and a list of cells for each of ``rows``: metrics first, then the drawn parameters."""
    names = list(dict.fromkeys(name for row in rows for name in row.parameters))
    metrics = shown_metrics(row.metrics for row in rows)
    head = ["trial", "status", *(metric.label for metric in metrics), "step", "time", *names]
    cells = [
        [
            f"{row.label} (from {short(row.origin, 24)})" if row.origin else row.label,
            row.status,
            *(metric.format(row.metrics) for metric in metrics),
            f"{row.step}/{row.steps}",
            f"{row.seconds:.0f} s" if math.isfinite(row.seconds) else "",
            *(short(row.parameters[name], 18) if name in row.parameters else "" for name in names),
        ]
        for row in rows
    ]
    return head, cells


def top_trials(rows: Sequence[TrialRow], num: int = TOP) -> Figure:
    """Draw the ``num`` best trials as a table."""
    best = ranked(rows)[:num]
    if not best:
        return message("No trial has been evaluated.")
    head, cells = trial_cells(best)
    widths = [max(len(text) for text in column) + 2 for column in zip(head, *cells, strict=True)]
    figure = new_figure(0.083 * sum(widths) + 0.3, 0.4 + 0.27 * (len(best) + 1))
    axes = figure.add_subplot()
    axes.set_axis_off()
    table = axes.table(
        cellText=[[plain(text) for text in line] for line in cells],
        colLabels=[plain(text) for text in head],
        colWidths=[width / sum(widths) for width in widths],
        bbox=Bbox.unit(),
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    for (line, column), cell in table.get_celld().items():
        cell.set_edgecolor(PALE)
        cell.set_text_props(
            ha="left" if column < 2 else "right",
            color=GREY if line == 0 else INK,
            weight="bold" if line == 1 else "normal",
        )
    return figure
