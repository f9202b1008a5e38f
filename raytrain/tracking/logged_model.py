"""A checkpoint as an MLflow model: safetensors, JSON and source code, nothing pickled."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import pyfunc
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

from raytrain.tracking.client import connect, retry_tracking
from raytrain.tracking.runs import DESCRIPTION, MAX_TAG, Run, flat
from raytrain.utils.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHECKPOINT_TAG = "raytrain.checkpoint"
MODEL_ID = "raytrain.model_id"
"""Tag of a registered version: the id of its logged model."""
PACKAGES = ("mlflow", "torch", "numpy", "safetensors")
"""Packages that the model needs where it is loaded; raytrain's own source travels inside the model."""
PIECES_PACKAGES = ("tokenizers",)
"""Packages that a model with learnt pieces needs as well."""


def log_model(
    run: Run, checkpoint: Path, *, name: str = "model", card: str, metrics: dict[str, float], step: int = 0
) -> str:
    """Log a checkpoint as the run's MLflow model and return its id (``models:/ID`` loads it).

    Calling it again with the same checkpoint gives the same model. Leftovers of an interrupted attempt are removed.

    Args:
        run: MLflow run that the model belongs to.
        checkpoint: local folder of a checkpoint that holds the weights and nothing else of the run; all of it goes
            into the model.
        name: name of the model in the run.
        card: model card in Markdown: ``README.md`` of the model and its description in the UI.
        metrics: metrics of the model, which the UI shows beside it and on the run.
        step: training step of the checkpoint.

    Raises:
        FileNotFoundError: the folder has no ``manifest.json`` or ``config.json``.
    """
    client = connect(run.uri)
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    length = config["length"]
    packages = (
        PACKAGES
        if config.get("vocabulary", "byte").partition(":")[0] in ("byte", "char")
        else PACKAGES + PIECES_PACKAGES
    )
    digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    if (existing := _find(run, name, digest)) is not None:
        retry_tracking(lambda: _link(run, existing, step))
        return existing
    created = client.create_logged_model(
        run.experiment_id,
        name,
        source_run_id=run.run_id,
        tags={CHECKPOINT_TAG: digest, DESCRIPTION: card[:MAX_TAG]},
        params=flat(config),
        model_type="text generation",
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        _save(folder, created, run, checkpoint, length, packages)
        (folder / "README.md").write_text(card, "utf-8")
        retry_tracking(lambda: client.log_model_artifacts(created.model_id, str(folder)))
    _log_metrics(run, created.model_id, metrics, step)
    retry_tracking(lambda: client.finalize_logged_model(created.model_id, LoggedModelStatus.READY))
    # last: the next attempt deletes an unfinished model, but nothing deletes a link to it
    retry_tracking(lambda: _link(run, created.model_id, step))
    return str(created.model_id)


def _find(run: Run, name: str, digest: str) -> str | None:
    """Return the run's finished model of this checkpoint, if any; delete unfinished ones."""
    client = connect(run.uri)
    found = retry_tracking(
        lambda: client.search_logged_models([run.experiment_id], f"source_run_id = '{run.run_id}' AND name = '{name}'")
    )
    for model in found:
        if model.status != "READY":
            retry_tracking(lambda model=model: client.delete_logged_model(model.model_id))  # type: ignore[misc]
        elif model.tags.get(CHECKPOINT_TAG) == digest:
            return str(model.model_id)
    return None


def _link(run: Run, model_id: str, step: int) -> None:
    """Make the model an output of the run; the store accepts that only once."""
    client = connect(run.uri)
    outputs = client.get_run(run.run_id).outputs
    if outputs is None or model_id not in {output.model_id for output in outputs.model_outputs}:
        client.log_outputs(run.run_id, [LoggedModelOutput(model_id, step)])


def _save(folder: Path, created: Any, run: Run, checkpoint: Path, length: int, packages: tuple[str, ...]) -> None:
    """Write the model's files to ``folder``."""
    signature = ModelSignature(
        # unnamed, so that a list of strings works as well as any column
        inputs=Schema([ColSpec("string")]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema(
            [
                ParamSpec("task", "string", "sample"),
                ParamSpec("num_texts", "long", 1),
                ParamSpec("temperature", "double", 1.0),
                ParamSpec("top_p", "double", 1.0),
                ParamSpec("max_length", "long", length),
                ParamSpec("seed", "long", 0),
            ]
        ),
    )
    pyfunc.save_model(
        folder,
        mlflow_model=Model(
            artifact_path=created.artifact_location,
            run_id=run.run_id,
            model_uuid=created.model_id,
            model_id=created.model_id,
        ),
        python_model=str(_source("raytrain.runs.pyfunc_model")),
        artifacts={"checkpoint": str(checkpoint)},
        signature=signature,
        input_example=([""], {"task": "sample", "num_texts": 3, "temperature": 0.8, "top_p": 0.95, "seed": 1}),
        pip_requirements=[f"{package}=={_public_version(package)}" for package in packages],
        code_paths=[str(_source("raytrain").parent)],
    )
    for compiled in list(folder.rglob("__pycache__")):
        shutil.rmtree(compiled)


def _source(module: str) -> Path:
    """Return the file of a module, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the source of {module} is not on this machine")
    return Path(spec.origin)


def _public_version(package: str) -> str:
    """Return the installed version without the local part of a build (``2.13.0+cpu``), which no index has."""
    return importlib.metadata.version(package).partition("+")[0]


def _log_metrics(run: Run, model_id: str, metrics: dict[str, float], step: int) -> None:
    client = connect(run.uri)
    # The checkpoint's step and the run's creation time make each entry the same however often this is repeated.
    entries = [
        Metric(key, value, run.created_ms, step, model_id=model_id, run_id=run.run_id) for key, value in metrics.items()
    ]
    retry_tracking(lambda: client.log_batch(run.run_id, metrics=entries))


def logged_model(version: ModelVersion) -> str:
    """Return the id of the logged model behind a registered version.

    Raises:
        UserError: the version was registered by other means.
    """
    if MODEL_ID not in version.tags:
        raise UserError(f"{version.name} version {version.version} was not registered by raytrain")
    return str(version.tags[MODEL_ID])
