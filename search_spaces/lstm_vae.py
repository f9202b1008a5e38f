"""Search space of the LSTM VAE: KL annealing, input dropout, width, step size."""

from __future__ import annotations

from typing import Any

import optuna


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Return the fields of a trial; annealing ends by half of the steps at the latest."""
    fields: dict[str, Any] = {
        "objective.annealing": trial.suggest_categorical("annealing", ["linear", "sigmoid", "cyclical"]),
        "objective.start": trial.suggest_float("start", 0.0, 0.2),
        "objective.end": trial.suggest_float("end", 0.25, 0.5),
    }
    if fields["objective.annealing"] == "cyclical":
        fields["objective.cycles"] = trial.suggest_int("cycles", 2, 4)
    return fields | {
        "objective.free_bits": trial.suggest_categorical("free_bits", [0.0, 2.0, 5.0]),
        "objective.input_dropout": trial.suggest_float("input_dropout", 0.0, 0.5),
        "model.hidden": trial.suggest_categorical("hidden", [128, 192, 256]),
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 1e-3, 8e-3, log=True),
    }
