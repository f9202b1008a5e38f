"""Figure of the hyperparameters' importance: Optuna's fANOVA over the trials of a search."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from raytrain.analysis.figures.records import TrialRow, evenly, is_logarithmic, ranked
from raytrain.analysis.figures.style import BLUE, INK, SKY, dress, explain, message, new_figure, plain, short

MIN_TRIALS = 8
"""Minimum number of evaluated trials. With fewer, a share of the variance would be noise."""


MOST_TRIALS = 300
"""Maximum number of evaluated trials it is computed from: its time grows with the square of their number."""
SUBSETS, MOST_IN_SUBSET, TREES_OF_SUBSET = 20, 75, 16
"""Number of random subsets of the trials for an interval, maximum trials of each, and trees of its forest."""
FEWEST_IN_SUBSET = 4
"""Fewest trials of a subset that have a parameter. With fewer, the subset says nothing about it."""


@dataclass(frozen=True)
class Importance:
    """The share of the variance of the negative ELBO that a parameter explains."""

    name: str
    share: float
    num_trials: int
    """Number of trials that have the parameter, among those that it was computed from."""
    conditional: bool
    """True if some trials do not have the parameter. Its share is then computed among those that do."""
    error: float = math.nan
    """Standard error of the share over other trials of the same search space; NaN where it is not known."""

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95% interval of the share, which lies between 0 and 1; equal where the error is not known."""
        half = 0.0 if math.isnan(self.error) else 1.96 * self.error
        return max(0.0, self.share - half), min(max(1.0, self.share), self.share + half)


def importances(study: optuna.Study) -> list[Importance]:
    """Return the importance of every parameter for the first objective of a study, the largest first.

    The list is empty if there are fewer than ``MIN_TRIALS`` evaluated trials, or if nothing varies. A parameter that
    only some trials have is assessed among those, if they are enough. If there are more than ``MOST_TRIALS``, that many
    are taken, evenly spaced over the search.

    The error is that of a jackknife: the standard deviation over random subsets of m of the n trials, times the square
    root of m / (n - m) (Shao and Wu 1989, delete-d jackknife). It covers the variation of the trials and of the forest.
    A search that has learnt where to look does not sample the whole space, so the error is not that of the whole space.
    """
    # a warm start from outside the space has no parameters
    trials = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if trial.params]
    trials = list(evenly(trials, MOST_TRIALS))
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    having = {name: sum(name in trial.params for trial in trials) for name in names}
    enough = [name for name in names if having[name] >= MIN_TRIALS]
    common = [name for name in enough if having[name] == len(trials)]
    groups = [common, *([*common, name] for name in enough if name not in common)]
    found = _shares(trials, groups, MIN_TRIALS, FanovaImportanceEvaluator(seed=0))
    errors = _errors(trials, groups) if found else {}
    every = [
        Importance(name, share, having[name], name not in common, errors.get(name, math.nan))
        for name, share in found.items()
    ]
    return sorted(every, key=lambda entry: -entry.share)


def _shares(
    trials: Sequence[FrozenTrial], groups: Sequence[Sequence[str]], fewest: int, evaluator: FanovaImportanceEvaluator
) -> dict[str, float]:
    """Return the share of each parameter in the first group that has it, among trials that have the whole group.

    Groups that fewer than ``fewest`` trials have, or over whose trials nothing varies, are left out.
    """
    study = optuna.create_study(directions=["minimize"] * len(trials[0].values) if trials else None)
    study.add_trials(trials)
    found: dict[str, float] = {}
    for group in groups:
        owners = [trial for trial in trials if all(name in trial.params for name in group)]
        if not group or len(owners) < fewest or len({trial.values[0] for trial in owners}) < 2:
            continue  # without variance there is nothing to share
        try:
            shares = get_param_importances(
                study, evaluator=evaluator, params=list(group), target=lambda trial: float(trial.values[0])
            )
        except RuntimeError:  # no tree has found a split: a few trials may all be at one point
            continue
        found.update({name: float(share) for name, share in shares.items() if name not in found})
    return found


def _errors(trials: Sequence[FrozenTrial], groups: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the standard error of the share of each parameter that enough subsets of the trials have."""
    size = min(len(trials) // 2, MOST_IN_SUBSET)
    chance, found = random.Random(0), list[dict[str, float]]()
    for number in range(SUBSETS):
        evaluator = FanovaImportanceEvaluator(n_trees=TREES_OF_SUBSET, seed=number)
        found.append(_shares(chance.sample(trials, size), groups, FEWEST_IN_SUBSET, evaluator))
    scale = math.sqrt(size / (len(trials) - size))
    values = {name: [shares[name] for shares in found if name in shares] for group in groups for name in group}
    return {name: scale * statistics.stdev(each) for name, each in values.items() if len(each) > SUBSETS // 2}


def rebuild_study(rows: Sequence[TrialRow]) -> optuna.Study:
    """Make a study with the parameters and bits per byte of all evaluated trials."""

    def kinds(values: list[Any]) -> BaseDistribution:
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            numbers = list(map(float, values))
            return FloatDistribution(min(numbers), max(numbers), log=is_logarithmic(numbers))
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
    figure = new_figure(8.4, 1.2 + 0.36 * len(found))
    taken = f"{MOST_TRIALS} of {len(scored)}" if len(scored) > MOST_TRIALS else len(scored)
    share = f"share of the variance of the negative ELBO (fANOVA, {taken} trials; 95% interval)"
    axes = dress(figure.add_subplot(), share, "")
    colours = [SKY if entry.conditional else BLUE for entry in found]
    axes.barh([plain(short(entry.name, 24)) for entry in found], [entry.share for entry in found], color=colours)
    for place, entry in enumerate(found):
        low, high = entry.interval
        axes.plot([low, high], [place, place], color=INK, linewidth=1.2, marker="|", markersize=6)
        text = f"{entry.share:.2f}" + ("" if math.isnan(entry.error) else f" ({low:.2f} to {high:.2f})")
        axes.annotate(text, (high, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.5 * max(*(entry.interval[1] for entry in found), 0.05))
    if any(entry.conditional for entry in found):
        handles = [Patch(color=BLUE, label="in all trials"), Patch(color=SKY, label="among trials that have it")]
        explain(axes, handles)
    return figure
