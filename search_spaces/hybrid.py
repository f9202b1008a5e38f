"""Search space of the hybrid: variance of the code or KL annealing, feature maps, auxiliary loss, dropout, step size.

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
    "variance": "fixed",
    "least_kl": 1.785,
    "maps": "16-32",
    "latent": 8,
    "alpha": 1.0,
    "alpha_end": 0.4,
    "input_dropout": 0.0,
    "learning_rate": 1.6e-2,
}
"""The preset ``laptop``, but with a fixed variance: of all that was tried, it reads its code for the fewest bits."""


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Return the fields of a trial; annealing ends before the auxiliary loss does, and both by half of the steps.

    The code is normalised, so that its KL is at least ``least_kl`` nats. With a fixed variance it is just that many,
    however it is weighed: only where the variance is learnt is there something to anneal.
    """
    latent = trial.suggest_categorical("latent", [8, 16])
    least_kl = trial.suggest_float("least_kl", 1.6, 3.0)
    fields: dict[str, Any]
    if trial.suggest_categorical("variance", ["fixed", "learnt"]) == "fixed":
        capacity = math.sqrt(1 - math.exp(-2 * least_kl / latent))
        fields = {"model.fixed_variance": True, "model.mean_norm": capacity, "objective.annealing": "constant"}
    else:
        fields = {"model.mean_norm": math.sqrt(2 * least_kl / latent)} | annealing(trial)
    encoder, decoder = MAPS[trial.suggest_categorical("maps", list(MAPS))]
    return fields | {
        "objective.alpha": trial.suggest_float("alpha", 0.5, 1.5),
        "objective.alpha_end": trial.suggest_float("alpha_end", 0.3, 0.5),
        "objective.input_dropout": trial.suggest_float("input_dropout", 0.0, 0.05),
        "model.feature_maps": encoder,
        "model.decoder_maps": decoder,
        "model.latent": latent,
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 8e-3, 2.4e-2, log=True),
    }


def annealing(trial: optuna.Trial) -> dict[str, Any]:
    """Return the fields of a schedule of the KL weight."""
    kind = trial.suggest_categorical("annealing", ["constant", "linear", "sigmoid", "cyclical"])
    fields = {"objective.annealing": kind}
    if kind != "constant":
        fields["objective.start"] = trial.suggest_float("start", 0.0, 0.1)
        fields["objective.end"] = trial.suggest_float("end", 0.15, 0.3)
    if kind == "cyclical":
        fields["objective.cycles"] = trial.suggest_int("cycles", 2, 4)
    return fields
