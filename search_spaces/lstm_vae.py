"""Search space of the LSTM VAE: KL annealing, code, input dropout, width, step size."""

from __future__ import annotations

import math
from typing import Any

import optuna

START = {
    "annealing": "constant",
    "latent": 8,
    "least_kl": 1.96,
    "input_dropout": 0.0,
    "hidden": 256,
    "learning_rate": 1.2e-2,
}
"""The preset ``laptop``."""


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Return the fields of a trial; annealing ends by 0.3 of the steps at the latest.

    The code is normalised, so that its KL is at least ``least_kl`` nats, however it is annealed.
    """
    fields: dict[str, Any] = {
        "objective.annealing": trial.suggest_categorical("annealing", ["constant", "linear", "sigmoid", "cyclical"])
    }
    if fields["objective.annealing"] != "constant":
        fields["objective.start"] = trial.suggest_float("start", 0.0, 0.1)
        fields["objective.end"] = trial.suggest_float("end", 0.15, 0.3)
    if fields["objective.annealing"] == "cyclical":
        fields["objective.cycles"] = trial.suggest_int("cycles", 2, 4)
    latent = trial.suggest_categorical("latent", [8, 16])
    return fields | {
        "objective.input_dropout": trial.suggest_float("input_dropout", 0.0, 0.2),
        "model.latent": latent,
        "model.mean_norm": math.sqrt(2 * trial.suggest_float("least_kl", 1.8, 3.0) / latent),
        "model.hidden": trial.suggest_categorical("hidden", [128, 192, 256]),
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 6e-3, 1.8e-2, log=True),
    }
