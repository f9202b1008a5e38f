"""Search space for schedules that are learnt: what may change while a model is trained, for ``--algorithm pbt``.

KL weight and learning rate begin constant: their shape over the steps is what the population finds.
"""

from __future__ import annotations

from typing import Any

import optuna

MODELS = ("hybrid",)
ALGORITHM = "pbt"


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Return the fields of a trial."""
    return {
        "objective.annealing": "constant",
        "objective.weight": trial.suggest_float("weight", 0.05, 1.0, log=True),
        "objective.alpha": trial.suggest_float("alpha", 0.02, 2.0, log=True),
        "objective.alpha_end": 0.0,
        "objective.input_dropout": trial.suggest_float("input_dropout", 0.0, 0.2),
        "optimizer.schedule": "constant",
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 5e-4, 2.4e-2, log=True),
    }
