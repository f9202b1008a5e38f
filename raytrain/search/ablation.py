"""Ablation of a search's winner: trains its config, and its config with one field at a time back at the default.

Each config gets new seeds. An ablation is itself a search: a grid of one parameter, all of whose points are confirmed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raytrain.analysis.tables import short
from raytrain.config.schema import LOCATION, RunConfig, flatten, override
from raytrain.models import model_size
from raytrain.runs.records import check_name
from raytrain.runs.repeats import Repeated, repeated, searched, winner
from raytrain.runs.trials import Trial, TrialStore
from raytrain.search.confirmation import Difference, compare
from raytrain.search.options import SearchOptions, SearchRequest
from raytrain.search.plan import Plan, read_plan
from raytrain.search.setup import confirm_settings, worker_settings
from raytrain.search.space import read_space
from raytrain.storage import open_storage_root
from raytrain.storage.base import Storage
from raytrain.utils.errors import UserError

SEEDS = 3
"""New seeds of each config, unless ``--confirm`` says otherwise."""
PARAMETER = "without"
NOTHING = "nothing"
"""Value of the parameter that stands for the unchanged winner."""
KEPT = (*LOCATION, "seed", "encoder_from", "changes")
"""Fields that are not hyperparameters of the winner."""
FROM_THE_SEARCH = (
    "space",
    "budget",
    "algorithm",
    "parts",
    "scheduler",
    "num_samples",
    "search_objective",
    "min_used",
    "max_parameters",
    "warm_start",
    "resume",
)
"""Options that an ablation does not accept."""
NOT_RUN = read_space("not run", "def space(trial):\n    return {}\n")
"""Placeholder for the space of a stored plan, whose file is not run."""
SOURCE = '''"""Ablation of search {name}: the fields of its winner, trial {trial}, without each of them."""

ALGORITHM = "grid"
FIELDS = {fields!r}
GROUPS = {groups!r}


def space(trial):
    left_out = GROUPS[trial.suggest_categorical("without", list(GROUPS))]
    return {{field: value for field, value in FIELDS.items() if field not in left_out}}
'''


@dataclass(frozen=True)
class Ablated:
    """A finished search, and the trial whose config won."""

    name: str
    plan: Plan
    """Its space draws nothing: an ablation does not run the space file in the storage."""
    trial: Trial
    defaults: SearchOptions
    """The options that an ablation takes over from the search by default."""


def find_ablated(name: str, storage: str | None) -> Ablated:
    """Return the search ``name`` and its winner.

    Raises:
        UserError: there is no such search, it has not ended or has no winner, or the winner's fields change during
            training.
    """
    check_name(name)
    root = open_storage_root(storage)
    location = root.child(name)
    plan = read_plan(location, compared_with=NOT_RUN)
    if plan is None:
        raise UserError(f"--ablate {name}: there is no such search in {root.uri()}")
    if plan.parts:
        raise UserError(f"--ablate {name}: the fields of its winner change while it is trained")
    trials = TrialStore(location).read()
    if not all(trial.ended for trial in trials):
        raise UserError(f"--ablate {name}: it has not ended; python -m raytrain.tune --resume {name} goes on with it")
    best = winner(trials, plan.search_objective, plan.confirm)
    if best is None:
        raise UserError(f"--ablate {name}: no trial of the search has won")
    if best.confirms is not None:
        best = next(trial for trial in trials if trial.number == best.confirms)
    workers = {field: value for field, value in worker_settings(plan, location).items() if field != "time_budget"}
    return Ablated(name, plan, best, SearchOptions(ablate=name, experiment=plan.experiment, **workers))


def ablation_request(found: Ablated, options: SearchOptions) -> SearchRequest:
    """Return the search that ablates a winner; print the fields that cannot be reset.

    Raises:
        UserError: the winner has the default values in all fields, or an option was given that an ablation does not
            accept.
    """
    name, plan, best = found.name, found.plan, found.trial
    for field in FROM_THE_SEARCH:
        if getattr(options, field) != getattr(SearchOptions(), field):
            raise UserError(f"--ablate {name} takes no --{field.replace('_', '-')}")
    base = plan.bases[best.config.model_name]
    known = flatten(base)
    fields = {
        field: value
        for field, value in flatten(best.config).items()
        if field not in KEPT and value != known.get(field, value)
    }
    groups = {NOTHING: [], **_groups(base, fields)}
    if len(groups) == 1:
        raise UserError(
            f"--ablate {name}: trial {best.name}, its winner, has the default values in all fields that can be put back"
        )
    if left := fields.keys() - {field for group in groups.values() for field in group}:
        print(f"{', '.join(sorted(left))} cannot go back to the default without more than one other field: left out")
    space = read_space("ablation", SOURCE.format(name=name, trial=best.name, fields=fields, groups=groups))
    new_name = options.name or f"{name}-ablation"
    return SearchRequest(
        options=dataclasses.replace(
            options,
            name=new_name,
            scheduler="none",
            search_objective="bound" if plan.objective == "pareto" else plan.objective,
            **_confirmation(options, open_storage_root(options.storage).child(new_name), len(groups)),
        ),
        space=space,
        bases={best.config.model_name: base},
        size=f"as search {name} had it",
        corpus=(plan.corpus, plan.corpus_path),
    )


def _confirmation(options: SearchOptions, location: Storage, configs: int) -> dict[str, Any]:
    """Return the options that confirm all configs: as given, as first recorded, or with ``SEEDS`` new seeds each."""
    if options.confirm is None:
        begun = read_plan(location, compared_with=NOT_RUN)
        return confirm_settings(begun) if begun is not None else {"confirm": f"{configs}:{SEEDS}"}
    options.confirmation(seed=0)  # refuses anything but K:S
    return {"confirm": f"{configs}:{options.confirm.partition(':')[2]}"}


def _groups(base: RunConfig[Any], fields: dict[str, Any]) -> dict[str, list[str]]:
    """Return the fields to reset to their defaults together, by name: each alone if the model can be built that way.

    Some fields cannot be reset alone, such as the widths of an encoder without those of its decoder. Such a field is
    paired with the first other field that makes the model buildable. If there is none, it is in no group.
    """
    groups: dict[str, list[str]] = {}
    for field in fields:
        tried = [[field], *([each for each in fields if each in (field, other)] for other in fields if other != field)]
        group = next((each for each in tried if _can_be_built(base, fields, each)), None)
        if group is not None:
            groups[" and ".join(group)] = group
    return groups


def _can_be_built(base: RunConfig[Any], fields: dict[str, Any], left_out: Sequence[str]) -> bool:
    try:
        model_size(override(base, {field: value for field, value in fields.items() if field not in left_out}))
    except (UserError, ValueError):
        return False
    return True


# ------------------------------------------------------------------------------------------- result


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What the winner's value of one field, or of a pair of fields, gains."""

    without: str
    """The fields, separated by "and"."""
    values: dict[str, tuple[Any, Any]]
    """By field: the winner's value, and the default."""
    mean: float | None
    """Mean over the new seeds with the defaults instead, in bits per byte; ``None`` without a result."""
    used: float | None
    """Mean over the new seeds of the nats of the code used with the defaults; ``None`` for a model without a code."""
    gain: Difference | None
    """By how much the winner beats the defaults; ``None`` if they cannot be compared."""
    reason: str = ""
    """Why they cannot be compared."""

    def __str__(self) -> str:
        values = ", ".join(
            f"{field} {short(default)} instead of {short(value)}" for field, (value, default) in self.values.items()
        )
        if self.gain is None:
            return f"{values}: no result in common" + (f" ({self.reason})" if self.reason else "")
        gain, worse = self.gain, self.gain.bits >= 0
        low, high = (gain.low, gain.high) if worse else (-gain.high, -gain.low)
        found = f"{'worse' if worse else 'better'} by {abs(gain.bits):.3f} bits per byte"
        apart = "" if low > 0 else "not told apart: "
        used = "" if self.used is None else f"; {self.used:.2f} nats of the code used"
        return f"{values}: {apart}{found} (95% interval {low:.3f} to {high:.3f}){used}"


def effects(plan: Plan, trials: Sequence[Trial], location: Storage) -> list[Effect]:
    """Return the effect of each field of the ablated winner: the largest gain first, incomparable ones last.

    Args:
        plan: plan of an ablation.
        trials: all its trials; those that confirm have ended.
        location: storage of the search.

    Raises:
        UserError: the outcome of a repeat cannot be read.
    """
    assert plan.confirm is not None
    known = {each.trial.number: each for each in repeated(trials, plan.search_objective, plan.confirm)}
    own = {trial.params.get(PARAMETER): trial for trial in searched(trials)}
    full = own.pop(NOTHING, None)
    if full is None:
        return []
    made = [_effect(plan, known, full, trial, location) for trial in own.values()]
    return sorted(made, key=lambda effect: math.inf if effect.gain is None else -effect.gain.bits)


def _effect(plan: Plan, known: dict[int, Repeated], full: Trial, trial: Trial, location: Storage) -> Effect:
    before, after = flatten(full.config), flatten(trial.config)
    winning, other = known.get(full.number), known.get(trial.number)
    gain, mean, used, reason = None, math.nan, math.nan, full.reason or trial.reason
    if other is not None:
        mean, used = other.mean(plan.search_objective.metric), other.mean("used")
        reason = next((repeat.reason for repeat in other.repeats if repeat.reason), reason)
    if winning is not None and other is not None:
        gain = compare(winning, other, plan.search_objective, location, plan.seed)
    return Effect(
        without=str(trial.params.get(PARAMETER)),
        values={field: (before[field], after[field]) for field in before if before[field] != after[field]},
        mean=mean if math.isfinite(mean) else None,
        used=used if math.isfinite(used) else None,
        gain=gain,
        reason=reason,
    )


def effects_json(found: Sequence[Effect]) -> list[dict[str, Any]]:
    """Return the effects as the JSON of ``ablation.json``."""
    return [asdict(effect) for effect in found]
