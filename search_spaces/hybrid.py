"""Search space of the hybrid: KL annealing, feature maps, code, auxiliary loss, dropout, step size.

A search space is a module with a function ``space(trial)``. The function draws values from an Optuna trial, as many and
as conditionally as it likes, and returns the fields of the run's config that they set.
"""

from __future__ import annotations

import math
from typing import Any

import optuna

MAPS = {
    "16-32": ([16, 32], [32, 16]),
    "32-64": ([32, 64], [64, 32]),
    "32-64-64": ([32, 64, 64], [64, 64, 32]),
}
"""Encoder and decoder widths by name: two or three convolutions."""
START = {
    "annealing": "constant",
    "maps": "16-32",
    "latent": 8,
    "least_kl": 1.96,
    "alpha": 1.0,
    "alpha_end": 0.4,
    "input_dropout": 0.0,
    "learning_rate": 1.6e-2,
}
"""The preset ``laptop``."""


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Return the fields of a trial; annealing ends before the auxiliary loss does, and both by half of the steps.

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
    encoder, decoder = MAPS[trial.suggest_categorical("maps", list(MAPS))]
    latent = trial.suggest_categorical("latent", [8, 16])
    return fields | {
        "objective.alpha": trial.suggest_float("alpha", 0.5, 1.5),
        "objective.alpha_end": trial.suggest_float("alpha_end", 0.3, 0.5),
        "objective.input_dropout": trial.suggest_float("input_dropout", 0.0, 0.05),
        "model.feature_maps": encoder,
        "model.decoder_maps": decoder,
        "model.latent": latent,
        "model.mean_norm": math.sqrt(2 * trial.suggest_float("least_kl", 1.8, 3.0) / latent),
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 8e-3, 2.4e-2, log=True),
    }
