"""What a search is, written down before it starts and read back to go on with it."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, get_args

from raytrain.config.schema import RunConfig, differences, from_dict, identity, to_dict
from raytrain.config.workers import WorkerOptions, parse_workers
from raytrain.data.corpus import Corpus
from raytrain.metrics import REQUIRED_METRICS, Objective, SearchObjective
from raytrain.storage import ARTIFACTS, open_storage
from raytrain.storage.base import NotFoundError, Storage, StorageError, retry_storage
from raytrain.utils.errors import UserError, check_text
from raytrain.utils.validation import parse_json, validate_fields, validate_type

if TYPE_CHECKING:
    from raytrain.tracking.runs import Run

PLAN = "search.json"
FORMAT = 1


def read_values(storage: Storage) -> dict[str, Any] | None:
    """The plan of the search under ``storage`` as JSON, its corpus's place and digest checked; ``None`` without one.

    Raises:
        UserError: the plan cannot be read, or is of a newer version.
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
        if not re.fullmatch("[0-9a-f]{1,64}", validate_type(values.get("corpus"), str, "corpus")):
            raise ValueError("corpus is not a digest")
        check_text(validate_type(values.get("corpus_path"), str, "corpus_path"), "corpus_path")
    except (UserError, ValueError) as error:
        raise UserError(f"{storage.uri(PLAN)} is not a search's plan: {error}") from None
    return values


def search_objective_of(values: dict[str, Any]) -> SearchObjective:
    """What the search of a plan's JSON looks for, or of its MLflow run's parameters; one of old the lowest bound.

    Raises:
        UserError: there is no such goal.
    """
    objective: Any = values.get("objective") or "bound"
    min_kl = values.get("min_kl") or 0.0
    try:
        if objective not in get_args(Objective) or not 0 <= float(min_kl) < math.inf:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"a search cannot look for objective {objective!r} with min_kl {min_kl!r}") from None
    return SearchObjective(objective, float(min_kl))


UNSENT = "unsent_metrics.jsonl"
"""Metrics that MLflow did not take before the run ended, for ``python -m raytrain.tracking send``."""
OUTCOME = "outcome.json"
"""Written under a run's storage when it has ended: it is not trained again."""
TRAINED = {"best_step": int, "best": dict[str, float], "precision": str, "device": str, "samples": list[str]}
"""What is in it of a run that did not fail."""


def read_outcome(storage: str) -> dict[str, Any] | None:
    """What a run that has ended left, ``None`` if it has not ended.

    Raises:
        UserError: something else stands there.
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
            f"{location.uri(OUTCOME)} is not the outcome of a run ({error}): delete it, and the run goes on from its "
            "newest checkpoint"
        ) from None


CHECKPOINTS = "checkpoints"
"""Where under a run's storage its checkpoints are."""
ADDRESS = "mlflow.json"
"""Under a run's storage: the address of its MLflow run."""


def write_run_address(location: Storage, run: Run) -> None:
    """Keep the address of a run's MLflow run beside its checkpoints."""
    location.write(ADDRESS, json.dumps(run.address()).encode())


EXPERIMENT = "raytrain"
"""MLflow experiment where no other is named."""
RUN = "run.json"
"""Says which run owns a name: its identity and config."""


def check_name(name: str) -> None:
    """Make sure that ``name`` can be a folder of the storage.

    Raises:
        UserError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name == ARTIFACTS:
        raise UserError(f"--name {name!r}: use letters, digits, '.', '_' and '-', at most 100, and not {ARTIFACTS!r}")


@dataclass(frozen=True)
class Claim:
    """Whose a name is: what a run is resumed by."""

    identity: str
    config: RunConfig[Any]
    corpus: str
    """Digest of its corpus."""
    corpus_path: str
    experiment: str
    """MLflow experiment that it was begun in, and goes on in."""
    worker_options: WorkerOptions = field(default_factory=WorkerOptions)
    """The workers that it was begun with; runs of before do not say it."""


def claim_name(
    storage: Storage, name: str, config: RunConfig[Any], corpus: Corpus, experiment: str, worker_options: WorkerOptions
) -> Claim:
    """The claim of the run that owns ``name``; a new name is taken for this config.

    Raises:
        UserError: the name belongs to a run with another config.
    """
    check_name(name)
    own = Claim(identity(config, corpus.digest), config, corpus.digest, str(corpus.path), experiment, worker_options)
    location = storage.child(name)
    if not location.exists(RUN):
        values = {each.name: getattr(own, each.name) for each in fields(own)}
        values |= {"config": to_dict(config), "worker_options": asdict(worker_options)}
        location.write(RUN, json.dumps(values, indent=2).encode())
        return own
    stored = _read_owner(location)
    if stored.identity != own.identity:
        changed = "; ".join(differences(to_dict(stored.config), to_dict(config))) or "another corpus"
        raise UserError(
            f"--name {name} belongs to a run with another config ({changed}); choose another name, "
            "or give the same config to resume that run"
        )
    return stored


def read_claim(storage: Storage, name: str) -> Claim:
    """The claim of the run that owns ``name``.

    Raises:
        UserError: there is no such run.
    """
    check_name(name)
    try:
        return _read_owner(storage.child(name))
    except NotFoundError:
        raise UserError(f"--resume {name}: there is no such run in {storage.uri()}") from None
    except StorageError as error:
        raise UserError(f"--resume {name}: {error}") from None


def _read_owner(location: Storage) -> Claim:
    """What ``claim_name`` has written.

    Raises:
        StorageError: it cannot be read.
        UserError: it is something else.
    """
    data = location.read(RUN)
    try:
        stored = parse_json(data)
        stored.setdefault("experiment", EXPERIMENT)  # runs of before do not say it
        worker_options = WorkerOptions(
            **validate_fields(WorkerOptions, stored.get("worker_options", {}), "worker_options.")
        )
        config = from_dict(stored["config"])
        claim = Claim(**validate_fields(Claim, {**stored, "config": config, "worker_options": worker_options}))
        if not re.fullmatch("[0-9a-f]{1,64}", claim.corpus):
            raise ValueError("it names no corpus")
        os.fsencode(claim.corpus_path)
        check_text(claim.experiment, "experiment")
        parse_workers(claim.worker_options.workers)
        return claim
    except (UserError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{location.uri(RUN)} does not say whose the name is ({error}): choose another name") from None
