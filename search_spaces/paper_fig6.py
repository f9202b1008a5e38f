"""Figure 6 of the paper: KL of the hybrid against the receptive field of a causal convolution in the LSTM's place."""

from __future__ import annotations

from typing import Any

import optuna

from raytrain.config.presets import SMALL_BUDGET

MODELS = ("hybrid",)
PRESET = "paper-ptb"
ALGORITHM = "grid"
BUDGETS = {"paper": {}, "small": SMALL_BUDGET | {"objective.start": 0.05, "objective.end": 0.4}}
LAYERS = {"paper": [1, 2, 3, 5, 7, 10], "small": [1, 3, 7]}


def space(trial: optuna.Trial, budget: str) -> dict[str, Any]:
    """Return the fields of a trial: every number of layers with every alpha.

    A layer adds one character to the receptive field.
    """
    return {
        "model.decoder": "bytenet",
        "model.hidden": 256,
        "model.decoder_layers": trial.suggest_categorical("layers", LAYERS[budget]),
        "objective.alpha": trial.suggest_categorical("alpha", [0.0, 0.2, 0.5]),
    }
