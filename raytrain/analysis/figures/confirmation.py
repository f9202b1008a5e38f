"""Figure of a search's confirmation: its best configs, trained again with new seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from raytrain.analysis.figures.search import BITS
from raytrain.analysis.figures.style import BLUE, GREY, INK, VERMILION, dress, explain, message, new_figure, plain
from raytrain.metrics import LIKELIHOOD


def confirmation(values: Mapping[str, Any]) -> Figure:
    """Draw each confirmed config's value in the search, its new seeds, and their mean with the 95% interval.

    Args:
        values: the result of ``search_report.read_confirmation``.
    """
    configs = [entry for entry in values["configs"] if any(value is not None for value in entry["values"])]
    if not configs:
        return message("No config has a result with a new seed.")
    figure = new_figure(7.6, 1.4 + 0.5 * len(configs))
    label = "negative log-likelihood (bits per byte)" if values.get("metric") == LIKELIHOOD else BITS
    axes = dress(figure.add_subplot(), label, "")
    for place, entry in enumerate(configs):
        colour = VERMILION if entry["trial"] == values.get("winner") else BLUE
        known = [value for value in entry["values"] if value is not None]
        looks: list[tuple[str, list[float], dict[str, Any]]] = [
            ("in the search", [entry["searched"]], {"marker": "D", "color": INK, "fillstyle": "none"}),
            ("new seeds", known, {"marker": "o", "markersize": 4, "color": GREY, "zorder": 4}),
            ("their mean, 95% interval", [entry["mean"]], {"marker": "o", "markersize": 7, "color": colour}),
        ]
        for label, points, look in looks:
            axes.plot(points, [place] * len(points), linestyle="", label=label if place == 0 else None, **look)
        if entry["interval"] is not None:
            axes.plot(entry["interval"], [place] * 2, color=colour, linewidth=1.6, marker="|", markersize=9)
    axes.set_yticks(range(len(configs)), [plain(f"trial {entry['trial']}") for entry in configs])
    axes.set_ylim(len(configs) - 0.5, -0.5)
    axes.grid(False, axis="y")
    explain(axes)
    return figure
