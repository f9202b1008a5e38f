"""What a user calls a trained model by, and the checkpoint that it means.

A reference is a checkpoint's folder or ``s3://`` address, that of a run or search (its best checkpoint), the
id of an MLflow run, or ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``models:/ID``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.errors import UserError
from raytrain.goal import Goal
from raytrain.json_text import parse_json, typed_fields
from raytrain.plan import PLAN, goal_of, read_values
from raytrain.storage import Storage, StorageError, open_storage
from raytrain.trials import Records, rank

if TYPE_CHECKING:
    from raytrain.checkpoint import Checkpoint
    from raytrain.tracking import Run

CHECKPOINTS = "checkpoints"
"""Where under a run's storage its checkpoints are."""
ADDRESS = "mlflow.json"
"""Under a run's storage: the address of its MLflow run."""


@dataclass(frozen=True)
class Found:
    """What a reference means."""

    stored: Checkpoint
    run: Run | None
    """The MLflow run that it belongs to, where the tracking store knows it."""


def open_checkpoint(reference: str) -> Found:
    """The checkpoint that ``reference`` means, and its MLflow run.

    Raises:
        UserError: there is no such thing, or it is damaged.
    """
    try:
        if reference.startswith("models:/"):
            return _of_model(reference)
        if re.fullmatch(r"[0-9a-f]{32}", reference):
            return _of_run(reference)
        return _of_place(open_storage(reference))
    except StorageError as error:
        raise UserError(f"{reference}: {error}") from None


def is_there(uri: str) -> bool:
    """Whether ``uri`` can be asked: to ask for a sqlite file that does not exist would make it."""
    from raytrain.tracking.server import SQLITE

    return not uri.startswith(SQLITE) or Path(uri.removeprefix(SQLITE)).exists()


def load_logged(uri: str, model_id: str) -> Checkpoint:
    """The checkpoint inside a logged model.

    Raises:
        UserError: there is no such model, or what it holds is no valid checkpoint.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException

    from raytrain import checkpoint
    from raytrain.tracking.server import connect, download, explain, patiently

    with tempfile.TemporaryDirectory(prefix="raytrain-") as scratch:
        try:
            location = patiently(lambda: connect(uri).get_logged_model(model_id)).artifact_location
            folder = patiently(lambda: download(uri, location, Path(scratch)))
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


def note_run(place: Storage, run: Run) -> None:
    """Keep the address of a run's MLflow run beside its checkpoints."""
    place.write(ADDRESS, json.dumps(run.address()).encode())


def _of_place(place: Storage) -> Found:
    from raytrain import checkpoint

    # asked for by name: to list a folder that is none of ours could take for ever
    if place.exists("manifest.json"):
        stored = checkpoint.load(place)
        parts = place.uri().rsplit("/", 2)  # .../RUN/checkpoints/step-N
        owner = open_storage(parts[0] or "/") if parts[-2:-1] == [CHECKPOINTS] else None
    elif place.exists(PLAN):
        return _of_search(place)
    else:
        found = checkpoint.best(place.child(CHECKPOINTS))
        if found is None:
            folder = place.folder
            there = any(folder.iterdir()) if folder is not None and folder.is_dir() else place.list()
            what = "has no checkpoint that was evaluated" if there else "does not exist or is empty"
            raise UserError(
                f"{place.uri()} {what}: give a checkpoint, a run's folder, an MLflow run id or models:/NAME@ALIAS"
            )
        stored, owner = found, place
    if owner is None or not owner.exists(ADDRESS):
        return Found(stored, None)
    try:
        return Found(stored, _known_run(parse_json(owner.read(ADDRESS))))
    except (UserError, ValueError, TypeError):
        raise UserError(f"{owner.uri(ADDRESS)} is not the address of an MLflow run: delete it") from None


def _of_search(place: Storage) -> Found:
    """The best checkpoint of a search's best trial."""
    from raytrain import checkpoint

    records, values = Records(place), read_values(place)
    goal = goal_of(values) if values is not None else Goal()
    for trial in rank(records.read(), goal):
        own = records.place(trial.identity)
        if (stored := checkpoint.best(own.child(CHECKPOINTS))) is not None:
            return Found(stored, _known_run(trial.run) if trial.run else None)
    raise UserError(f"no trial of the search {place.uri()} has left a checkpoint that was evaluated")


def _known_run(address: dict[str, Any]) -> Run | None:
    """The run, if the tracking store that is set now has it."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    from raytrain.tracking import Run, tracking_uri
    from raytrain.tracking.server import connect

    uri = tracking_uri()
    if not is_there(uri):
        return None
    try:
        run = Run(uri, **typed_fields(Run, address))
    except (ValueError, TypeError):
        raise UserError(f"{address} is not the address of an MLflow run") from None
    try:
        connect(uri).get_run(run.run_id)
    except (MlflowException, SQLAlchemyError):
        return None
    return run


def _store() -> str:
    """The tracking store that is set now.

    Raises:
        UserError: it cannot be used, or there is none yet.
    """
    from raytrain.tracking import check_tracking, tracking_uri

    uri = tracking_uri()
    if not is_there(uri):
        raise UserError(f"there is no tracking store {uri}; MLFLOW_TRACKING_URI says where to look")
    check_tracking(uri)
    return uri


def _of_run(run_id: str) -> Found:
    from mlflow.exceptions import MlflowException

    from raytrain import checkpoint
    from raytrain.tracking import Run
    from raytrain.tracking.server import connect, shown

    uri = _store()
    try:
        found = connect(uri).get_run(run_id)
    except MlflowException:
        raise UserError(f"there is no run {run_id} in {shown(uri)}; MLFLOW_TRACKING_URI says where to look") from None
    run = Run(uri, found.info.experiment_id, run_id, found.info.start_time)
    if models := found.outputs.model_outputs if found.outputs else []:
        return Found(load_logged(uri, models[-1].model_id), run)
    place = found.data.tags.get("raytrain.place")
    stored = checkpoint.best(open_storage(place).child(CHECKPOINTS)) if place else None
    if stored is None:
        raise UserError(f"run {run_id} has left no checkpoint that was evaluated")
    return Found(stored, run)


def _of_model(reference: str) -> Found:
    from mlflow.exceptions import MlflowException

    from raytrain.registry import logged_model
    from raytrain.tracking import Run
    from raytrain.tracking.server import connect, shown

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
    return Found(
        load_logged(uri, model.model_id), Run(uri, run.info.experiment_id, run.info.run_id, run.info.start_time)
    )


def _parts(reference: str) -> tuple[str, str, str]:
    """Name (or model id), version and alias of a ``models:/`` address; the last two may be empty."""
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))?", reference)
    if match is None:
        raise UserError(f"{reference!r}: write models:/NAME@ALIAS, models:/NAME/VERSION or models:/ID")
    return match[1], match[2] or "", match[3] or ""
