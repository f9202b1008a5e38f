"""Figure of a search's parameters as parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from raytrain.analysis.figures.records import TrialRow, ranked
from raytrain.analysis.figures.search import BITS, NOTHING
from raytrain.analysis.figures.style import GREY, INK, SEQUENCE, message, new_figure, plain, short, upper_limit


def parallel_coordinates(rows: Sequence[TrialRow]) -> Figure:
    """Draw every trial as a line through its parameters to its negative ELBO; better ones are darker, and in front."""
    scored = ranked(rows)
    names = list(dict.fromkeys(name for row in scored for name in row.parameters))
    if not scored or not names:
        return message(NOTHING if not scored else "No parameters were drawn from the search space.")
    figure = new_figure(max(7.0, 1.5 + 1.2 * len(names)), 4.6)
    axes = figure.add_subplot()
    axes.set_axis_off()
    high = upper_limit(row.bits_per_byte for row in scored)
    columns = [_Column([row.parameters.get(name) for row in scored]) for name in names]
    columns.append(_Column([min(row.bits_per_byte, high) for row in scored]))
    clipped = scored[-1].bits_per_byte > high
    if clipped:
        columns[-1].ticks[-1] = (1.0, f"≥ {high:.3g}")
    norm = Normalize(scored[0].bits_per_byte, max(high, scored[0].bits_per_byte + 1e-9))
    colour_map = matplotlib.colormaps[SEQUENCE]
    for index in reversed(range(len(scored))):
        axes.plot(
            range(len(columns)),
            [column.positions[index] for column in columns],
            color=colour_map(norm(scored[index].bits_per_byte)),
            linewidth=2.4 if index == 0 else 1.2,
            alpha=1.0 if index == 0 else 0.75,
            zorder=3 if index == 0 else 2,
        )
    for x, (name, column) in enumerate(zip([*names, "bits per byte"], columns, strict=True)):
        axes.plot([x, x], [0, 1], color=GREY, linewidth=0.8, zorder=1)
        axes.text(
            x, 1.06, plain(short(name, 18)), ha="center", fontsize=9, color=INK, rotation=15 if len(names) > 6 else 0
        )
        for position, label in column.ticks:
            axes.text(
                *(x + 0.03, position, plain(label)),
                va="center",
                fontsize=7.5,
                color=INK if position >= 0 else GREY,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
                zorder=4,
            )
    axes.set_xlim(-0.35, len(columns) - 0.5)
    axes.set_ylim(_Column.ABSENT - 0.06, 1.16)
    bar = figure.colorbar(
        ScalarMappable(norm, colour_map), ax=axes, extend="max" if clipped else "neither", pad=0.01, aspect=30
    )
    bar.set_label(BITS, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


class _Column:
    """An axis of parallel coordinates: the position in [0, 1] of each value, and labelled ticks."""

    ABSENT = -0.12
    """Position of a parameter that was not drawn."""

    def __init__(self, values: Sequence[Any]) -> None:
        present = [value for value in values if value is not None]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present):
            positions, labels = self._numbers(sorted(set(map(float, present))))
        else:
            kinds = sorted({str(value) for value in present})
            positions = {kind: (index + 0.5) / len(kinds) for index, kind in enumerate(kinds)}
            labels = [(position, short(kind, 14)) for kind, position in positions.items()]
        self.positions = [self.ABSENT if value is None else positions[self._key(value, positions)] for value in values]
        self.ticks = labels + ([(self.ABSENT, "not drawn")] if len(present) < len(values) else [])

    @staticmethod
    def _key(value: Any, positions: dict[Any, float]) -> Any:
        return str(value) if str(value) in positions else float(value)

    @staticmethod
    def _numbers(distinct: list[float]) -> tuple[dict[Any, float], list[tuple[float, str]]]:
        low, high = distinct[0], distinct[-1]
        logarithmic = low > 0 and high / low >= 8
        scale = math.log if logarithmic else float
        width = scale(high) - scale(low)

        def position(value: float) -> float:
            return (scale(value) - scale(low)) / width if width > 0 else 0.5

        middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
        marks = distinct if len(distinct) <= 4 else [low, middle, high]
        return {value: position(value) for value in distinct}, [(position(mark), short(mark)) for mark in marks]
