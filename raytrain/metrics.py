"""What a search looks for: which trial is better than which, and which may win."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Objective = Literal["bound", "nll", "pareto"]
METRIC = "bits_per_byte"
"""The full bound on the same validation samples, whatever a trial's annealing."""
LIKELIHOOD = "nll_bits_per_byte"
"""The importance-weighted estimate of the negative log-likelihood, on the same samples and with the same noise."""
DRAWS = 8
"""Draws of z for that estimate: each costs about as much as another evaluation."""
COLLAPSED_KL = 0.1
"""Nats per sample below which a latent code says practically nothing."""
INFEASIBLE_PENALTY = 1000.0
"""Bits per byte by which a trial without the KL that is asked for is behind all that have it."""


@dataclass(frozen=True)
class SearchObjective:
    """``bound``: the lowest bound. ``nll``: the lowest importance-weighted estimate. ``pareto``: a low bound and a
    large KL at once; of those that no other beats in both, the winner is the one with the lowest bound."""

    objective: Objective = "bound"
    min_kl: float = 0.0
    """Nats per sample of KL without which a trial is no winner."""

    @property
    def metric(self) -> str:
        """The figure that trials are compared on."""
        return LIKELIHOOD if self.objective == "nll" else METRIC

    @property
    def draws(self) -> int:
        """Draws of z at each evaluation, beyond the one for the bound."""
        return DRAWS if self.objective == "nll" else 0

    def reached(self, figures: Mapping[str, float]) -> bool:
        """Whether a trial with these figures may win."""
        enough = not self.min_kl or figures.get("kl", 0.0) >= self.min_kl
        return math.isfinite(figures.get(self.metric, math.nan)) and enough

    def score(self, figures: Mapping[str, float]) -> float:
        """What is minimised: the metric; behind all others, by what it lacks, where the KL is too small.

        It is a penalty and no constraint because those who are told of it (ASHA, TPE, the order of the table)
        look only at which of two values is lower. Infinite where there is no figure.
        """
        value = figures.get(self.metric, math.nan)
        if not math.isfinite(value):
            return math.inf
        return value if self.reached(figures) else INFEASIBLE_PENALTY + self.min_kl - figures.get("kl", 0.0)

    def values(self, figures: Mapping[str, float]) -> list[float]:
        """What Optuna is told: bound and KL for ``pareto``, otherwise the score."""
        return [figures[METRIC], figures["kl"]] if self.objective == "pareto" else [self.score(figures)]

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Of ``values``, as Optuna names them."""
        return ["minimize", "maximize"] if self.objective == "pareto" else ["minimize"]

    def __str__(self) -> str:
        words = {
            "bound": "lowest bound",
            "nll": f"lowest negative log-likelihood ({DRAWS} draws)",
            "pareto": "low bound and large KL",
        }
        return words[self.objective] + (f", KL of at least {self.min_kl:g} nats" if self.min_kl else "")


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the points (bound, KL) no other beats in both a lower bound and a larger KL, by rising bound."""
    kept: list[int] = []
    # of equal bounds the one with the larger KL comes first
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1], index)):
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return kept


FIGURES = ("bound", METRIC, "reconstruction", "kl", "active_units")
"""What is kept of a trial's best evaluation ..."""
LIKELIHOODS = ("nll", LIKELIHOOD)
"""... and of one that also estimates the likelihood."""
RUNG = "comparable_step"
"""A run's step as the scheduler of a search sees it: reported only while the run may be stopped."""
