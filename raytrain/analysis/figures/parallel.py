"""Figure of a search's parameters as parallel coordinates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from raytrain.analysis.figures.records import TrialRow, evenly, is_logarithmic, ranked
from raytrain.analysis.figures.search import BITS, NOTHING
from raytrain.analysis.figures.style import GREY, INK, SEQUENCE, message, new_figure, plain, short, upper_limit

MOST_COLOURED, MOST_OTHERS = 50, 200
"""Maximum numbers of trials in colour, the best ones, and in grey behind them: among more, none can be followed."""
SPREAD = 0.05
"""Width over which lines through one value of a parameter are spread if there are trials in grey."""


def parallel_coordinates(rows: Sequence[TrialRow]) -> Figure:
    """Draw trials as lines through their parameters to their negative ELBO; better ones are darker, and in front.

    If there are many trials, only the best have colours. The others are grey, as many as can be told apart.
    """
    scored = ranked(rows)
    names = list(dict.fromkeys(name for row in scored for name in row.parameters))
    if not scored or not names:
        return message(NOTHING if not scored else "No parameters were drawn from the search space.")
    coloured, others = scored[:MOST_COLOURED], scored[MOST_COLOURED:]
    drawn = [*coloured, *evenly(others, MOST_OTHERS)]
    figure = new_figure(max(7.0, 1.5 + 1.2 * len(names)), 4.6)
    axes = figure.add_subplot()
    axes.set_axis_off()
    columns = [_Column([row.parameters.get(name) for row in drawn]) for name in names]
    if others:
        for column in columns:
            column.spread()
    high = upper_limit(row.bits_per_byte for row in drawn)
    columns.append(_Column([min(row.bits_per_byte, high) for row in drawn]))
    if max(row.bits_per_byte for row in drawn) > high:
        columns[-1].ticks[-1] = (1.0, f"≥ {high:.3g}")
    lines = [list(enumerate(positions)) for positions in zip(*(column.positions for column in columns), strict=True)]
    if others:
        axes.add_collection(LineCollection(lines[len(coloured) :], colors=GREY, linewidths=0.5, alpha=0.25, zorder=1.5))
        grey = f"{len(drawn) - len(coloured)} of " if len(drawn) < len(scored) else ""
        text = f"in colour: the best {len(coloured)} of {len(scored)} trials; grey: {grey}{len(others)} others"
        axes.text(-0.3, _Column.ABSENT - 0.1, text, fontsize=8.5, color=GREY, va="top")
    low, high = coloured[0].bits_per_byte, upper_limit(row.bits_per_byte for row in coloured)
    norm, colour_map = Normalize(low, max(high, low + 1e-9)), matplotlib.colormaps[SEQUENCE]
    for index in reversed(range(len(coloured))):
        axes.plot(
            *zip(*lines[index], strict=True),
            color=colour_map(norm(coloured[index].bits_per_byte)),
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
    axes.set_ylim(_Column.ABSENT - (0.16 if others else 0.06), 1.16)
    beyond = "max" if max(row.bits_per_byte for row in coloured) > high else "neither"
    bar = figure.colorbar(ScalarMappable(norm, colour_map), ax=axes, extend=beyond, pad=0.01, aspect=30)
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

    def spread(self) -> None:
        """Spread lines that pass through the same value, so that each has a position of its own."""
        seen = Counter[float]()
        width = SPREAD * (len(set(self.positions)) < len(self.positions) / 4)
        for index, position in enumerate(self.positions):
            # multiples of the golden ratio fill an interval evenly, however many there are
            self.positions[index] += width * (seen[position] * 0.618034 % 1 - 0.5)
            seen[position] += 1

    @staticmethod
    def _key(value: Any, positions: dict[Any, float]) -> Any:
        return str(value) if str(value) in positions else float(value)

    @staticmethod
    def _numbers(distinct: list[float]) -> tuple[dict[Any, float], list[tuple[float, str]]]:
        low, high = distinct[0], distinct[-1]
        logarithmic = is_logarithmic(distinct)
        scale = math.log if logarithmic else float
        width = scale(high) - scale(low)

        def position(value: float) -> float:
            return (scale(value) - scale(low)) / width if width > 0 else 0.5

        middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
        marks = distinct if len(distinct) <= 4 else [low, middle, high]
        return {value: position(value) for value in distinct}, [(position(mark), short(mark)) for mark in marks]
