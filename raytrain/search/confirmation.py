"""Confirmation of a search: retrains its best configs with new seeds, and measures how far the top two are apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from raytrain.metrics import SearchObjective
from raytrain.runs.records import new_identity, read_outcome
from raytrain.runs.repeats import Confirm, Repeated, confirmed, repeated, searched
from raytrain.runs.trials import Trial, trial_location
from raytrain.search.plan import Plan
from raytrain.storage.base import Storage
from raytrain.utils.validation import validate_type

CONFIDENCE = 0.95
RESAMPLES = 2000
"""Bootstrap resamples. Only their standard deviation is used, and this many estimate it to within 2%."""
AT_ONCE = 100
"""Resamples held in memory at once."""

# --------------------------------------------------------------------------------------- its trials


def new_repeats(plan: Plan, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that must still be started to confirm the winner among ``trials``, in order of the seeds.

    They have no early-stopping baseline and no point of the space: Optuna learns nothing from them.
    """
    if plan.confirm is None:
        return []
    found = repeated(trials, plan.search_objective, plan.confirm)
    known = {repeat.identity: repeat.config for each in found for repeat in each.repeats}
    made: list[Trial] = []
    for number in range(plan.confirm.seeds):
        for each in found:
            if (config := each.configs[number]) not in known.values():
                made.append(
                    Trial(
                        number=len(trials) + len(made),
                        identity=new_identity(),
                        config=config,
                        params={},
                        distributions={},
                        fields=each.trial.fields,
                        confirms=each.trial.number,
                    )
                )
    return made


def wanted_repeats(plan: Plan, trials: Sequence[Trial]) -> list[Trial]:
    """Return those of ``trials`` that confirm the winner, in their order.

    A search that was given more trials, or another rule, may hold repeats that are no longer wanted. Their config is no
    longer among the best, or their seeds or steps are others.
    """
    if plan.confirm is None:
        return []
    found = repeated(trials, plan.search_objective, plan.confirm)
    wanted = {repeat.identity for each in found for repeat in each.repeats}
    return [trial for trial in trials if trial.identity in wanted]


def repeats_left(plan: Plan, trials: Sequence[Trial]) -> int:
    """Return an upper bound on the number of confirming trials that are still to run."""
    if plan.confirm is None:
        return 0
    own = searched(trials)
    if len(own) < plan.num_samples or not all(trial.ended for trial in own):
        return plan.confirm.num_trials
    found = repeated(trials, plan.search_objective, plan.confirm)
    return sum(len(each.configs) - sum(repeat.ended for repeat in each.repeats) for each in found)


def repeat_share(plan: Plan) -> float:
    """Return an upper bound on the steps of a confirming trial, as a share of the steps of the search's own trials."""
    if plan.confirm is None or plan.confirm.steps is None:
        return 1.0
    return plan.confirm.steps / min(config.steps for config in plan.bases.values())


# --------------------------------------------------------------------------------------- difference


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of a config's repeats on the validation samples."""

    nats: np.ndarray
    """[seeds, samples], in nats."""
    text_bytes: np.ndarray
    """[samples], in bytes of text."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The lead of the winner over the runner-up, in bits per byte, with a 95% interval."""

    bits: float
    low: float
    high: float
    seeds: int
    samples: int | None
    """Validation samples that both were evaluated on; ``None`` if only the means of seeds could be compared."""

    @property
    def apart(self) -> bool:
        """True if the whole interval is above 0."""
        return self.low > 0

    def __str__(self) -> str:
        over = f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        over += "" if self.samples is None else f" and {self.samples:,} validation samples"
        interval = f"95% interval {self.low:.3f} to {self.high:.3f}, over {over}"
        if self.apart:
            return f"better by {self.bits:.3f} bits per byte ({interval})"
        return f"not told apart: {self.bits:.3f} bits per byte between them ({interval})"


def difference(better: Losses, worse: Losses, seed: int) -> tuple[float, float, float]:
    """Return by how many bits per byte ``better`` is below ``worse``, and the ends of the 95% interval.

    Both have the same seeds and samples, and are compared in pairs: a seed determines the order of the samples, all
    noise and, for models of one shape, the initial weights. The variance of the difference is that of a bootstrap over
    the samples plus that of the mean over seeds. The interval is Student's t with Satterthwaite's degrees of freedom,
    which are few where the variance over seeds dominates. Percentiles of two or three resampled seeds would be far too
    narrow. A single seed says nothing about other seeds, so that interval covers the samples alone.
    """
    nats = worse.nats - better.nats
    seeds, samples = nats.shape
    total = math.log(2) * better.text_bytes.sum()
    middle = float(nats.sum() / seeds / total)
    generator, found = np.random.Generator(np.random.Philox(seed)), []
    for _ in range(RESAMPLES // AT_ONCE):
        counts = generator.multinomial(samples, np.full(samples, 1 / samples), AT_ONCE)
        found.append(counts @ nats.mean(0) / (math.log(2) * (counts @ better.text_bytes)))
    over_samples = float(np.concatenate(found).var(ddof=1))
    over_seeds = float((nats.sum(1) / total).var(ddof=1)) / seeds if seeds > 1 else 0.0
    variance = over_samples + over_seeds
    freedom = variance**2 * (seeds - 1) / over_seeds**2 if over_seeds > 0 else math.inf
    half = math.sqrt(variance) * float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    return middle, middle - half, middle + half


def compare(
    won: Repeated, other: Repeated, search_objective: SearchObjective, location: Storage, seed: int
) -> Difference | None:
    """Return how far apart two confirmed configs are, on the seeds for which both were evaluated.

    Configs with the same validation samples are compared sample by sample. If their samples differ (because of another
    length, say), or a repeat diverged and left no losses, only the means of their seeds are compared. The result is
    ``None`` if that leaves a single seed, or if no seed has a result for both.

    Args:
        location: storage of the search.
        seed: seed of the resampling.
    """
    metric = search_objective.metric
    pairs = [
        pair
        for pair in zip(won.repeats, other.repeats, strict=True)
        if all(math.isfinite(repeat.best.get(metric, math.nan)) for repeat in pair)
    ]
    if not pairs:
        return None
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    losses = [read_losses(repeats, location) for repeats in sides]
    if losses[0] is None or losses[1] is None or not np.array_equal(losses[0].text_bytes, losses[1].text_bytes):
        if len(pairs) == 1:
            return None
        losses = [
            Losses(nats=np.array([[math.log(2) * repeat.best[metric]] for repeat in repeats]), text_bytes=np.ones(1))
            for repeats in sides
        ]
        samples = None
    else:
        samples = len(losses[0].text_bytes)
    assert losses[0] is not None
    assert losses[1] is not None
    bits, low, high = difference(losses[0], losses[1], seed)
    return Difference(bits=bits, low=low, high=high, seeds=len(pairs), samples=samples)


def read_losses(repeats: Sequence[Trial], location: Storage) -> Losses | None:
    """Return the per-sample losses in the outcomes of the repeats; ``None`` if one has none, or their samples differ.

    Raises:
        UserError: an outcome cannot be read.
    """
    found = []
    for repeat in repeats:
        outcome = read_outcome(trial_location(location, repeat.identity).uri()) or {}
        try:
            losses = validate_type(outcome.get("losses"), dict[str, list[float]], "losses")
        except ValueError:
            return None
        found.append(losses)
    if len({tuple(losses.get("bytes", ())) for losses in found}) != 1 or not found[0].get("bytes"):
        return None
    if {len(losses.get("nats", ())) for losses in found} != {len(found[0]["bytes"])}:
        return None
    return Losses(
        nats=np.array([losses["nats"] for losses in found]), text_bytes=np.array(found[0]["bytes"], dtype=float)
    )


# ------------------------------------------------------------------------------------------- result


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What the repeats of a search say about its best configs."""

    rule: Confirm
    search_objective: SearchObjective
    configs: list[Repeated]
    """The confirmed configs by their mean over seeds, those that may win first."""
    order: list[Repeated]
    """The configs that may win; empty until all repeats have ended."""
    difference: Difference | None
    """Difference between the first two of ``order``; ``None`` without a second."""

    @property
    def ended(self) -> bool:
        """True once all repeats have ended."""
        return all(each.ended for each in self.configs)

    @property
    def sentence(self) -> str:
        """The verdict on the winner, in one sentence."""
        if not self.configs:
            return "no config can be confirmed: none may win"
        if not self.ended:
            return "the winner is not confirmed yet: not all trials that confirm have ended"
        did = "kept the constraint" if self.search_objective.min_used else "had a result"
        needed = "all" if self.rule.share == 1 else f"{self.rule.share:.0%}"
        if not self.order:
            return f"no config {did} in {needed} of its new seeds"
        if len(self.configs) == 1:
            return "no other config was confirmed"
        if len(self.order) == 1:
            return f"no other config {did} in {needed} of its new seeds"
        first, second = (each.trial.name for each in self.order[:2])
        if self.difference is None:
            return f"trial {first} before trial {second}, with one seed each: not told apart"
        return f"trial {first} before trial {second}: {self.difference}"

    def lines(self) -> list[str]:
        """Return the result as text: the winner's mean, spread and successful seeds, and how it compares."""
        lines = []
        if self.order:
            won, metric = self.order[0], self.search_objective.metric
            mean, spread = won.mean(metric), won.spread(metric)
            around = "" if math.isnan(spread) else f", standard deviation {spread:.3f}"
            held = f"{won.held(self.search_objective)} of {len(won.configs)} new seeds"
            constraint = f"; the constraint held in {held}" if self.search_objective.min_used else f", over {held}"
            lines.append(f"confirmed: trial {won.trial.name}, mean {mean:.3f} bits per byte{around}{constraint}")
        return [*lines, self.sentence]

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``confirmation.json``; a non-finite number becomes null."""
        metric, winning = self.search_objective.metric, [each.trial.number for each in self.order]
        configs = [
            {
                "trial": each.trial.name,
                "searched": each.trial.best[metric],
                "repeats": [repeat.name for repeat in each.repeats],
                "seeds": [repeat.config.seed for repeat in each.repeats],
                "values": list(map(_finite, each.values(metric))),
                "mean": _finite(each.mean(metric)),
                "spread": _finite(each.spread(metric)),
                "interval": mean_interval(each.values(metric)),
                "held": each.held(self.search_objective),
                "may_win": each.trial.number in winning,
            }
            for each in self.configs
        ]
        return {
            "rule": asdict(self.rule),
            "metric": metric,
            "min_used": self.search_objective.min_used,
            "configs": configs,
            "winner": self.order[0].trial.name if self.order else None,
            "difference": None if self.difference is None else asdict(self.difference),
            "sentence": self.sentence,
        }


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """Return the ends of the 95% interval of the mean over seeds, Student's t; ``None`` with fewer than two seeds.

    Seeds without a finite value are left out.
    """
    found = list(filter(math.isfinite, values))
    if len(found) < 2:
        return None
    mean, error = statistics.fmean(found), statistics.stdev(found) / math.sqrt(len(found))
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1))
    return [mean - half, mean + half]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def confirmation_of(plan: Plan, trials: Sequence[Trial], location: Storage) -> Confirmation | None:
    """Return the result of the repeats among ``trials``; ``None`` for a search without confirmation.

    Args:
        location: storage of the search.

    Raises:
        UserError: the outcome of a repeat cannot be read.
    """
    if plan.confirm is None:
        return None
    found = repeated(trials, plan.search_objective, plan.confirm)
    order = confirmed(found, plan.search_objective, plan.confirm)
    apart = compare(order[0], order[1], plan.search_objective, location, plan.seed) if len(order) > 1 else None
    return Confirmation(
        rule=plan.confirm,
        search_objective=plan.search_objective,
        configs=[*order, *(each for each in found if each not in order)],
        order=order,
        difference=apart,
    )
