"""Search space of the byte LSTM: layers, width, dropout, step size."""

from __future__ import annotations

from typing import Any

import optuna

START = {"layers": 1, "hidden": 256, "dropout": 0.0, "learning_rate": 1.6e-2}
"""The preset ``laptop``."""


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Return the fields of a trial."""
    return {
        "model.layers": trial.suggest_int("layers", 1, 2),
        "model.hidden": trial.suggest_categorical("hidden", [128, 192, 256]),
        "model.dropout": trial.suggest_float("dropout", 0.0, 0.2),
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 8e-3, 2.4e-2, log=True),
    }
