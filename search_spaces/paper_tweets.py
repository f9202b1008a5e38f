"""The paper's tweets (slides): reconstruction and KL by input dropout, for the hybrid and the LSTM VAE."""

from __future__ import annotations

from typing import Any

import optuna

from raytrain.config.presets import SMALL_BUDGET

MODELS = ("hybrid", "lstm_vae")
PRESET = "paper-tweets"
ALGORITHM = "grid"
BUDGETS = {"paper": {}, "small": SMALL_BUDGET | {"objective.start": 0.05, "objective.end": 0.4}}
DROPOUTS = {"paper": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], "small": [0.0, 0.2, 0.5]}


def space(trial: optuna.Trial, budget: str) -> dict[str, Any]:
    """Return the fields of a trial: every input dropout with both models."""
    fields = {"objective.input_dropout": trial.suggest_categorical("input_dropout", DROPOUTS[budget])}
    fields["model"] = trial.suggest_categorical("model", list(MODELS))
    if budget == "small":
        fields |= {"model.hidden": 256, "model.latent": 32}
        if fields["model"] == "hybrid":
            fields |= {"model.feature_maps": [64, 128, 128], "model.decoder_maps": [128, 128, 64]}
    return fields
