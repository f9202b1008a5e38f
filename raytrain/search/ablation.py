"""Ablation of a search's winner: its config, and its config with one field back at the default, with new seeds each.

It is a search like others: a grid of one parameter, whose points are all confirmed.
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
from raytrain.runs.repeats import repeated, winner
from raytrain.runs.trials import Trial, TrialStore
from raytrain.search.confirmation import Difference, compare
from raytrain.search.options import SearchOptions, SearchRequest
from raytrain.search.plan import Plan, read_plan
from raytrain.search.space import read_space
from raytrain.storage import open_storage_root
from raytrain.storage.base import Storage
from raytrain.utils.errors import UserError

SEEDS = 3
"""New seeds of each config, unless ``--confirm`` says otherwise."""
PARAMETER = "without"
NOTHING = "nothing"
"""Value of the parameter for the winner itself."""
KEPT = (*LOCATION, "seed", "encoder_from", "changes")
"""Fields that are no hyperparameters of the winner."""
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
"""Options that an ablation does not take."""
SOURCE = '''"""Ablation of search {name}: the fields of its winner, trial {trial}, without each of them."""

ALGORITHM = "grid"
FIELDS = {fields!r}
GROUPS = {groups!r}


def space(trial):
    left_out = GROUPS[trial.suggest_categorical("without", list(GROUPS))]
    return {{field: value for field, value in FIELDS.items() if field not in left_out}}
'''


def ablation_request(options: SearchOptions) -> SearchRequest:
    """Return the search that ablates the winner of the search ``options.ablate``.

    Raises:
        UserError: there is no such search, it has no winner, or the winner has the default values in all fields; or an
            option that an ablation does not take.
    """
    name = options.ablate or ""
    for field in FROM_THE_SEARCH:
        if getattr(options, field) != getattr(SearchOptions(), field):
            raise UserError(f"--ablate {name} takes no --{field.replace('_', '-')}")
    check_name(name)
    root = open_storage_root(options.storage)
    # whose space, a file in a storage, is not run
    plan = read_plan(root.child(name), compared_with=read_space("none", "def space(trial):\n    return {}\n"))
    if plan is None:
        raise UserError(f"--ablate {name}: there is no such search in {root.uri()}")
    best = _winner(name, plan, TrialStore(root.child(name)).read())
    base = plan.bases[best.config.model_name]
    known = flatten(base)
    fields = {
        field: value
        for field, value in flatten(best.config).items()
        if field not in KEPT and value != known.get(field, value)
    }
    if not fields:
        raise UserError(f"--ablate {name}: trial {best.name}, its winner, has the default values in all fields")
    groups = {NOTHING: [], **_groups(base, fields)}
    return SearchRequest(
        options=dataclasses.replace(
            options,
            name=options.name or f"{name}-ablation",
            confirm=options.confirm or f"{len(groups)}:{SEEDS}",
            scheduler="none",
            search_objective="bound" if plan.objective == "pareto" else plan.objective,
        ),
        space=read_space("ablation", SOURCE.format(name=name, trial=best.name, fields=fields, groups=groups)),
        bases={best.config.model_name: base},
        size=f"as search {name} had it",
        corpus=plan.corpus,
    )


def _winner(name: str, plan: Plan, trials: list[Trial]) -> Trial:
    """Return the trial of the search whose config has won.

    Raises:
        UserError: none has, or its config changes while it is trained.
    """
    best = winner(trials, plan.search_objective, plan.confirm)
    if best is None:
        raise UserError(f"--ablate {name}: no trial of the search has won")
    if best.confirms is not None:
        best = next(trial for trial in trials if trial.number == best.confirms)
    if best.config.changes or best.continues:
        raise UserError(f"--ablate {name}: the fields of its winner change while it is trained")
    return best


def _groups(base: RunConfig[Any], fields: dict[str, Any]) -> dict[str, list[str]]:
    """Return the fields that go back to the default together, by name: each alone where that can be built.

    Fields that cannot go back alone, such as the widths of an encoder and of its decoder, go back together.
    """
    alone = {field: [field] for field in fields if _can_be_built(base, fields, [field])}
    together = [field for field in fields if field not in alone]
    return alone | ({" and ".join(together): together} if together else {})


def _can_be_built(base: RunConfig[Any], fields: dict[str, Any], left_out: Sequence[str]) -> bool:
    try:
        model_size(override(base, {field: value for field, value in fields.items() if field not in left_out}))
    except (UserError, ValueError):
        return False
    return True


# ------------------------------------------------------------------------------------------- result


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What the winner's value of a field, or of a few, brings."""

    without: str
    """The fields, separated by "and"."""
    values: dict[str, tuple[Any, Any]]
    """By field: the winner's value, and the default."""
    mean: float
    """Mean over the new seeds with the defaults in their place, bits per byte; NaN without a result."""
    gain: Difference | None
    """By how much the winner is better than that; ``None`` where it cannot be said."""

    def __str__(self) -> str:
        values = ", ".join(
            f"{field} {short(default)} instead of {short(value)}" for field, (value, default) in self.values.items()
        )
        if self.gain is None:
            return f"{values}: no result in common"
        gain, worse = self.gain, self.gain.bits >= 0
        low, high = (gain.low, gain.high) if worse else (-gain.high, -gain.low)
        found = f"{'worse' if worse else 'better'} by {abs(gain.bits):.3f} bits per byte"
        apart = "" if low > 0 else "not told apart: "
        return f"{values}: {apart}{found} (95% interval {low:.3f} to {high:.3f})"


def effects(plan: Plan, trials: Sequence[Trial], location: Storage) -> list[Effect]:
    """Return what each field of the ablated winner brings, the most first; empty for a search that ablates nothing.

    Args:
        location: storage of the search.

    Raises:
        UserError: an outcome of a repeat cannot be read.
    """
    if not plan.ablates or plan.confirm is None:
        return []
    found = repeated(trials, plan.search_objective, plan.confirm)
    full = next((each for each in found if each.trial.params.get(PARAMETER) == NOTHING), None)
    if full is None:
        return []
    made = []
    for each in found:
        if each is full:
            continue
        before, after = flatten(full.trial.config), flatten(each.trial.config)
        made.append(
            Effect(
                without=str(each.trial.params.get(PARAMETER)),
                values={field: (before[field], after[field]) for field in before if before[field] != after[field]},
                mean=each.mean(plan.search_objective.metric),
                gain=compare(full, each, plan.search_objective, location, plan.seed),
            )
        )
    return sorted(made, key=lambda effect: math.inf if effect.gain is None else -effect.gain.bits)


def effects_json(found: Sequence[Effect]) -> list[dict[str, Any]]:
    """Return effects for ``ablation.json``; a number that is not finite is null."""
    return [{**asdict(effect), "mean": effect.mean if math.isfinite(effect.mean) else None} for effect in found]
