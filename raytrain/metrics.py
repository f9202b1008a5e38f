"""Metrics of an evaluation, and the objective by which a search compares its trials.

A leaf: it imports nothing of the package, so that every module can use it. Tables, model cards, reports, the Parquet
table of trials and MLflow's view of them take their columns from ``METRICS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")

METRIC = "bits_per_byte"
"""The negative ELBO on the same validation samples, with a KL weight of 1 whatever a trial's annealing."""
LIKELIHOOD = "nll_bits_per_byte"
"""The importance-weighted estimate of the negative log-likelihood, on the same samples and with the same noise."""
COLLAPSED = 0.1
"""Nats per sample. A code that is used less has collapsed: the decoder practically ignores it."""
RUNG = "comparable_step"
"""Key under which a trial reports its step to the scheduler of a search: only while it may be stopped."""


# ------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Metric:
    """A number that evaluations report, and how it is shown."""

    key: str
    """Its name in evaluations and records. MLflow has it as ``valid/KEY`` and, of the best evaluation, ``best/KEY``."""
    label: str
    """Heading of its column."""
    unit: str
    digits: int
    """Decimal places in tables."""
    better: Literal["lower", "higher", "neither"]
    shown: bool = True
    """Whether tables, reports and MLflow's view have a column for it; records and the Parquet table always do."""
    compute: Callable[[Any, Mapping[str, float]], float] | None = None
    """For a metric that is added from outside: its value, from the model and the metrics of an evaluation.

    Called as ``compute(model, metrics)`` at the end of every evaluation on every worker, with the model in evaluation
    mode and the metrics over all samples. It must return the same number on every worker, so it may draw no noise of
    its own. A value that is not finite is left out of that evaluation.
    """

    def format(self, metrics: Mapping[str, float]) -> str:
        """Return its value as text; empty where an evaluation has none that is finite."""
        value = metrics.get(self.key, math.nan)
        return f"{value:.{self.digits}f}" if math.isfinite(value) else ""


METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric(METRIC, label="bits/byte", unit="bits per byte", digits=3, better="lower"),
        Metric(LIKELIHOOD, label="NLL", unit="bits per byte", digits=3, better="lower"),
        Metric("bound", label="-ELBO", unit="nats per sample", digits=1, better="lower"),
        Metric("nll", label="NLL (nats)", unit="nats per sample", digits=1, better="lower", shown=False),
        Metric("reconstruction", label="reconstruction", unit="nats per sample", digits=1, better="lower", shown=False),
        Metric("kl", label="KL", unit="nats per sample", digits=2, better="neither"),
        Metric("used", label="used", unit="nats per sample", digits=2, better="higher"),
        Metric("mutual_information", label="MI", unit="nats per sample", digits=2, better="higher"),
        Metric("auxiliary", label="auxiliary", unit="nats per sample", digits=1, better="lower", shown=False),
        Metric("active_units", label="active", unit="latent dimensions", digits=0, better="neither"),
    )
}
"""Every metric of an evaluation by its key, in the order of columns.

One more takes one line here and the place that computes it. From outside the package:
``METRICS["key"] = Metric("key", ..., compute=function)``, in the driver and in every worker.
"""
REQUIRED_METRICS = ("bound", METRIC, "reconstruction", "kl")
"""Metrics that a stored record must have. Never add one: every search of before would become unreadable."""


def computed_metrics(model: Any, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the finite values of the registered metrics that have a function, from an evaluation's ``metrics``."""
    values = {
        metric.key: float(metric.compute(model, metrics)) for metric in METRICS.values() if metric.compute is not None
    }
    return {key: value for key, value in values.items() if math.isfinite(value)}


def known_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the registered metrics among ``values``, in the order of columns."""
    return {key: values[key] for key in METRICS if key in values}


def shown_metrics(evaluations: Iterable[Mapping[str, float]]) -> list[Metric]:
    """Return the metrics that a table of these evaluations has columns for: those that any of them has."""
    present = {key for metrics in evaluations for key in metrics}
    return [metric for metric in METRICS.values() if metric.shown and metric.key in present]


def code_use(metrics: Mapping[str, float]) -> float:
    """Return how many nats of a sample's code the decoder uses; the KL where an evaluation has not measured it.

    It is the reconstruction that is lost when samples exchange their codes. The KL says what a code costs: a normalised
    posterior has one whether the decoder reads it or not.
    """
    return metrics.get("used", metrics.get("kl", math.nan))


def collapse_warning(metrics: Mapping[str, float], has_latent: bool, whose: str = "the") -> str | None:
    """Return the sentence that warns of a code that is not used; ``None`` if it is, or there is no latent code.

    ``whose`` stands before "posterior".
    """
    if not has_latent or not code_use(metrics) < COLLAPSED:
        return None
    measured = f"KL {metrics['kl']:.3f} nats"
    if "used" in metrics:
        measured += f", of which {max(0.0, metrics['used']):.3f} are used"
    return f"{whose} posterior has collapsed ({measured}): the decoder ignores the latent code"


def headline(metrics: Mapping[str, float]) -> str:
    """Return the metrics of a model that one line of output has room for; those that are missing are left out."""
    parts = {
        METRIC: "negative ELBO {:.3f} bits/byte",
        "kl": "KL {:.2f} nats",
        "used": "{:.2f} nats of the code used",
        LIKELIHOOD: "NLL {:.3f} bits/byte",
    }
    return ", ".join(part.format(metrics[key]) for key, part in parts.items() if key in metrics)


# ----------------------------------------------------------------------------------- search objective

Objective = Literal["bound", "nll", "pareto"]
DRAWS = 8
"""Draws of z for the estimate of the likelihood. Each costs about as much as one more evaluation."""
INFEASIBLE_PENALTY = 1000.0
"""Bits per byte. A trial whose code is used too little scores behind every feasible one by this much."""
NO_RESULT = 2.0
"""How far a trial that has diverged before its first evaluation misses a constraint: more than one without any use."""


@dataclass(frozen=True)
class SearchObjective:
    """The quantity that a search optimises, and its constraint.

    ``bound`` is the lowest negative ELBO, ``nll`` the lowest importance-weighted estimate of the negative
    log-likelihood. ``pareto`` is a low negative ELBO and a code that is much used (``code_use``) at once: the winner is
    the trial with the lowest negative ELBO among those that no other trial beats in both.
    """

    objective: Objective = "bound"
    min_used: float = 0.0
    """Nats per sample. A trial whose code is used less cannot win: see ``code_use``."""

    @property
    def metric(self) -> str:
        """Key of the metric that trials are compared on."""
        return LIKELIHOOD if self.objective == "nll" else METRIC

    @property
    def draws(self) -> int:
        """Draws of z at each evaluation, beyond the one for the ELBO."""
        return DRAWS if self.objective == "nll" else 0

    def may_win(self, metrics: Mapping[str, float]) -> bool:
        """Return whether a trial with these metrics can win."""
        feasible = not self.min_used or code_use(metrics) >= self.min_used
        return math.isfinite(metrics.get(self.metric, math.nan)) and feasible

    def score(self, metrics: Mapping[str, float]) -> float:
        """Return the number to minimise; infinite where the metric is missing or not finite.

        It is the metric itself, or, where the code is used too little, ``INFEASIBLE_PENALTY`` plus the missing nats.
        A penalty rather than a constraint, because ASHA and the order of tables only compare two numbers. Optuna's
        samplers have the constraint itself: ``constraints``.
        """
        value = metrics.get(self.metric, math.nan)
        if not math.isfinite(value):
            return math.inf
        return (
            value
            if self.may_win(metrics)
            else INFEASIBLE_PENALTY + self.min_used - code_use({"kl": 0.0} | dict(metrics))
        )

    def values(self, metrics: Mapping[str, float]) -> list[float]:
        """Return the values for Optuna: the metric, and for ``pareto`` the use of the code too."""
        return [metrics[METRIC], code_use(metrics)] if self.objective == "pareto" else [metrics[self.metric]]

    def constraints(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return by how much a trial misses each constraint, for Optuna: above 0 it is infeasible.

        As a share of what is asked for, so that several constraints can be added up: 1 where the code is not used at
        all. ``NO_RESULT`` where it was not measured. Empty without a constraint.
        """
        if not self.min_used:
            return {}
        use = code_use(metrics)
        return {"used": 1 - use / self.min_used if math.isfinite(use) else NO_RESULT}

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Directions of ``values``, in Optuna's words."""
        return ["minimize", "maximize"] if self.objective == "pareto" else ["minimize"]

    def __str__(self) -> str:
        texts = {
            "bound": "lowest negative ELBO",
            "nll": f"lowest negative log-likelihood ({DRAWS} draws)",
            "pareto": "low negative ELBO and much of the code used",
        }
        return texts[self.objective] + (f", at least {self.min_used:g} nats of the code used" if self.min_used else "")


def pareto_front(items: Iterable[T], point: Callable[[T], tuple[float, float]]) -> list[T]:
    """Return the items that no other beats in both negative ELBO and use of the code, by rising negative ELBO.

    ``point`` gives an item's (negative ELBO, use of the code): the first is to be low, the second large. Items whose
    point is not finite are left out, and of equal ones the first is kept.
    """
    points = ((*point(item), item) for item in items)
    finite = [entry for entry in points if math.isfinite(entry[0]) and math.isfinite(entry[1])]
    front: list[T] = []
    largest = -math.inf
    # of equal negative ELBOs the one with the larger use comes first
    for _, use, item in sorted(finite, key=lambda entry: (entry[0], -entry[1])):
        if use > largest:
            largest = use
            front.append(item)
    return front
