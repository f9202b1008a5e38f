"""Model references: the ways to name a trained model, and the checkpoint that each of them means.

A reference is the folder or ``s3://`` address of a checkpoint, or of a run or search (meaning its best checkpoint); or
the id of an MLflow run; or ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``models:/ID``.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from raytrain.metrics import SearchObjective
from raytrain.runs import checkpoint
from raytrain.runs.records import ADDRESS, CHECKPOINTS, PLAN, read_values, search_objective_of
from raytrain.runs.repeats import best_first, confirm_of
from raytrain.runs.trained_model import TrainedModel
from raytrain.runs.trials import TrialStore
from raytrain.storage import open_storage
from raytrain.storage.base import Storage, StorageError
from raytrain.tracking.client import (
    check_tracking,
    connect,
    download,
    explain,
    is_there,
    is_usable,
    retry_tracking,
    shown,
    tracking_uri,
)
from raytrain.tracking.logged_model import logged_model
from raytrain.tracking.runs import Run
from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json, validate_fields

if TYPE_CHECKING:
    from raytrain.runs.checkpoint import Checkpoint


@dataclass(frozen=True)
class ResolvedModel:
    """A resolved reference: a checkpoint and the MLflow run of its training."""

    stored: Checkpoint
    run: Run | None
    """MLflow run that the checkpoint belongs to; ``None`` if the tracking store does not have it."""


def resolve(reference: str) -> ResolvedModel:
    """Return the checkpoint that ``reference`` names, and its MLflow run.

    Raises:
        UserError: it does not exist, or is damaged.
    """
    try:
        if reference.startswith("models:/"):
            return _of_model(reference)
        if re.fullmatch(r"[0-9a-f]{32}", reference):
            return _of_run(reference)
        return _of_location(open_storage(reference))
    except StorageError as error:
        raise UserError(f"{reference}: {error}") from None


def load_logged_model(uri: str, model_id: str) -> Checkpoint:
    """Return the checkpoint inside a logged model.

    Raises:
        UserError: there is no such model, or it does not hold a valid checkpoint.
    """
    with tempfile.TemporaryDirectory(prefix="raytrain-") as scratch:
        try:
            location = retry_tracking(lambda: connect(uri).get_logged_model(model_id)).artifact_location
            folder = retry_tracking(lambda: download(uri, location, Path(scratch)))
        except (MlflowException, OSError, Boto3Error, BotoCoreError, ClientError) as error:
            raise UserError(f"model {model_id} cannot be fetched: {explain(error)}") from None
        found = sorted(folder.rglob("manifest.json"))
        if not found:
            raise UserError(f"model {model_id} holds no checkpoint of raytrain")
        try:
            loaded = checkpoint.load(found[0].parent)
        except UserError as error:
            raise UserError(f"model {model_id} does not load: {error}") from None
        return dataclasses.replace(loaded, uri=f"models:/{model_id}")


def _of_location(location: Storage) -> ResolvedModel:
    # look it up by name: listing an unknown folder could take for ever
    if location.exists("manifest.json"):
        stored = checkpoint.load(location)
        parts = location.uri().rsplit("/", 2)  # .../RUN/checkpoints/step-N
        owner = open_storage(parts[0] or "/") if parts[-2:-1] == [CHECKPOINTS] else None
    elif location.exists(PLAN):
        return _of_search(location)
    else:
        found = checkpoint.best(location.child(CHECKPOINTS))
        if found is None:
            folder = location.folder
            there = any(folder.iterdir()) if folder is not None and folder.is_dir() else location.list()
            what = "has no checkpoint that was evaluated" if there else "does not exist or is empty"
            raise UserError(
                f"{location.uri()} {what}: give a checkpoint, a run's folder, an MLflow run id or models:/NAME@ALIAS"
            )
        stored, owner = found, location
    if owner is None or not owner.exists(ADDRESS):
        return ResolvedModel(stored, None)
    try:
        return ResolvedModel(stored, _known_run(parse_json(owner.read(ADDRESS))))
    except (UserError, ValueError, TypeError):
        raise UserError(f"{owner.uri(ADDRESS)} is not the address of an MLflow run: delete it") from None


def _of_search(location: Storage) -> ResolvedModel:
    """Return the best checkpoint of a search's best trial, or of its confirmed winner's best seed if there is one."""
    records, values = TrialStore(location), read_values(location)
    search_objective = search_objective_of(values) if values is not None else SearchObjective()
    confirm = confirm_of(values) if values is not None else None
    for trial in best_first(records.read(), search_objective, confirm):
        own = records.location(trial.identity)
        if (stored := checkpoint.best(own.child(CHECKPOINTS))) is not None:
            return ResolvedModel(stored, _known_run(trial.run) if trial.run else None)
    raise UserError(f"no trial of the search {location.uri()} has left a checkpoint that was evaluated")


def _known_run(address: dict[str, Any]) -> Run | None:
    """Return the run if the current tracking store has it."""
    uri = tracking_uri()
    if not is_usable(uri):
        return None
    try:
        run = Run(uri, **validate_fields(Run, address))
    except (ValueError, TypeError):
        raise UserError(f"{address} is not the address of an MLflow run") from None
    try:
        connect(uri).get_run(run.run_id)
    except (MlflowException, SQLAlchemyError):
        return None
    return run


def _store() -> str:
    """Return the current tracking store.

    Raises:
        UserError: it cannot be used, or there is none yet.
    """
    uri = tracking_uri()
    if not is_there(uri):
        raise UserError(f"there is no tracking store {shown(uri)}; MLFLOW_TRACKING_URI says where to look")
    check_tracking(uri)
    return uri


def _of_run(run_id: str) -> ResolvedModel:
    uri = _store()
    try:
        found = connect(uri).get_run(run_id)
    except MlflowException:
        raise UserError(f"there is no run {run_id} in {shown(uri)}; MLFLOW_TRACKING_URI says where to look") from None
    run = Run(uri, found.info.experiment_id, run_id, found.info.start_time)
    if models := found.outputs.model_outputs if found.outputs else []:
        return ResolvedModel(load_logged_model(uri, models[-1].model_id), run)
    location = found.data.tags.get("raytrain.location")
    stored = checkpoint.best(open_storage(location).child(CHECKPOINTS)) if location else None
    if stored is None:
        raise UserError(f"run {run_id} has left no checkpoint that was evaluated")
    return ResolvedModel(stored, run)


def _of_model(reference: str) -> ResolvedModel:
    uri = _store()
    client = connect(uri)
    name, version, alias = _parts(reference)
    try:
        if alias:
            model_id = logged_model(client.get_model_version_by_alias(name, alias))
        elif version:
            model_id = logged_model(client.get_model_version(name, version))
        else:
            model_id = name
        model = client.get_logged_model(model_id)
        run = client.get_run(str(model.source_run_id))
    except MlflowException:
        raise UserError(
            f"there is no {reference} in {shown(uri)}: python -m raytrain.registry list shows what there is, "
            "and MLFLOW_TRACKING_URI says where to look"
        ) from None
    return ResolvedModel(
        load_logged_model(uri, model.model_id), Run(uri, run.info.experiment_id, run.info.run_id, run.info.start_time)
    )


def _parts(reference: str) -> tuple[str, str, str]:
    """Return the name (or model id), version and alias of a ``models:/`` address; the last two may be empty."""
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))?", reference)
    if match is None:
        raise UserError(f"{reference!r}: write models:/NAME@ALIAS, models:/NAME/VERSION or models:/ID")
    return match[1], match[2] or "", match[3] or ""


def load_model(reference: str) -> TrainedModel:
    """Load a trained model.

    Args:
        reference: folder or ``s3://`` address of a checkpoint, or of a run or search (its best checkpoint); or an
            MLflow run id, ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``models:/ID``.

    Raises:
        UserError: there is no such model, or its checkpoint is damaged.
    """
    return TrainedModel(resolve(reference).stored)
