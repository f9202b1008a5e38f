"""Figure of the hyperparameters' importance: Optuna's fANOVA over the trials of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from raytrain.analysis.figures.records import TrialRow, ranked
from raytrain.analysis.figures.style import BLUE, SKY, dress, explain, message, new_figure, plain, short

MIN_TRIALS = 8
"""Fewest evaluated trials. With less, a share of the variance would be noise."""


MOST_TRIALS = 300
"""Most evaluated trials that it is computed from: its time grows with the square of their number."""


@dataclass(frozen=True)
class Importance:
    """The share of the variance of the negative ELBO that a parameter explains."""

    name: str
    share: float
    num_trials: int
    """Evaluated trials that have the parameter, of those that it was computed from."""
    conditional: bool
    """True if some trials do not have it. Its share is then computed among those that do."""


def importances(study: optuna.Study) -> list[Importance]:
    """Return the importance of every parameter for the first objective of a study, the largest first.

    Empty if there are fewer than ``MIN_TRIALS`` evaluated trials, or if nothing varies. A parameter that only some
    trials have is assessed among those, if they are enough. Of more than ``MOST_TRIALS`` as many are taken, evenly
    spaced over the search.
    """
    # a warm start from outside the space has no parameters
    trials = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if trial.params]
    if len(trials) > MOST_TRIALS:
        trials = [trials[number * len(trials) // MOST_TRIALS] for number in range(MOST_TRIALS)]
        study = optuna.create_study(directions=study.directions)
        study.add_trials(trials)
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    having = {name: [trial for trial in trials if name in trial.params] for name in names}
    enough = [name for name in names if len(having[name]) >= MIN_TRIALS]
    common = [name for name in enough if len(having[name]) == len(trials)]
    found: dict[str, float] = {}
    for chosen in [common, *([*common, name] for name in enough if name not in common)]:
        owners = [trial for trial in trials if all(name in trial.params for name in chosen)]
        if not chosen or len({trial.values[0] for trial in owners}) < 2:
            continue  # without any variance there is nothing to share
        shares = get_param_importances(
            study,
            evaluator=FanovaImportanceEvaluator(seed=0),
            params=chosen,
            target=lambda trial: float(trial.values[0]),
        )
        found.update({name: float(share) for name, share in shares.items() if name not in found})
    every = [Importance(name, share, len(having[name]), name not in common) for name, share in found.items()]
    return sorted(every, key=lambda entry: -entry.share)


def rebuild_study(rows: Sequence[TrialRow]) -> optuna.Study:
    """Make a study with the parameters and bits per byte of all evaluated trials."""

    def kinds(values: list[Any]) -> BaseDistribution:
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            low, high = min(map(float, values)), max(map(float, values))
            return FloatDistribution(low, high, log=low > 0 and high / low >= 8)
        return CategoricalDistribution(sorted({str(value) for value in values}))

    scored = [row for row in ranked(rows) if row.status != "failed"]
    names = list(dict.fromkeys(name for row in scored for name in row.parameters))
    spaces = {name: kinds([row.parameters[name] for row in scored if name in row.parameters]) for name in names}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for row in scored:
        values = {
            name: float(value) if isinstance(spaces[name], FloatDistribution) else str(value)
            for name, value in row.parameters.items()
        }
        study.add_trial(
            optuna.trial.create_trial(
                params=values, distributions={name: spaces[name] for name in values}, value=row.bits_per_byte
            )
        )
    return study


def importance(rows: Sequence[TrialRow], study: optuna.Study | None = None) -> Figure:
    """Draw bars of the importance of each hyperparameter, or a sentence where there are too few trials.

    ``study`` is the search's own, if at hand: it knows the scale of each parameter.
    """
    scored = [row for row in ranked(rows) if row.status != "failed" and row.parameters]
    if len(scored) < MIN_TRIALS:
        return message(
            f"The importance of hyperparameters needs at least {MIN_TRIALS} evaluated trials; there are {len(scored)}."
        )
    found = importances(rebuild_study(scored) if study is None else study)
    if not found:
        return message("Nothing varies over the evaluated trials: no parameter has an importance.")
    figure = new_figure(7.0, 1.2 + 0.36 * len(found))
    taken = f"{MOST_TRIALS} of {len(scored)}" if len(scored) > MOST_TRIALS else len(scored)
    axes = dress(figure.add_subplot(), f"share of the variance of the negative ELBO (fANOVA, {taken} trials)", "")
    colours = [SKY if entry.conditional else BLUE for entry in found]
    bars = axes.barh([plain(short(entry.name, 24)) for entry in found], [entry.share for entry in found], color=colours)
    axes.bar_label(bars, [f"{entry.share:.2f}" for entry in found], padding=3, fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.12 * max(max(entry.share for entry in found), 0.05))
    if any(entry.conditional for entry in found):
        handles = [Patch(color=BLUE, label="in all trials"), Patch(color=SKY, label="among trials that have it")]
        explain(axes, handles)
    return figure
