"""Data of figures: a row for each trial of a search, a record for each run of a figure of the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from raytrain.metrics import METRIC, code_use, known_metrics
from raytrain.utils.errors import UserError

T = TypeVar("T")
Curve = list[tuple[int, float]]
"""(step, value), by step."""
CURVE = "curve/"
"""Prefix of the columns in a table of trials that hold the steps and the metrics of all evaluations."""


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """A trial as stored in ``trials.parquet``."""

    number: int
    name: str = ""
    run_id: str = ""
    status: str = "finished"
    """finished, stopped, failed or early_stopped; while the search runs also waiting, running or interrupted."""
    reason: str = ""
    step: int = 0
    steps: int = 0
    seconds: float = math.nan
    started_at: float = math.nan
    """Seconds since 1970, as ``ended_at``."""
    ended_at: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    """The finite metrics of its best evaluation."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Parameters that the search space has drawn, by the space's own names; without those that were not drawn."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The fields of the config that the space has set."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """The finite values of each metric over its evaluations, by name."""
    model: str = ""
    length: int = 0
    rank: int = 0
    """Rank among all trials by the search objective, from 1; 0 if the table has none."""
    origin: str = ""
    """Reference of its config, if it was a warm start."""
    member: int = -1
    """Member of a population that it belongs to; -1 without one."""
    confirms: str = ""
    """Name of the trial whose config it repeats with a new seed; empty for a trial of the search itself."""

    @property
    def label(self) -> str:
        """Name in figures and tables."""
        return self.name or f"{self.number:03}"

    @property
    def bits_per_byte(self) -> float:
        """Negative ELBO; NaN if it was never evaluated."""
        return self.metrics.get(METRIC, math.nan)

    @property
    def kl(self) -> float:
        """Nats per sample; NaN if it was never evaluated."""
        return self.metrics.get("kl", math.nan)

    @property
    def use(self) -> float:
        """Nats of a sample's code that the decoder uses; NaN if it was never evaluated."""
        return code_use(self.metrics)

    @property
    def scored(self) -> bool:
        """True if it was ever evaluated to a finite value."""
        return math.isfinite(self.bits_per_byte)

    def point(self) -> tuple[float, float]:
        """Return negative ELBO and use of the code."""
        return self.bits_per_byte, self.use


def ranked(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials that have a negative ELBO, best first by the search objective.

    If the table has no ranks, sort by bits per byte, since a search may vary the length of samples.
    """
    return sorted((row for row in rows if row.scored), key=lambda row: (row.rank, row.bits_per_byte, row.number))


def evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """Return at most ``most`` items, evenly spaced and in their order."""
    return items if len(items) <= most else [items[number * len(items) // most] for number in range(most)]


def is_logarithmic(values: Sequence[float]) -> bool:
    """Return whether numbers that a search has drawn seem to come from a logarithmic range.

    They then span a factor of eight or more, and their median is nearer to the middle of a logarithmic scale than to
    that of a linear one.
    """
    ordered = sorted(values)
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    if not (low > 0 and high / low >= 8):
        return False
    linear, logarithmic = (middle - low) / (high - low), math.log(middle / low) / math.log(high / low)
    return abs(logarithmic - 0.5) <= abs(linear - 0.5)


def read_trials(file: Path) -> list[TrialRow]:
    """Read the rows of a ``trials.parquet``, by number.

    Raises:
        UserError: the file is not a Parquet table, or has no column ``number``.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a table of trials: {' '.join(str(error).split())}") from None
    if values and "number" not in values[0]:
        raise UserError(f"{file} is not a table of trials: it has no column 'number'")
    try:
        return sorted((_row(entry) for entry in values), key=lambda row: row.number)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{file} is not a table of trials: {error}") from None


def _row(entry: dict[str, Any]) -> TrialRow:
    plain = TrialRow.__dataclass_fields__.keys() - {"metrics", "parameters", "fields", "curves"}
    known = {key: value for key, value in entry.items() if key in plain and value is not None}
    for name in ("number", "step", "steps", "length", "rank"):
        known[name] = int(known.get(name) or 0)
    for name, value in known.items():
        kind = type(TrialRow.__dataclass_fields__[name].default)
        if kind is float and type(value) is int:
            known[name] = value = float(value)
        if kind in (int, float, str) and type(value) is not kind:
            raise TypeError(f"{name} is {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            known[name] = math.nan
    for name in ("started_at", "ended_at"):
        if known.get(name) == 0:  # not yet
            del known[name]
    return TrialRow(
        **known,
        metrics=_metrics(entry),
        parameters=_under(entry, "param/"),
        fields=_under(entry, "field/"),
        curves=_curves(_under(entry, CURVE)),
    )


def _metrics(entry: dict[str, Any]) -> dict[str, float]:
    """Return the registered metrics of a row that are finite.

    Raises:
        TypeError: one of them is not a number.
    """
    values = {name: value for name, value in known_metrics(entry).items() if value is not None}
    for name, value in values.items():
        if type(value) not in (int, float):
            raise TypeError(f"{name} is {value!r}")
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _curves(columns: dict[str, Any]) -> dict[str, Curve]:
    """Return the curves of a row from its columns: a list of steps and, for each metric, a list of values at them.

    Raises:
        TypeError, ValueError, OverflowError: the columns hold something else.
    """
    for name, values in columns.items():
        if type(values) is not list or any(type(value) not in (int, float, type(None)) for value in values):
            raise TypeError(f"{CURVE}{name} is {values!r}")
    steps = [int(step) for step in columns.pop("step", [])]
    return {
        name: [
            (step, float(value))
            for step, value in zip(steps, values, strict=True)
            if value is not None and math.isfinite(value)
        ]
        for name, values in columns.items()
    }


def _under(entry: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the columns of a row that start with ``prefix`` and hold a value."""
    return {
        key.removeprefix(prefix): value
        for key, value in entry.items()
        if key.startswith(prefix) and value is not None and not (isinstance(value, float) and math.isnan(value))
    }


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run of a figure of the paper, at its last evaluation."""

    model: str
    length: int
    """Symbols of a sample."""
    bits_per_byte: float
    reconstruction: float
    """Nats per sample, as ``kl``."""
    kl: float
    used: float = math.nan
    """Nats per sample that are lost when samples swap their codes; NaN if that was not measured."""
    alpha: float = 0.0
    annealing: str = "linear"
    input_dropout: float = 0.0
    receptive_field: int | None = None
    """Characters that the top net sees; ``None`` for a recurrent one."""
    step: int = 0
    steps: int = 0
    seed: int = 0
    curve: Curve = field(default_factory=list)
    """Reconstruction over training steps in nats per sample, with the run's own input dropout."""
    run_id: str = ""

    @property
    def bound(self) -> float:
        """Nats per sample."""
        return self.reconstruction + self.kl

    def bits(self, nats: float) -> float:
        """Convert nats per sample to bits per byte of text."""
        return nats * self.bits_per_byte / self.bound if self.bound else math.nan
