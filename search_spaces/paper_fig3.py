"""Figure 3 of the paper: autoencoders that see no history (no KL, every input byte dropped), by sample length.

Where the decoder gets nothing but z, the LSTM fails to fit longer samples and the deconvolutions do not.
"""

from __future__ import annotations

from typing import Any

import optuna

from raytrain.config.presets import SMALL_BUDGET

MODELS = ("hybrid", "lstm_vae")
PRESET = "paper-ptb"
ALGORITHM = "grid"
BUDGETS = {"paper": {}, "small": SMALL_BUDGET | {"log_every": 25}}
LENGTHS = {"paper": [10, 20, 30, 50, 75, 100], "small": [10, 30, 60]}
NO_HISTORY = {"objective.annealing": "constant", "objective.weight": 0.0, "objective.input_dropout": 1.0}


def space(trial: optuna.Trial, budget: str) -> dict[str, Any]:
    """Return the fields of a trial: every length with both models."""
    fields = {"length": trial.suggest_categorical("length", LENGTHS[budget])}
    fields["model"] = trial.suggest_categorical("model", list(MODELS))
    if fields["model"] == "hybrid":
        # the reconstruction of the whole decoder is compared
        fields["objective.alpha"] = 0.0
    if budget == "small":
        fields |= {"model.hidden": 256, "model.latent": 64}
    return fields | NO_HISTORY
