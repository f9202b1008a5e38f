"""Figure of a learnt schedule: the fields that change during a run, over its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from raytrain.analysis.figures.style import BLUE, GREY, INK, dress, in_steps, message, new_figure
from raytrain.config.schedules import auxiliary_weight, kl_weight, learning_rate
from raytrain.config.schema import RunConfig, flatten, in_force

POINTS = 400
"""Number of points of a curve between two changes."""
SHAPED: dict[str, tuple[str, Callable[[RunConfig[Any], int], float]]] = {
    "objective.weight": ("KL weight", lambda config, step: kl_weight(config.objective, step, config.steps)),
    "objective.alpha": ("alpha", lambda config, step: auxiliary_weight(config.objective, step, config.steps)),
    "optimizer.learning_rate": (
        "learning rate",
        lambda config, step: learning_rate(config.optimizer, step, config.steps),
    ),
}
"""Fields that scale a shape over the steps: label, and value at a step."""


def learnt_schedule(config: RunConfig[Any]) -> Figure:
    """Draw every field that changes during a run of ``config``, each in a panel of its own."""
    names = sorted({change.field for change in config.changes})
    if not names:
        return message("Nothing changes during the run but by the shapes of its config.")
    figure = new_figure(7.6, 0.9 + 1.5 * len(names))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    times = sorted({change.step for change in config.changes if change.step < config.steps})
    for axes, name in zip(panels, names, strict=True):
        label, value = SHAPED.get(name, (name.rpartition(".")[2].replace("_", " "), _plain(name)))
        dress(axes, "", label)
        for begin, end in zip([0, *times], [*times, config.steps], strict=True):
            steps = np.unique(np.linspace(begin, end - 1, POINTS).round()).astype(int)
            held = in_force(config, begin)
            axes.plot([*steps, end], [*(values := [value(held, int(step)) for step in steps]), values[-1]], color=BLUE)
        for step in times:
            axes.axvline(step, color=GREY, linewidth=0.6, linestyle=":")
        axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("training step", fontsize=9.5, color=INK)
    in_steps(panels[-1])
    figure.align_ylabels()
    return figure


def _plain(name: str) -> Callable[[RunConfig[Any], int], float]:
    return lambda config, step: float(flatten(config)[name])
