"""Earlier searches known to a new one: which of their results its sampler starts with, and why others are left out.

``--warm-start`` names a search, or an MLflow experiment to mean all searches in it. Using their results beats training
the same configs again, so every comparable result becomes a finished trial of the sampler's study. Only a search
without any comparable result gives a start point instead: its winner, which is trained again.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FixedTrial, TrialState

from raytrain.config.schema import LOCATION, RunConfig, differences, to_dict
from raytrain.metrics import SearchObjective
from raytrain.models import num_parameters
from raytrain.runs.records import PLAN, STUDY, read_values, search_objective_of
from raytrain.runs.references import resolve
from raytrain.runs.repeats import searched
from raytrain.runs.trials import Trial, TrialStore
from raytrain.search.algorithms import learns, optuna_result
from raytrain.search.plan import EarlierSearch, WarmStart
from raytrain.search.space import Space
from raytrain.search.warm_start import read_warm_start
from raytrain.storage import open_storage
from raytrain.storage.base import Storage, StorageError
from raytrain.tracking.client import check_tracking, connect, is_there, retry_tracking, tracking_uri
from raytrain.tracking.queries import LOCATION as LOCATION_TAG
from raytrain.tracking.queries import searches
from raytrain.utils.errors import UserError

SAMPLES = ("sampling", "pool_bytes", "length", "evaluate_samples")
"""Fields that determine the validation samples of a run."""
KNOWN = "is known already"
"""Reason for leaving out a trial that another argument of ``--warm-start`` has already given."""
ASIDE = (*LOCATION, "log_every", "evaluate_every", "checkpoint_every", "seed")
"""Fields in which a result may differ from a trial of the new search; the text is compared by its digest."""


@dataclass(frozen=True, kw_only=True)
class NewSearch:
    """The new search, to which the results of earlier searches are compared."""

    space: Space
    bases: dict[str, RunConfig[Any]]
    budget: str | None
    algorithm: str
    search_objective: SearchObjective
    corpus: str
    """Digest of its corpus."""
    max_parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class WarmStarts:
    """The start configs and earlier results that ``--warm-start`` gives to a search."""

    starts: tuple[WarmStart, ...] = ()
    """The configs of its first trials."""
    earlier: tuple[EarlierSearch, ...] = ()
    """The searches whose results its sampler starts with."""


class Unlike(Exception):
    """A result cannot be compared with the new search."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        """A singular verb and its complement: "has other steps"."""
        self.detail = detail


def read_references(references: Sequence[str], new: NewSearch, storage: Storage) -> WarmStarts:
    """Return the start configs and earlier results that ``--warm-start`` gives to a new search in ``storage``.

    Raises:
        UserError: one names nothing, or something that cannot be read or does not fit the search.
    """
    starts: list[WarmStart] = []
    earlier: list[EarlierSearch] = []
    known: set[str] = set()
    for reference in references:
        try:
            found = find_searches(reference, storage)
            if found is None:
                starts.append(read_warm_start(reference, reference, new.bases))
                continue
            read = [_read(reference, each, new, known) for each in found]
            # what another reference has already given is comparable too
            if not any(each.trials or repeats for each, repeats in read):
                starts.append(_start(reference, found, read[0][0].note, new))
            earlier += [each for each, _ in read]
        except StorageError as error:
            raise UserError(f"--warm-start {reference}: {error}") from None
        except UserError as error:
            prefix = "" if str(error).startswith("--warm-start") else f"--warm-start {reference}: "
            raise UserError(f"{prefix}{error}") from None
    return WarmStarts(starts=tuple(starts), earlier=tuple(earlier))


def find_searches(reference: str, storage: Storage) -> list[Storage] | None:
    """Return the search that ``reference`` names, or an experiment's searches, newest first; ``None`` for a config.

    A search is named by its name in ``storage``, by its folder or address, or by a file of its own inside it.

    Raises:
        UserError: it names nothing.
        StorageError: the storage does not answer.
    """
    folder, _, file = reference.rpartition("/")
    if file in (PLAN, STUDY) and open_storage(folder or ".").exists(PLAN):
        return [open_storage(folder or ".")]
    if reference.startswith("models:/") or reference.endswith(".json") or re.fullmatch("[0-9a-f]{32}", reference):
        return None
    if re.fullmatch(r"\w[\w.-]*", reference) and storage.child(reference).exists(PLAN):
        return [storage.child(reference)]
    location = open_storage(reference)
    if location.exists(PLAN):
        return [location]
    if "/" in reference or (location.folder is not None and location.folder.exists()):
        return None
    found = _of_experiment(reference)
    if found is None:
        raise UserError(
            f"there is no such search in {storage.uri()}, no such folder, and no such experiment in MLflow; --storage "
            "and MLFLOW_TRACKING_URI say where to look"
        )
    return found


def _of_experiment(name: str) -> list[Storage] | None:
    """Return the searches of an MLflow experiment, newest first; ``None`` if there is no such experiment.

    Raises:
        UserError: no search is where its MLflow run says.
    """
    uri = tracking_uri()
    if not is_there(uri):
        return None
    check_tracking(uri)
    experiment = retry_tracking(lambda: connect(uri).get_experiment_by_name(name))
    if experiment is None or experiment.lifecycle_stage == "deleted":
        return None
    places = [search.tags.get(LOCATION_TAG, "") for search in searches(uri, experiment.experiment_id)]
    found = [storage for storage in map(open_storage, filter(None, places)) if storage.exists(PLAN)]
    if not found:
        raise UserError(f"experiment {name} has no search that is still where it was")
    return found


def _start(reference: str, found: Sequence[Storage], note: str, new: NewSearch) -> WarmStart:
    """Return the winner to train again: that of the newest of the searches whose winner has a checkpoint.

    Raises:
        UserError: none has; the message also gives the note about the newest.
    """
    for location in found:
        try:
            resolve(location.uri())
        except UserError:
            continue
        return read_warm_start(reference, location.uri(), new.bases)
    raise UserError(f"{note}: its best has left no checkpoint to train anew")


def _read(reference: str, location: Storage, new: NewSearch, known: set[str]) -> tuple[EarlierSearch, bool]:
    """Return what is known of one search, and whether some of it was already in ``known``; add its trials to ``known``.

    Raises:
        UserError: its records cannot be read.
    """
    values = read_values(location)
    if values is None:
        raise UserError(f"{location.uri()} is no search any more")
    trials = searched(TrialStore(location).read())
    comparable = _comparison(values, new)
    found: list[Trial] = []
    left_out: dict[str, list[str]] = {}
    for trial in trials:
        try:
            if trial.identity in known:
                raise Unlike(KNOWN)
            found.append(comparable(trial))
            known.add(trial.identity)
        except Unlike as unlike:
            left_out.setdefault(unlike.reason, []).append(unlike.detail)
    name = location.uri().rstrip("/").rpartition("/")[2]
    note = _note(name, len(found), len(trials), left_out)
    return EarlierSearch(reference=reference, name=name, note=note, trials=tuple(found)), KNOWN in left_out


def _note(name: str, num_known: int, num_trials: int, left_out: dict[str, list[str]]) -> str:
    """Return one line that says how many trials are known, and why others are left out."""
    parts = [f"{num_known} of {num_trials} trials of {name} {'is' if num_known == 1 else 'are'} known to the sampler"]
    for reason, details in left_out.items():
        verb, _, rest = reason.partition(" ")
        if len(details) > 1:
            verb = {"has": "have", "lies": "lie", "is": "are", "was": "were"}.get(verb, verb)
        shown = list(dict.fromkeys(filter(None, details)))
        detail = f" ({shown[0]}{', ...' if len(shown) > 1 else ''})" if shown else ""
        parts.append(f"{len(details)} {verb} {rest}".rstrip() + detail)
    return "; ".join(parts)


def _comparison(values: dict[str, Any], new: NewSearch) -> Callable[[Trial], Trial]:
    """Return the function that converts a trial of the search with the plan ``values`` for use by the new search.

    That function raises ``Unlike`` if the trial cannot be compared.
    """
    objective = search_objective_of(values).objective
    here = new.search_objective.objective

    def comparable(trial: Trial) -> Trial:
        if not learns(new.algorithm):
            raise Unlike(f"is of no use to the algorithm {new.algorithm}")
        if objective != here:
            raise Unlike("has another search objective", f"{objective}, here {here}")
        if values["corpus"] != new.corpus:
            raise Unlike("has another corpus", f"{values['corpus'][:12]}, here {new.corpus[:12]}")
        return _known(trial, new)

    return comparable


def _known(trial: Trial, new: NewSearch) -> Trial:
    """Return a trial of a comparable search, moved to its point of the new search's space.

    Raises:
        Unlike: it has no result, or its settings differ from those that the new search would use.
    """
    if not trial.ended:
        raise Unlike("has not ended")
    if optuna_result(trial, new.search_objective)[0] == TrialState.FAIL:
        raise Unlike("has no result")
    if not trial.distributions:
        raise Unlike("was no point of its space")
    if trial.member is not None:
        raise Unlike("is part of a population")
    if trial.config.model_name not in new.bases:
        raise Unlike("is of another model", trial.config.model_name)
    point, config = _point(trial, new)
    if trial.config.steps != config.steps:
        raise Unlike("has other steps", f"{trial.config.steps:,}, here {config.steps:,}")
    for name in SAMPLES:
        if getattr(trial.config, name) != getattr(config, name):
            there, here = getattr(trial.config, name), getattr(config, name)
            raise Unlike("has other validation samples", f"{name} {there}, here {here}")
    if changed := differences(_compared(trial.config), _compared(config)):
        raise Unlike("has other settings", changed[0])
    if new.max_parameters is not None and num_parameters(config) > new.max_parameters:
        raise Unlike("has more parameters", f"than {new.max_parameters:,}")
    kinds = {name: optuna.distributions.distribution_to_json(kind) for name, kind in point.distributions.items()}
    # drop what a sampler does not need: where the trial ran, and its history
    return dataclasses.replace(trial, params=dict(point.params), distributions=kinds, run={}, history=[])


def _point(trial: Trial, new: NewSearch) -> tuple[FixedTrial, RunConfig[Any]]:
    """Return a trial's point in the new space, and the config that the space makes of it.

    Raises:
        Unlike: this space lacks the parameters, or does not allow their values.
    """
    point = FixedTrial(trial.params)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about values out of range, which are found below
            config = new.space.resolve(new.bases, point, new.budget)
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        missing = re.search(
            r"parameter '(.+)' is not found", str(error)
        )  # Optuna's message about a parameter that the trial lacks
        reason = f"it has no {missing[1]}" if missing else " ".join(str(error).split())[:80]
        raise Unlike("lies outside this space", reason) from None
    for name, kind in point.distributions.items():
        value = point.params[name]
        try:
            optuna.trial.create_trial(params={name: value}, distributions={name: kind}, value=0.0)
        except ValueError:
            raise Unlike("lies outside this space", f"{name} {value}") from None
    return point, config


def _compared(config: RunConfig[Any]) -> dict[str, Any]:
    return {name: value for name, value in to_dict(config).items() if name not in ASIDE}
