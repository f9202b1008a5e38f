"""A search space of your own: code size, auxiliary loss and learning rate of the hybrid.

    python -m raytrain.tune hybrid --space examples/custom_space.py --num-samples 4

A space is a module with a function ``space(trial)``. It draws values from an Optuna trial, as conditionally as it
likes, and returns the fields of the run's config that they set: those that ``python -m raytrain.train hybrid --help``
lists.
"""

from __future__ import annotations

from typing import Any

import optuna

MODELS = ("hybrid",)
BUDGETS = {
    "minutes": {"steps": 400, "evaluate_every": 100, "checkpoint_every": 200},
    "hours": {"steps": 20_000, "evaluate_every": 1_000, "checkpoint_every": 1_000},
}
"""Budget by name: fields of every trial. The first is the default; ``--budget hours`` chooses the other."""


def space(trial: optuna.Trial, budget: str) -> dict[str, Any]:
    """Return the fields of one trial; annealing is searched only where the budget leaves time for it."""
    fields: dict[str, Any] = {
        "model.latent": trial.suggest_categorical("latent", [8, 16, 32]),
        "objective.alpha": trial.suggest_float("alpha", 0.0, 1.0),
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True),
    }
    if budget == "hours":
        fields["objective.annealing"] = "linear"
        fields["objective.end"] = trial.suggest_float("annealing_end", 0.1, 0.5)
    else:
        fields["objective.annealing"] = "constant"
    return fields
