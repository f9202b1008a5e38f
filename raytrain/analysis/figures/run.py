"""Figures of one run: its losses over the steps, and its model on the validation split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from raytrain.analysis.figures.records import Curve
from raytrain.analysis.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PALE,
    SEQUENCE,
    VERMILION,
    dress,
    explain,
    in_steps,
    message,
    new_figure,
    plain,
)

Numbers = NDArray[np.float64]
TRAIN_LOOK = {"linewidth": 1.0, "alpha": 0.75}
VALID_LOOK = {"linewidth": 1.6, "marker": "o", "markersize": 3.5}


def losses(histories: Mapping[str, Curve]) -> Figure:
    """Draw the parts of the loss and the KL weight over the steps, in panels below one another.

    The parts are drawn per byte. The documents of a batch are of similar length, so nats per sample would show the
    lengths more than the learning.

    Args:
        histories: (step, value) of ``train/...`` and ``valid/...`` by metric; missing metrics are left out.
    """
    if not any(histories.values()):
        return message("The run has no metrics.")
    has_code = any(value > 0 for _, value in [*histories.get("valid/kl", []), *histories.get("train/kl", [])])
    figure = new_figure(7.6, 6.6 if has_code else 3.6)
    panels = figure.subplots(
        3 if has_code else 1, 1, sharex=True, squeeze=False, height_ratios=(2, 1.3, 0.8) if has_code else (1,)
    )[:, 0]
    title = "reconstruction and negative ELBO" if has_code else "negative log-likelihood"
    top = dress(panels[0], "", "bits per byte", title)
    lines = [("reconstruction", "reconstruction", BLUE)]
    if has_code:
        lines += [("auxiliary", "auxiliary", GREEN), ("bound", "negative ELBO", INK)]
    for name, label, colour in lines:
        for split, look in (("train", TRAIN_LOOK), ("valid", VALID_LOOK)):
            curve = _per_byte(histories, split, name)
            # a model without an auxiliary head reports zeros; the training ELBO is the sum of the curves drawn
            if any(value > 0 for _, value in curve) and (name, split) != ("bound", "train"):
                top.plot(*_xy(curve), color=colour, label=f"{label}, {split}", **look)
    explain(top)
    if has_code:
        middle = dress(panels[1], "", "KL (nats per sample)")
        for split, look in (("train", TRAIN_LOOK), ("valid", VALID_LOOK)):
            middle.plot(*_xy(histories.get(f"{split}/kl", [])), color=VERMILION, label=f"KL, {split}", **look)
        middle.set_ylim(bottom=0)
        explain(middle)
        bottom = dress(panels[2], "", "KL weight")
        weights = histories.get("train/kl_weight", [])
        bottom.plot(*_xy(weights), color=INK, linewidth=1.6)
        bottom.set_ylim(-0.05, 1.1 * max([1.0, *(value for _, value in weights)]))
    panels[-1].set_xlabel("training step", fontsize=9.5, color=INK)
    in_steps(panels[-1])
    figure.align_ylabels()
    return figure


def _per_byte(histories: Mapping[str, Curve], split: str, name: str) -> Curve:
    """Return a part of the loss in bits per byte, at the steps where the ELBO is known in nats and in bits."""
    nats, bits = (dict(histories.get(f"{split}/{key}", [])) for key in ("bound", "bits_per_byte"))
    return [
        (step, value * bits[step] / nats[step])
        for step, value in histories.get(f"{split}/{name}", [])
        if step in bits and nats.get(step, 0) > 0
    ]


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def bits_by_position(bits: Numbers, counts: Numbers) -> Figure:
    """Draw bits per byte at each position of the samples, and the share of samples that reach it.

    Args:
        bits: [length], the mean of -log2 p over the samples that reach the position, STOP included.
        counts: [length], the number of samples that reach it.
    """
    reached = counts > 0
    positions = np.arange(1, len(bits) + 1)[reached]
    figure = new_figure(7.0, 3.8)
    axes = dress(figure.add_subplot(), "position in the sample (bytes)", "bits at this position")
    axes.plot(positions, bits[reached], color=BLUE, linewidth=1.6, label="mean at the position", zorder=3)
    mean = float((bits * counts)[reached].sum() / counts.sum())
    axes.axhline(mean, color=INK, linewidth=1.0, linestyle="--", label=f"mean of all {mean:.3f}", zorder=2)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, positions[-1] + 1)
    if counts[reached].min() < counts.max():
        share = axes.twinx()
        share.fill_between(positions, counts[reached] / counts.max(), color=PALE, alpha=0.6, linewidth=0, step="mid")
        share.set_ylim(0, 1.05)
        share.set_ylabel("share of samples that reach it", fontsize=9.5, color=GREY)
        share.tick_params(labelsize=8.5, colors=GREY)
        share.spines[["top", "left", "bottom"]].set_visible(False)
        axes.set_zorder(share.get_zorder() + 1)
        axes.patch.set_visible(False)
    explain(axes, above=True)
    return figure


def kl_by_dimension(kl: Numbers, active: NDArray[np.bool_]) -> Figure:
    """Draw the KL of each latent dimension, the largest first; inactive dimensions are grey.

    Args:
        kl: [latent], nats per sample.
        active: [latent], true if the posterior mean varies over samples.
    """
    if len(kl) == 0:
        return message("A language model has no latent code.")
    order = np.argsort(-kl, kind="stable")
    figure = new_figure(7.0, 3.6)
    axes = dress(figure.add_subplot(), "latent dimension, by KL", "KL (nats per sample)")
    colours = [BLUE if flag else "#B5B5B5" for flag in active[order]]
    axes.bar(np.arange(1, len(kl) + 1), kl[order], color=colours, width=0.85)
    axes.set_xlim(0.3, len(kl) + 0.7)
    axes.set_title(
        f"{kl.sum():.2f} nats in total, {int(active.sum())} of {len(kl)} dimensions active",
        fontsize=10.5,
        loc="left",
        color=INK,
    )
    handles = [
        Line2D([], [], linestyle="", marker="s", color=colour, label=label)
        for colour, label in ((BLUE, "active"), ("#B5B5B5", "not active"))
    ]
    explain(axes, handles)
    return figure


def project(means: Numbers) -> tuple[Numbers, tuple[str, str]]:
    """Project posterior means [samples, latent] to 2-D; return the points and the names of the two axes.

    These are the first two principal components (by SVD), or the code itself if it has at most two dimensions.
    """
    if means.shape[1] <= 2:
        points = np.pad(means, ((0, 0), (0, 2 - means.shape[1])))
        return points, ("z1", "z2")
    centred = means - means.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    variance = singular**2
    shares = variance / variance.sum() if variance.sum() > 0 else np.zeros_like(variance)
    shares = np.pad(shares, (0, 2))
    names = (f"component 1 ({shares[0]:.0%} of variance)", f"component 2 ({shares[1]:.0%} of variance)")
    points = centred @ directions[:2].T
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1]))), names


def latent_space(means: Numbers, properties: Mapping[str, Sequence[float] | Sequence[bool]]) -> Figure:
    """Draw the codes of the validation samples in 2-D, once for each property, coloured by it.

    Args:
        means: [samples, latent], the means of q(z | x).
        properties: name -> one value per sample; booleans become two colours, numbers a scale.
    """
    if means.shape[1] == 0 or len(means) == 0:
        return message("A language model has no latent code.")
    points, names = project(means)
    figure = new_figure(0.6 + 4.6 * max(1, len(properties)), 4.3)
    panels = figure.subplots(1, max(1, len(properties)), squeeze=False)[0]
    for axes, (name, values) in zip(panels, properties.items(), strict=False):
        dress(axes, *names, title=plain(name))
        if all(isinstance(value, (bool, np.bool_)) for value in values):
            for flag, label, colour, marker in ((False, "no", BLUE, "o"), (True, "yes", VERMILION, "^")):
                chosen = np.array(values, dtype=bool) == flag
                axes.scatter(*points[chosen].T, s=9, color=colour, marker=marker, alpha=0.6, linewidths=0, label=label)
            explain(axes)
        else:
            dots = axes.scatter(*points.T, c=list(values), cmap=SEQUENCE, s=9, alpha=0.8, linewidths=0)
            bar = figure.colorbar(dots, ax=axes, pad=0.02, aspect=30)
            bar.ax.tick_params(labelsize=8)
    return figure
