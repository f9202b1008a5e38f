"""Style of all figures: axes with units, and colours that can be told apart by the colour-blind and in grey print."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from raytrain.config.models import known_models
from raytrain.utils.files import output_file

DPI = 150
FORMATS = ("png", "svg")


# Okabe and Ito's palette
BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
INK, GREY, PALE = "#222222", "#767676", "#D9D9D9"
SEQUENCE = "viridis"
"""Colour map of ordered values."""
SPARE_COLOURS, SPARE_MARKERS = (GREEN, PURPLE, ORANGE, SKY), "Dvp*X"
"""Looks of models whose spec names none."""


def model_look(model: str) -> tuple[str, str, str, str]:
    """Return label, colour, marker and line style of a model, the same in all figures."""
    models = known_models()
    spec = models.get(model)
    plain = [name for name, other in models.items() if not other.colour]
    number = plain.index(model) if model in plain else len(plain)
    colour, marker = SPARE_COLOURS[number % len(SPARE_COLOURS)], SPARE_MARKERS[number % len(SPARE_MARKERS)]
    if spec is None:  # records may be of a model that is not registered here
        return model, colour, marker, "-"
    return spec.label, spec.colour or colour, spec.marker or marker, spec.line


def new_figure(width: float = 7.0, height: float = 4.2) -> Figure:
    """Return an empty figure of ``width`` x ``height`` inches whose layout keeps its parts from overlapping."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    return figure


def dress(axes: Axes, x: str, y: str, title: str = "") -> Axes:
    """Label the axes, remove lines that carry no data, and return ``axes``."""
    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)
    if title:
        axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.tick_params(labelsize=8.5, colors=INK)
    axes.grid(True, color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    return axes


def in_steps(axes: Axes) -> None:
    """Write the x axis in whole steps, thousands as k."""
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def explain(axes: Axes, handles: Sequence[object] | None = None, *, title: str = "", above: bool = False) -> None:
    """Add a legend to the right of the axes or ``above`` them, where it covers no data."""
    options: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "alignment": "left"}
    if above:
        options = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 4}
    if handles is None:
        handles = axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(handles=handles, title=title or None, title_fontsize=8.5, fontsize=8.5, frameon=False, **options)


def message(text: str, width: float = 7.0, height: float = 4.2) -> Figure:
    """Return a figure with a sentence that says why there is nothing to draw."""
    figure = new_figure(width, height)
    say(figure.add_subplot(), text)
    return figure


def say(axes: Axes, text: str) -> None:
    """Write a sentence where the data would be."""
    axes.set_axis_off()
    axes.text(
        0.5, 0.5, plain(text), ha="center", va="center", fontsize=10, color=GREY, transform=axes.transAxes, wrap=True
    )


def plain(text: object) -> str:
    """Return ``text`` as a label: matplotlib would take the text between two dollar signs for a formula."""
    return str(text).replace("$", r"\$")


def short(value: object, length: int = 16) -> str:
    """Return a value of a config as a short label."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    text = str(value)
    return text if len(text) <= length else text[: length - 1] + "…"


def upper_limit(values: Iterable[float]) -> float:
    """Return the upper end of an axis on which lower is better, so that outliers do not squeeze the other values."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if not ordered:
        return 1.0
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    return min(high, middle + 3 * (middle - low)) if middle > low else high


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write the figure to ``folder`` as ``name`` in each of ``formats``, and return the files."""
    paths = [folder / f"{name}.{form}" for form in formats]
    for path, form in zip(paths, formats, strict=True):
        # without a date, the same data give the same file
        with output_file(path) as file:
            figure.savefig(file, format=form, metadata={"Date": None} if form == "svg" else None)
    return paths
