"""Figures of Semeniuta et al. (2017), reproduced with the paper's own axes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raytrain.analysis.figures.records import Record
from raytrain.analysis.figures.style import (
    BLUE,
    GREEN,
    PURPLE,
    SEQUENCE,
    VERMILION,
    dress,
    explain,
    in_steps,
    message,
    model_look,
    new_figure,
)
from raytrain.config.models import has_latent, known_models

Value = Callable[[Record], float]
BITS = "bits per character"
KL = "KL (nats per sample)"
NOTHING = "No run of this figure has been evaluated."


def fig3(records: Sequence[Record]) -> Figure:
    """Draw the reconstruction of decoders without history over the steps: convolutional and LSTM, one line a length."""
    curves = [record for record in records if record.curve]
    if not curves:
        return message(NOTHING)
    models = [model for model in ("hybrid", "lstm_vae") if any(record.model == model for record in curves)]
    titles = {"hybrid": "convolutional autoencoder", "lstm_vae": "LSTM autoencoder"}
    lengths = sorted({record.length for record in curves})
    colour_map = matplotlib.colormaps[SEQUENCE]
    colours = {length: colour_map(0.9 * position / max(1, len(lengths) - 1)) for position, length in enumerate(lengths)}
    figure = new_figure(1.2 + 3.9 * len(models), 3.9)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        dress(axes, "training step", f"reconstruction ({BITS})" if axes is panels[0] else "", titles[model])
        drawn: set[int] = set()
        for record in sorted((record for record in curves if record.model == model), key=lambda record: record.length):
            label = f"{record.length}" if record.length not in drawn else None
            drawn.add(record.length)
            bits = [record.bits(nats) for _, nats in record.curve]
            axes.plot(
                [step for step, _ in record.curve], bits, color=colours[record.length], linewidth=1.5, label=label
            )
        in_steps(axes)
    panels[0].set_ylim(bottom=0)
    explain(panels[-1], title="sample length")
    return figure


def fig4(records: Sequence[Record]) -> Figure:
    """Draw bits per character, KL, and KL over reconstruction against the length of the samples.

    The plain LSTM language model is drawn beside the negative ELBO of the VAEs. An LSTM VAE with the same cost and no
    KL does not use its code. Where both cost more than at greater lengths, they are undertrained.
    """
    if not records:
        return message(NOTHING)
    figure = new_figure(11.0, 3.8)
    panels = figure.subplots(1, 3)
    values: list[tuple[str, Value]] = [
        (BITS, lambda record: record.bits_per_byte),
        (KL, lambda record: record.kl),
        ("KL / reconstruction", lambda record: record.kl / record.reconstruction if record.reconstruction else 0.0),
    ]
    for axes, (name, value) in zip(panels, values, strict=True):
        dress(axes, "sample length (characters)", name)
        shown = records if axes is panels[0] else [record for record in records if has_latent(record.model)]
        _lines_by_model(axes, shown, lambda record: record.length, value)
        axes.set_xticks(sorted({record.length for record in records}))
        if axes is not panels[0]:
            _from_zero(axes)
    _explain_below(figure, panels[0])
    return figure


def fig5(records: Sequence[Record]) -> Figure:
    """Draw KL and negative ELBO against alpha, with and without annealing of the KL weight."""
    if not records:
        return message(NOTHING)
    figure = new_figure(8.4, 3.8)
    panels = figure.subplots(1, 2)
    looks = {
        True: ("with annealing", BLUE, "o", "-"),
        False: ("without annealing", VERMILION, "s", "--"),
    }
    for axes, name, value in (
        (panels[0], KL, lambda record: record.kl),
        (panels[1], f"negative ELBO ({BITS})", lambda record: record.bits_per_byte),
    ):
        dress(axes, "alpha, weight of the auxiliary loss", name)
        for annealed, look in looks.items():
            own = [record for record in records if (record.annealing != "constant") == annealed]
            _line(axes, own, lambda record: record.alpha, value, look)
    _from_zero(panels[0])
    _explain_below(figure, panels[0])
    return figure


def fig6(records: Sequence[Record]) -> Figure:
    """Draw the KL against the receptive field of a convolutional top net, a line for each alpha."""
    usable = [record for record in records if record.receptive_field is not None]
    if not usable:
        return message("No run with a convolutional top net has been evaluated.")
    figure = new_figure(6.4, 4.0)
    axes = dress(figure.add_subplot(), "receptive field of the top net (characters)", KL)
    looks = [(BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":")]
    for position, alpha in enumerate(sorted({record.alpha for record in usable})):
        own = [record for record in usable if record.alpha == alpha]
        look = looks[position % len(looks)]
        _line(
            axes,
            own,
            lambda record: float(record.receptive_field or 0),
            lambda record: record.kl,
            (f"alpha = {alpha:g}", *look),
        )
    _from_zero(axes)
    axes.set_xticks(sorted({record.receptive_field for record in usable if record.receptive_field}))
    explain(axes)
    return figure


def tweets(records: Sequence[Record]) -> Figure:
    """Draw reconstruction, KL and negative ELBO of both models against the share of input bytes that are dropped."""
    usable = [record for record in records if has_latent(record.model)]
    if not usable:
        return message(NOTHING)
    figure = new_figure(11.0, 3.8)
    panels = figure.subplots(1, 3)
    values: list[tuple[str, Value]] = [
        ("reconstruction (nats per sample)", lambda record: record.reconstruction),
        (KL, lambda record: record.kl),
        ("negative ELBO (nats per sample)", lambda record: record.bound),
    ]
    for axes, (name, value) in zip(panels, values, strict=True):
        dress(axes, "input dropout", name)
        _lines_by_model(axes, usable, lambda record: record.input_dropout, value)
        axes.set_xticks(sorted({record.input_dropout for record in usable}))
    _from_zero(panels[1])
    _explain_below(figure, panels[0])
    return figure


DRAWN: dict[str, Callable[[Sequence[Record]], Figure]] = {
    "paper_fig3": fig3,
    "paper_fig4": fig4,
    "paper_fig5": fig5,
    "paper_fig6": fig6,
    "paper_tweets": tweets,
}
"""The figure of each search space of the paper."""


# --------------------------------------------------------------------------------------------- parts


def _lines_by_model(axes: Axes, records: Sequence[Record], x: Value, y: Value) -> None:
    for model in sorted({record.model for record in records}, key=_order):
        _line(axes, [record for record in records if record.model == model], x, y, model_look(model))


def _order(model: str) -> tuple[int, str]:
    """Return the sort key of a model: registered models first, in the order of registration."""
    known = list(known_models())
    return (known.index(model) if model in known else len(known)), model


def _line(axes: Axes, records: Iterable[Record], x: Value, y: Value, look: tuple[str, str, str, str]) -> None:
    """Draw a line through the mean at each x; every run is a point, hollow if it did not reach its last step."""
    label, colour, marker, line = look
    points: dict[float, list[float]] = defaultdict(list)
    for record in records:
        points[x(record)].append(y(record))
        done = record.step >= record.steps
        face: dict[str, Any] = {"facecolor": colour if done else "white"}
        axes.scatter(x(record), y(record), s=30, marker=marker, edgecolor=colour, linewidths=1.2, zorder=3, **face)
    if points:
        positions = sorted(points)
        means = [float(np.mean(points[position])) for position in positions]
        axes.plot(positions, means, color=colour, linestyle=line, linewidth=1.6)
        # the legend shows line and marker together; the line itself has none, since some points are hollow
        axes.plot([], [], color=colour, linestyle=line, linewidth=1.6, marker=marker, markersize=5, label=label)


def _from_zero(axes: Axes) -> None:
    """Start the y axis just below 0, so that a KL of 0 is visible."""
    high = axes.get_ylim()[1]
    axes.set_ylim(-0.03 * high, high)


def _explain_below(figure: Figure, axes: Axes) -> None:
    """Add a legend for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
