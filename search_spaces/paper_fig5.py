"""Figure 5 of the paper: KL and negative ELBO of the hybrid against alpha, with and without KL annealing (S = 60)."""

from __future__ import annotations

from typing import Any

import optuna

from raytrain.config.presets import SMALL_BUDGET

MODELS = ("hybrid",)
PRESET = "paper-ptb"
ALGORITHM = "grid"
BUDGETS = {"paper": {}, "small": SMALL_BUDGET | {"objective.start": 0.05, "objective.end": 0.4, "model.hidden": 256}}
ALPHAS = {"paper": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], "small": [0.1, 0.4, 0.7, 1.0]}


def space(trial: optuna.Trial, budget: str) -> dict[str, Any]:
    """Return the fields of a trial: every alpha with linear annealing and with a constant weight of 1."""
    return {
        "objective.alpha": trial.suggest_categorical("alpha", ALPHAS[budget]),
        "objective.annealing": trial.suggest_categorical("annealing", ["linear", "constant"]),
    }
