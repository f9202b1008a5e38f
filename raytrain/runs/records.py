"""Records of runs and searches: every file name and JSON record below their storage, in one place.

A search's folder holds ``search.json`` (its plan), ``study.journal`` (its Optuna study) and, below ``trials``, a run's
folder for each trial. A run's folder holds ``run.json`` (the owner of its name), ``mlflow.json`` (its MLflow run) and
``checkpoints``. It also holds ``outcome.json`` once the run has ended, and ``unsent_metrics.jsonl`` if MLflow did not
accept everything. Both kinds of folder hold drivers' leases.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, get_args

from raytrain.config.schema import RunConfig, differences, fingerprint, from_dict, to_dict
from raytrain.config.workers import WorkerOptions, parse_workers
from raytrain.data.cache import CORPORA
from raytrain.data.corpus import Corpus
from raytrain.metrics import REQUIRED_METRICS, Objective, SearchObjective
from raytrain.storage import ARTIFACTS, open_storage
from raytrain.storage.base import NotFoundError, Storage, StorageError, retry_storage
from raytrain.storage.lease import LEASES
from raytrain.utils.errors import UserError, check_text
from raytrain.utils.validation import parse_json, validate_object, validate_type

if TYPE_CHECKING:
    from raytrain.tracking.runs import Run

RUN = "run.json"
"""Owner of a run's name: its identity, config, corpus and workers."""
ADDRESS = "mlflow.json"
"""Address of a run's MLflow run."""
CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints."""
OUTCOME = "outcome.json"
"""Outcome of a run that has ended; such a run is never trained again."""
UNSENT = "unsent_metrics.jsonl"
"""Records that MLflow did not accept before the run or search ended, for ``python -m raytrain.tracking send``."""
PLAN = "search.json"
"""Plan of a search."""
BEST_CONFIG = "best_config.json"
"""Artifact of a search: the config of its winner."""
STUDY = "study.journal"
"""Optuna's study of a search, in Optuna's journal format: derived from the records of its trials."""
ENCODERS = "encoders"
"""Folder of a storage that holds encoders, each in a file named by its digest."""
FORMAT = 1
"""Version of the plan's format."""
EXPERIMENT = "raytrain"
"""Default MLflow experiment."""
TRAINED = {"best_step": int, "best": dict[str, float], "precision": str, "device": str, "samples": list[str]}
"""Keys of the outcome of a run that did not fail."""
_DIGEST = "[0-9a-f]{1,64}"
_IDENTITY = "[0-9a-f]{16}"


def check_name(name: str) -> None:
    """Make sure that ``name`` can be a folder of the storage.

    Raises:
        UserError: it cannot be.
    """
    taken = (ARTIFACTS, CORPORA, ENCODERS)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name in taken:
        names = ", ".join(map(repr, taken))
        raise UserError(f"--name {name!r}: use letters, digits, '.', '_' and '-', at most 100, and none of {names}")


def new_identity() -> str:
    """Return the identity of a new search, trial or run: 16 hexadecimal digits, drawn once and then kept in its record.

    Nothing else identifies it: people choose the same names, and two runs may have the same config.
    """
    return secrets.token_hex(8)


def holds_something(location: Storage) -> bool:
    """Return whether a name has more than leases of drivers that ended before they recorded anything.

    Raises:
        StorageError: the store does not answer.
    """
    return any(not key.startswith(f"{LEASES}/") for key in location.list())


# ------------------------------------------------------------------------------------- owner of a name


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The owner of a run's name, and everything that resuming the run needs besides its checkpoints."""

    identity: str
    """The result of ``new_identity`` when the run was begun."""
    config: RunConfig[Any]
    corpus: str
    """Digest of its corpus."""
    corpus_path: str
    experiment: str
    """MLflow experiment in which it was begun and continues."""
    worker_options: WorkerOptions = field(default_factory=WorkerOptions)
    """Options of the workers with which it was begun."""


def check_free(storage: Storage, name: str) -> None:
    """Make sure that ``name`` belongs to a run or is free.

    Raises:
        UserError: it belongs to a search or to something else.
        StorageError: the store does not answer.
    """
    location = storage.child(name)
    if location.exists(RUN):
        return
    if location.exists(PLAN):
        raise UserError(f"--name {name} belongs to a search: choose another name")
    if holds_something(location) and not location.exists(RUN):  # another command may just have written it
        raise UserError(f"--name {name}: there is something else at {location.uri()} already; choose another name")


def claim_name(
    storage: Storage,
    name: str,
    config: RunConfig[Any],
    corpus: Corpus,
    *,
    experiment: str,
    worker_options: WorkerOptions,
) -> Claim:
    """Return the claim of the run that owns ``name``; if the name is free, claim it for this config.

    If several callers claim a name at the same moment, one becomes its owner: see ``Storage.create``.

    Raises:
        UserError: the name belongs to a run with another config, to a search or to something else.
    """
    if (known := known_claim(storage, name, config, corpus)) is not None:
        return known
    own = Claim(
        identity=new_identity(),
        config=config,
        corpus=corpus.digest,
        corpus_path=str(corpus.path),
        experiment=experiment,
        worker_options=worker_options,
    )
    values = {each.name: getattr(own, each.name) for each in fields(own)}
    values |= {"config": to_dict(config), "worker_options": asdict(worker_options)}
    if storage.child(name).create(RUN, json.dumps(values, indent=2).encode()):
        return own
    stored = known_claim(storage, name, config, corpus)
    assert stored is not None  # another process was faster, and no claim is ever deleted
    return stored


def known_claim(storage: Storage, name: str, config: RunConfig[Any], corpus: Corpus) -> Claim | None:
    """Return the claim on ``name`` by the run of this config; ``None`` if the name is free.

    Raises:
        UserError: the name belongs to a run with another config, to a search or to something else.
    """
    check_name(name)
    location = storage.child(name)
    if not location.exists(RUN):
        check_free(storage, name)
        if not location.exists(RUN):
            return None
    stored = _read_owner(location)
    if fingerprint(stored.config, stored.corpus) != fingerprint(config, corpus.digest):
        changed = "; ".join(differences(to_dict(stored.config), to_dict(config))) or "another corpus"
        raise UserError(
            f"--name {name} belongs to a run with another config ({changed}); choose another name, "
            "or give the same config to resume that run"
        )
    return stored


def read_claim(storage: Storage, name: str) -> Claim:
    """Return the claim of the run that owns ``name``.

    Raises:
        UserError: there is no such run.
    """
    check_name(name)
    try:
        return _read_owner(storage.child(name))
    except NotFoundError:
        hint = (
            f"; {name} is a search: python -m raytrain.tune --resume {name}" if is_search(storage.child(name)) else ""
        )
        raise UserError(f"--resume {name}: there is no such run in {storage.uri()}{hint}") from None
    except StorageError as error:
        raise UserError(f"--resume {name}: {error}") from None


def _read_owner(location: Storage) -> Claim:
    """Return the claim that ``claim_name`` wrote.

    Raises:
        StorageError: it cannot be read.
        UserError: the file holds something else.
    """
    data = location.read(RUN)
    try:
        values = validate_type(parse_json(data), dict[str, Any], "it")
        made = {
            "experiment": values.get("experiment", EXPERIMENT),
            "worker_options": validate_object(WorkerOptions, values.get("worker_options", {}), "worker_options."),
            "config": from_dict(values.get("config", {})),
        }
        claim = validate_object(Claim, {**values, **made})
        if not re.fullmatch(_IDENTITY, claim.identity):
            raise ValueError("it has no identity")
        if not re.fullmatch(_DIGEST, claim.corpus):
            raise ValueError("it names no corpus")
        os.fsencode(claim.corpus_path)
        check_text(claim.experiment, "experiment")
        parse_workers(claim.worker_options.workers)
        return claim
    except (UserError, ValueError) as error:
        raise UserError(f"{location.uri(RUN)} does not say whose the name is ({error}): choose another name") from None


def is_run(location: Storage) -> bool:
    """Return whether a run has claimed the name of this storage; False if the store does not answer."""
    return _holds(location, RUN)


def is_search(location: Storage) -> bool:
    """Return whether a search has claimed the name of this storage; False if the store does not answer."""
    return _holds(location, PLAN)


def _holds(location: Storage, key: str) -> bool:
    with contextlib.suppress(StorageError):
        return location.exists(key)
    return False


# ---------------------------------------------------------------------------------- what a run leaves


def write_run_address(location: Storage, run: Run) -> None:
    """Keep the address of a run's MLflow run beside its checkpoints."""
    location.write(ADDRESS, json.dumps(run.address()).encode())


def add_unsent(location: Storage, records: list[dict[str, Any]]) -> None:
    """Append the records that MLflow did not accept at a run's end to those that it did not accept earlier.

    Raises:
        StorageError: the storage did not accept them within ``patience()`` seconds.
    """
    before = retry_storage(lambda: location.read(UNSENT) if location.exists(UNSENT) else b"")
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    retry_storage(lambda: location.write(UNSENT, before + lines))


def write_failure(location: Storage, reason: str) -> None:
    """Record as the outcome of a run that it failed, and why.

    Raises:
        StorageError: the storage did not accept it within ``patience()`` seconds.
    """
    retry_storage(lambda: location.write(OUTCOME, json.dumps({"error": reason, "unsent": 0}).encode()))


def read_outcome(storage: str) -> dict[str, Any] | None:
    """Return the outcome of a run that has ended; ``None`` if it has not ended.

    Raises:
        UserError: the file holds something else.
    """
    location = open_storage(storage)
    if not retry_storage(lambda: location.exists(OUTCOME)):
        return None
    try:
        outcome = validate_type(parse_json(retry_storage(lambda: location.read(OUTCOME))), dict[str, Any], "it")
        failed = {name: str for name in ("error", "early_stopped") if name in outcome}
        for name, hint in (failed or TRAINED).items():
            validate_type(outcome.get(name), hint, name)
        if not failed and (missing := set(REQUIRED_METRICS) - outcome["best"].keys()):
            raise ValueError(f"best has no {min(missing)}")
        validate_type(outcome.get("unsent", 0), int, "unsent")
        return outcome
    except ValueError as error:
        raise UserError(
            f"{location.uri(OUTCOME)} is not the outcome of a run ({error}): delete it, and the run is resumed from "
            "its newest checkpoint"
        ) from None


# -------------------------------------------------------------------------------------------- searches


def read_values(storage: Storage) -> dict[str, Any] | None:
    """Return the plan of the search under ``storage`` as JSON, with its corpus checked; ``None`` if there is none.

    Raises:
        UserError: the plan cannot be read, or has a newer version.
    """
    try:
        values = parse_json(storage.read(PLAN))
    except NotFoundError:
        return None
    except StorageError as error:
        raise UserError(f"storage: {error}") from None
    except ValueError as error:
        raise UserError(f"{storage.uri(PLAN)} is not a search's plan: {error}") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(f"{storage.uri(PLAN)} is of another version of raytrain than this one")
    try:
        if not re.fullmatch(_DIGEST, validate_type(values.get("corpus"), str, "corpus")):
            raise ValueError("corpus is not a digest")
        check_text(validate_type(values.get("corpus_path"), str, "corpus_path"), "corpus_path")
        if not re.fullmatch(_IDENTITY, validate_type(values.get("identity"), str, "identity")):
            raise ValueError("it has no identity")
    except (UserError, ValueError) as error:
        raise UserError(f"{storage.uri(PLAN)} is not a search's plan: {error}") from None
    return values


def search_objective_of(values: dict[str, Any]) -> SearchObjective:
    """Return the search objective of a plan's JSON or of an MLflow run's parameters; by default the lowest bound.

    Raises:
        UserError: there is no such objective.
    """
    objective: Any = values.get("objective") or "bound"
    min_used = values.get("min_used") or 0.0
    try:
        if objective not in get_args(Objective) or not 0 <= float(min_used) < math.inf:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"there is no search objective {objective!r} with min_used {min_used!r}") from None
    return SearchObjective(objective, float(min_used))
