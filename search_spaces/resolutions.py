"""Resolutions of a text for a language model: bytes, characters, or pieces by byte-pair encoding.

    python -m raytrain.tune --space resolutions --data FILE

All trials read as many documents, which take a model of many pieces more time: benchmarks/resolutions.py compares the
resolutions at equal time, equal operations and equal text.
"""

from __future__ import annotations

from typing import Any

import optuna

MODELS = ("byte_lstm",)
PRESET = "laptop"
ALGORITHM = "grid"
DOCUMENTS = {"sampling": "documents", "length": 201, "evaluate_every": 500, "checkpoint_every": 500}
BUDGETS = {
    "small": DOCUMENTS | {"steps": 1500},
    "large": DOCUMENTS | {"steps": 30_000, "model.hidden": 512, "model.dropout": 0.2},
}
VOCABULARIES = {
    "small": ["byte", "char", "bpe:1024", "bpe:4096"],
    "large": ["byte", "char", "bpe:1024", "bpe:4096", "bpe:16384"],
}
RATES = {"small": [8e-3, 1.6e-2], "large": [2e-3, 4e-3]}


def space(trial: optuna.Trial, budget: str) -> dict[str, Any]:
    """Return the fields of a trial: every vocabulary with every learning rate."""
    return {
        "vocabulary": trial.suggest_categorical("vocabulary", VOCABULARIES[budget]),
        "optimizer.learning_rate": trial.suggest_categorical("learning_rate", RATES[budget]),
    }
