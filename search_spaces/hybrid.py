"""Search space of the hybrid: KL annealing, feature maps, auxiliary loss, code size, dropout, step size.

A search space is a module with a function ``space(trial)``. The function draws values from an Optuna trial, as many and
as conditionally as it likes, and returns the fields of the run's config that they set.
"""

from __future__ import annotations

from typing import Any

import optuna

MAPS = {
    "64-128": ([64, 128], [128, 64]),
    "128-256": ([128, 256], [128, 128]),
    "64-128-128": ([64, 128, 128], [128, 128, 64]),
    "128-128-128": ([128, 128, 128], [128, 128, 128]),
}
"""Encoder and decoder widths by name: two or three convolutions."""


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Return the fields of a trial; annealing ends by half of the steps at the latest."""
    fields: dict[str, Any] = {
        "objective.annealing": trial.suggest_categorical("annealing", ["constant", "linear", "sigmoid", "cyclical"])
    }
    if fields["objective.annealing"] != "constant":
        fields["objective.start"] = trial.suggest_float("start", 0.0, 0.1)
        fields["objective.end"] = trial.suggest_float("end", 0.15, 0.5)
    if fields["objective.annealing"] == "cyclical":
        fields["objective.cycles"] = trial.suggest_int("cycles", 2, 4)
    encoder, decoder = MAPS[trial.suggest_categorical("maps", list(MAPS))]
    return fields | {
        "objective.free_bits": trial.suggest_categorical("free_bits", [0.0, 2.0, 5.0]),
        "objective.alpha": trial.suggest_float("alpha", 0.0, 0.5),
        "objective.input_dropout": trial.suggest_float("input_dropout", 0.0, 0.3),
        "model.feature_maps": encoder,
        "model.decoder_maps": decoder,
        "model.latent": trial.suggest_categorical("latent", [16, 32, 64]),
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 1e-3, 8e-3, log=True),
    }
