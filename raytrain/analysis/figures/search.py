"""Figures of a search, over the rows of its trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from raytrain.analysis.figures.records import TrialRow, ranked
from raytrain.analysis.figures.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    SKY,
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
from raytrain.config.schedules import kl_weight
from raytrain.config.schema import ObjectiveConfig
from raytrain.metrics import COLLAPSED, pareto_front

BITS = "negative ELBO (bits per byte)"
NOTHING = "No trial has been evaluated."
STATUS_LOOK = {
    "finished": (BLUE, "o"),
    "stopped": (ORANGE, "s"),
    "early_stopped": (GREY, "v"),
    "failed": (VERMILION, "X"),
    "interrupted": (PURPLE, "D"),
    "running": (SKY, "P"),
}
"""Colour and marker of each status that an evaluated trial can have."""


def best_so_far(rows: Sequence[TrialRow]) -> Figure:
    """Draw the negative ELBO of each trial when it ended, and the best one known by then."""
    ended = sorted((row for row in rows if math.isfinite(row.ended_at)), key=lambda row: row.ended_at)
    if not any(row.scored for row in ended):
        return message(NOTHING)
    origin = min(row.started_at if math.isfinite(row.started_at) else row.ended_at for row in ended)
    span = ended[-1].ended_at - origin
    unit, seconds = ("hours", 3600.0) if span > 3 * 3600 else ("minutes", 60.0) if span > 180 else ("seconds", 1.0)
    figure = new_figure()
    axes = dress(figure.add_subplot(), f"time since the first trial began ({unit})", BITS)
    scored = [row for row in ended if row.scored]
    times = [(row.ended_at - origin) / seconds for row in scored]
    best = np.minimum.accumulate([row.bits_per_byte for row in scored])
    axes.step(
        [*times, span / seconds],
        [*best, best[-1]],
        where="post",
        color=INK,
        linewidth=1.6,
        label="best so far",
        zorder=2,
    )
    for status, (colour, marker) in STATUS_LOOK.items():
        own = [(time, row) for time, row in zip(times, scored, strict=True) if row.status == status]
        if own:
            axes.scatter(
                [time for time, _ in own],
                [row.bits_per_byte for _, row in own],
                s=32,
                color=colour,
                marker=marker,
                label=status,
                zorder=3,
            )
    if unscored := [(row.ended_at - origin) / seconds for row in ended if not row.scored]:
        axes.plot(
            *(unscored, [0.985] * len(unscored)),
            color=VERMILION,
            marker="x",
            linestyle="",
            transform=axes.get_xaxis_transform(),
            label="never evaluated",
        )
    _limit(axes, [row.bits_per_byte for row in scored])
    explain(axes)
    return figure


def _limit(axes: Axes, values: Sequence[float]) -> None:
    """Leave values far worse than the rest out of the y axis, and note how many."""
    high = upper_limit(values)
    room = 0.06 * (high - min(values)) or 0.06 * max(abs(high), 1.0)
    axes.set_ylim(min(values) - room, high + room)
    if beyond := sum(value > high + room for value in values):
        text = f"{beyond} above {high + room:.3g}, not shown"
        axes.annotate(text, (0.995, 0.93), xycoords="axes fraction", ha="right", fontsize=8, color=GREY)


def bound_against_use(rows: Sequence[TrialRow]) -> Figure:
    """Draw the negative ELBO against the use of the code, with the Pareto front: trials that no other beats in both."""
    usable = [row for row in ranked(rows) if math.isfinite(row.use)]
    if not usable:
        return message(NOTHING)
    if not any(has_latent(row.model) for row in usable):
        return message("A language model has no latent code.")
    figure = new_figure(7.0, 4.6)
    axes = dress(figure.add_subplot(), "used of the code (nats per sample)", BITS)
    axes.axvspan(
        -1e9, COLLAPSED, color=PALE, alpha=0.6, linewidth=0, label=f"collapsed (less than {COLLAPSED:g})", zorder=0
    )
    best = pareto_front(usable, TrialRow.point)
    axes.plot(
        *([row.use for row in best], [row.bits_per_byte for row in best]),
        color=INK,
        linewidth=1.2,
        drawstyle="steps-pre",
        label="Pareto front",
        zorder=1,
    )
    for status, (colour, marker) in STATUS_LOOK.items():
        own = [row for row in usable if row.status == status]
        if own:
            axes.scatter(
                *([row.use for row in own], [row.bits_per_byte for row in own]),
                s=36,
                color=colour,
                marker=marker,
                label=status,
                zorder=2,
            )
    highest = max(row.use for row in usable)
    axes.set_xlim(-0.03 * max(highest, 1.0), 1.06 * max(highest, 1.0))
    _limit(axes, [row.bits_per_byte for row in usable])
    _name_points(axes, best)
    explain(axes)
    return figure


def _name_points(axes: Axes, rows: Sequence[TrialRow]) -> None:
    """Write the names of trials beside their points, without overlaps."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    for row in rows:
        x, y = (row.use - left) / (right - left), (row.bits_per_byte - low) / (high - low)
        if y <= 1 and all(abs(x - other) > 0.06 or abs(y - level) > 0.05 for other, level in taken):
            taken.append((x, y))
            axes.annotate(
                plain(row.label),
                (row.use, row.bits_per_byte),
                xytext=(5, -10),
                textcoords="offset points",
                fontsize=7.5,
            )


def annealing_curves(rows: Sequence[TrialRow], objectives: dict[str, ObjectiveConfig], num: int = 5) -> Figure:
    """Draw the KL weight of the best ``num`` trials and of the worst ``num``, over the steps that they were trained.

    Args:
        objectives: the config of each trial's loss, by run id; a trial without one is left out.
    """
    usable = [row for row in ranked(rows) if row.run_id in objectives and row.steps > 0 and has_latent(row.model)]
    if not usable:
        return message("No trial with a KL weight has been evaluated.")
    num = min(num, -(-len(usable) // 2))
    worst = usable[max(num, len(usable) - num) :]
    figure = new_figure(7.6, 4.2)
    axes = dress(figure.add_subplot(), "training step", "KL weight")
    handles: list[Line2D] = []
    for group, colour, line in ((usable[:num], BLUE, "-"), (worst, VERMILION, (0, (4, 2)))):
        for location, row in enumerate(group):
            objective = objectives[row.run_id]
            steps = np.unique(np.linspace(0, row.step or row.steps, 241).round()).astype(int)
            weights = [kl_weight(objective, int(step), row.steps) for step in steps]
            look: dict[str, Any] = {"color": colour, "linestyle": line, "alpha": 1 - 0.14 * location, "linewidth": 1.7}
            label = plain(f"{row.label}  {row.bits_per_byte:.3f}  {objective.annealing}")
            handles += axes.plot(steps, weights, label=label, **look)
            axes.plot(
                steps[-1], weights[-1], marker="o" if row.status == "finished" else "|", **(look | {"markersize": 5})
            )
    in_steps(axes)
    axes.set_xlim(right=1.02 * max(row.steps for row in usable))
    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])
    _explain_groups(axes, handles, num)
    return figure


def _explain_groups(axes: Axes, handles: Sequence[Line2D], num: int) -> None:
    """Add a legend in two parts: the best trials, then the worst."""
    heading = [Line2D([], [], linestyle="", label=name) for name in (f"best {num}", f"worst {len(handles) - num}")]
    entries = [heading[0], *handles[:num]]
    if len(handles) > num:
        entries += [heading[1], *handles[num:]]
    explain(axes, entries, title="trial, bits per byte, annealing")
