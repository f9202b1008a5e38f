"""Learning curves of a search's trials: the negative ELBO, KL and use of the code over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from raytrain.analysis.figures.records import TrialRow, evenly, ranked
from raytrain.analysis.figures.search import BITS
from raytrain.analysis.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PURPLE,
    VERMILION,
    dress,
    explain,
    in_steps,
    message,
    new_figure,
    plain,
    upper_limit,
)
from raytrain.config.models import has_latent
from raytrain.metrics import COLLAPSED, METRIC
from raytrain.models.ladder import BASELINE_ORDER, Ladder

NO_CURVES = "The table of trials has no evaluations."
NUM_BEST = 10
"""Number of best trials that stand out."""
MOST_OTHERS = 300
"""Maximum number of other trials that are drawn: more would be one grey surface."""
LEVELS = ((1, PURPLE, (0, (1, 1.5))), (BASELINE_ORDER, GREEN, (0, (4, 2))))
"""Orders of the n-grams that are drawn beside the best one, with their looks: the 2-gram and the 3-gram."""


def learning_curves(rows: Sequence[TrialRow], ladder: Ladder | None = None) -> Figure:
    """Draw the negative ELBO of all trials at each evaluation, the best ones in front, and what n-grams reach.

    Args:
        ladder: the n-grams' bits per byte on the validation samples of the winner.
    """
    drawn = [row for row in ranked(rows) if row.curves.get(METRIC)]
    if not drawn:
        return message(NO_CURVES)
    figure = new_figure(8.0, 4.6)
    axes = dress(figure.add_subplot(), "training step", BITS)
    handles = _draw(axes, drawn, METRIC)
    levels = [] if ladder is None else _levels(axes, ladder)
    values = [value for row in drawn for _, value in row.curves[METRIC]]
    # the first evaluations, far above all later values of interest, do not set the scale
    low, high = min([*values, *_heights(levels)]), max([upper_limit(values), *_heights(levels)])
    room = 0.04 * (high - low or 1.0)
    axes.set_ylim(low - room, high + room)
    if beyond := sum(min(value for _, value in row.curves[METRIC]) > high + room for row in drawn):
        text = f"{beyond} trial{'s' * (beyond > 1)} above {high + room:.3g}, not shown"
        axes.annotate(text, (0.995, 0.93), xycoords="axes fraction", ha="right", fontsize=8, color=GREY)
    in_steps(axes)
    explain(axes, [*handles, *levels])
    return figure


def code_curves(rows: Sequence[TrialRow]) -> Figure:
    """Draw the KL and the use of the code of all trials at each evaluation, the best ones in front."""
    drawn = [row for row in ranked(rows) if has_latent(row.model) and row.curves.get("kl")]
    if not drawn:
        return message("No trial with a latent code has been evaluated.")
    figure = new_figure(8.0, 6.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    dress(upper, "", "KL (nats per sample)")
    dress(lower, "training step", "used of the code (nats per sample)")
    handles = _draw(upper, drawn, "kl")
    _draw(lower, drawn, "used")
    collapsed = lower.axhline(COLLAPSED, color=INK, linestyle=(0, (4, 2)), linewidth=1.0)
    collapsed.set_label(f"collapsed below {COLLAPSED:g}")
    for axes in (upper, lower):
        low, high = axes.get_ylim()  # the use is a difference of two losses, and may be below 0 at first
        axes.set_ylim(bottom=min(-0.04 * high, max(low, -0.25 * high)))
    in_steps(lower)
    figure.align_ylabels()
    explain(upper, handles)
    explain(lower, [collapsed])
    return figure


def _draw(axes: Axes, drawn: Sequence[TrialRow], key: str) -> list[Line2D]:
    """Draw a metric of trials, best first, over the steps; return the lines for the legend."""
    best, others = drawn[:NUM_BEST], drawn[NUM_BEST:]
    taken = evenly(others, MOST_OTHERS)
    faint = [row.curves[key] for row in taken if row.curves.get(key)]
    alpha = 0.45 if len(taken) <= 50 else 0.22
    axes.add_collection(LineCollection(faint, colors=GREY, linewidths=0.8, alpha=alpha, zorder=1))
    ends = [curve[-1] for curve in faint]  # for a trial that was evaluated once, only its end can be seen
    axes.scatter([step for step, _ in ends], [value for _, value in ends], s=4, color=GREY, alpha=alpha, zorder=1)
    lines: list[Line2D] = []
    for place, row in reversed(list(enumerate(best))):
        colour, width = (VERMILION, 2.2) if place == 0 else (BLUE, 1.2)
        steps, values = zip(*row.curves.get(key) or [(0, math.nan)], strict=True)
        lines += axes.plot(steps, values, color=colour, linewidth=width, zorder=3 if place == 0 else 2)
        # where it ended: a dot at its last step, a bar before
        marker, size = ("o", 4) if row.step >= row.steps else ("|", 9)
        axes.plot(steps[-1:], values[-1:], color=colour, marker=marker, markersize=size, zorder=3)
    lines[-1].set_label(plain(f"best: {drawn[0].label}"))
    handles = lines[-1:]
    if len(lines) > 1:
        lines[0].set_label(f"next {len(lines) - 1}")
        handles.append(lines[0])
    if others:
        of = f"{len(taken)} of " if len(taken) < len(others) else ""
        handles.append(Line2D([], [], label=f"{of}{len(others)} others", color=GREY, linewidth=0.8))
    axes.autoscale_view()
    return handles


def _levels(axes: Axes, ladder: Ladder) -> list[Line2D]:
    """Draw the values that n-grams reach, and the entropy if it is known, highest first; return the lines."""
    lowest = ladder.lowest
    levels: list[tuple[str, float, str, Any]] = [
        (f"byte {order + 1}-gram", ladder.bits[order], colour, line)
        for order, colour, line in LEVELS
        if (ladder.vocabulary, order) != (lowest.vocabulary, lowest.best)
    ]
    levels.append((f"{lowest.vocabulary} {lowest.best + 1}-gram (best)", lowest.bits[lowest.best], INK, "-"))
    if ladder.entropy is not None:
        levels.append(("entropy", ladder.entropy, INK, (0, (1, 1.5))))
    return [
        axes.axhline(bits, label=plain(f"{name} {bits:.3f}"), color=colour, linestyle=line, linewidth=1.1, zorder=2.5)
        for name, bits, colour, line in levels
    ]


def _heights(levels: Sequence[Line2D]) -> list[float]:
    return [float(line.get_ydata()[0]) for line in levels]  # type: ignore[index,arg-type]
