"""Figure 4 of the paper: bits per character and KL against sample length, for the hybrid and the LSTM VAE.

A plain LSTM language model of the same size runs beside them. Where the LSTM VAE's KL is zero and its negative ELBO is
that of the language model, the posterior has collapsed. Where its negative ELBO is far above, it has only not been
trained for long.
"""

from __future__ import annotations

from typing import Any

import optuna

from raytrain.config.presets import SMALL_BUDGET

MODELS = ("hybrid", "lstm_vae", "byte_lstm")
PRESET = "paper-ptb"
ALGORITHM = "grid"
BUDGETS = {"paper": {}, "small": SMALL_BUDGET | {"objective.start": 0.05, "objective.end": 0.4}}
LENGTHS = {"paper": [12, 24, 36, 48, 60], "small": [24, 48, 60]}


def space(trial: optuna.Trial, budget: str) -> dict[str, Any]:
    """Return the fields of a trial: every length with every model."""
    fields = {"length": trial.suggest_categorical("length", LENGTHS[budget])}
    fields["model"] = trial.suggest_categorical("model", list(MODELS))
    if budget == "small":
        fields["model.hidden"] = 256
        if fields["model"] != "byte_lstm":
            fields["model.latent"] = 32
        if fields["model"] == "hybrid":
            fields |= {"model.feature_maps": [64, 128], "model.decoder_maps": [128, 64]}
    return fields
