"""Config of a training run: validation, JSON, dotted overrides and fingerprint.

A run is a pure function of (``RunConfig``, corpus, seed). Schedules start and end at fractions of ``RunConfig.steps``,
so that a longer run keeps its shape; ``ObjectiveConfig`` and ``OptimizerConfig`` say which fields are such fractions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Generic, Literal

from raytrain.config import models
from raytrain.config.changes import Change
from raytrain.config.models import (
    HybridConfig,
    ModelName,
    ModelT,
    known_models,
    require,
    require_piece_model,
    require_stream_model,
)
from raytrain.config.schedules import ObjectiveConfig, OptimizerConfig
from raytrain.config.vocabularies import longer_pieces
from raytrain.utils.errors import UserError, check_text
from raytrain.utils.validation import check_complete, validate_fields

__all__ = [
    "LOCATION",
    "Change",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RunConfig",
    "differences",
    "fingerprint",
    "flatten",
    "from_dict",
    "in_force",
    "override",
    "to_dict",
    "with_steps",
]

LOCATION = ("data", "data_path", "data_field")
"""Fields that locate the text of a run. They are no part of its fingerprint: the digest of its corpus is."""


@dataclass(frozen=True)
class RunConfig(Generic[ModelT]):
    """One training run."""

    model: ModelT
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: str = "synthetic"
    """Source of text: synthetic, ptb, ptb_characters, tweets, bios, a file, a folder, an s3:// address, or a prepared
    corpus."""
    data_path: str | None = None
    """File or folder that holds the source named by --data, if it is not to be downloaded; default: none."""
    data_field: str | None = None
    """Field or column that holds the text in JSON, tables and Parquet, A.B for B within A; default: none."""
    encoder_from: str | None = None
    """Checkpoint whose encoder the run starts from, with a new decoder (Li et al. 2019); the run's config names it by
    the digest of its weights; default: none."""
    vocabulary: str = "byte"
    """What a model reads and writes one at a time: byte; char, the bytes and the most frequent longer characters; or
    bpe:N, N pieces learnt from the training text. Texts and lengths are in bytes whatever it is."""
    sampling: Literal["windows", "documents", "stream"] = "windows"
    """Windows of ``length`` bytes from random positions; whole documents of at most that many symbols; or a stream:
    contiguous text in ``batch_size`` lanes, of which each step reads the next ``length`` bytes (or as many pieces as
    have so many on average), with the state of a language model carried from step to step."""
    length: int = 60
    """Bytes of a window or of a chunk of the stream, or symbols of the longest document, STOP included."""
    pool_bytes: int = 0
    """Text larger than this is read in pools of about this size, one after the other, each a random choice from all of
    it. A machine without the corpus copies only two pools at a time; 0 reads all text at once. Not for streams."""
    batch_size: int = 64
    """Samples of a step, over all workers together."""
    group_size: int = 16
    """Samples that share batch statistics and noise; batch_size is a multiple of it."""
    steps: int = 1000
    """Optimiser steps."""
    log_every: int = 20
    """Steps between two records of the training metrics."""
    evaluate_every: int = 250
    """Steps between two evaluations on the validation split."""
    evaluate_samples: int = 1024
    """Validation samples of an evaluation, chunks of a stream included; the same for every run on the corpus."""
    checkpoint_every: int = 250
    """Steps between two checkpoints."""
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Type of matrix products. auto is bfloat16 where the hardware has it, float16 on other GPUs from compute
    capability 7.0 on, else float32. tf32 is float32 with products of fewer digits, on GPUs. Weights, sums and losses
    are float32."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """Type in which several workers send each other their gradients. bfloat16 halves what a step sends, and
    keeps 8 significant bits of each number. One worker sends none."""
    graphs: Literal["auto", "off"] = "auto"
    """Whether training steps of one worker on a GPU are recorded as CUDA graphs and repeated, which saves the time in
    which the host asks for each operation; the results are the same, as long as all that changes from step to step in a
    model of a plugin comes from its inputs, its noise and its own tensors."""
    seed: int = 0
    """Seed of the weights, the samples and all noise."""
    changes: tuple[Change, ...] = ()
    """Fields that have another value from a step on: a list of objects with step, field and value. Population-based
    training makes it (``tune --algorithm pbt``). Only a config file can give it."""

    def __post_init__(self) -> None:
        for name in (
            "length",
            "batch_size",
            "group_size",
            "steps",
            "log_every",
            "evaluate_every",
            "evaluate_samples",
            "checkpoint_every",
        ):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(
            self.batch_size % self.group_size == 0,
            "batch_size",
            self.batch_size,
            f"must be a multiple of group_size ({self.group_size})",
        )
        require(self.pool_bytes >= 0, "pool_bytes", self.pool_bytes, "must not be negative")
        require(
            self.pool_bytes == 0 or self.sampling != "stream",
            "pool_bytes",
            self.pool_bytes,
            "a stream reads all text in its order; leave pool_bytes out, or take other sampling",
        )
        require(0 <= self.seed < 2**31, "seed", self.seed, "must be in [0, 2**31)")
        try:
            pieces = longer_pieces(self.vocabulary)
        except ValueError as error:
            raise ValueError(f"vocabulary is {self.vocabulary!r}: {error}") from None
        if pieces:
            require_piece_model(self.model, self.vocabulary)
        if self.sampling == "stream":
            require_stream_model(self.model)
        require(
            self.objective.rate == 0 or not getattr(self.model, "fixed_variance", False),
            "objective.rate",
            self.objective.rate,
            "model.fixed_variance fixes the KL; set one of them",
        )
        for change in self.changes:
            require(change.step < self.steps, "changes.step", change.step, f"must be below steps ({self.steps})")
            in_force(self, change.step)  # this checks the values
            require(
                change.field != "objective.rate" or min(change.value, self.objective.rate) > 0,
                "changes.value",
                change.value,
                "objective.rate may change from one rate to another only, both above 0",
            )
        if isinstance(self.model, HybridConfig):
            shrink = 2 ** len(self.model.feature_maps)
            require(
                shrink <= self.length,
                "model.feature_maps",
                self.model.feature_maps,
                f"{len(self.model.feature_maps)} convolutions of stride 2 "
                f"need a length of at least {shrink}, not {self.length}",
            )

    @property
    def model_name(self) -> ModelName:
        """Name of the model on the command line.

        Raises:
            UserError: the model is not registered in this process.
        """
        return models.model_name(self.model)

    @property
    def has_latent(self) -> bool:
        """True if the model has a latent code z."""
        return known_models()[self.model_name].has_latent

    @property
    def samples_noun(self) -> str:
        """The noun for its samples: windows, documents or, for a stream, chunks."""
        return "chunks" if self.sampling == "stream" else self.sampling


def in_force(config: RunConfig[ModelT], step: int) -> RunConfig[ModelT]:
    """Return the config in force at ``step``: the changes up to that step are applied, and no others are left.

    Raises:
        ValueError: a section refuses a value.
    """
    sections: dict[str, dict[str, float]] = {}
    for change in sorted(config.changes, key=lambda change: change.step):
        if change.step <= step:
            section, _, name = change.field.partition(".")
            sections.setdefault(section, {})[name] = change.value
    changed: dict[str, Any] = {
        section: dataclasses.replace(getattr(config, section), **values) for section, values in sections.items()
    }
    return dataclasses.replace(config, changes=(), **changed)


def with_steps(config: RunConfig[ModelT], steps: int) -> RunConfig[ModelT]:
    """Return the config of a run with this many steps; its changes stay at the same fractions of the steps."""
    moved = [
        dataclasses.replace(change, step=max(1, round(change.step * steps / config.steps))) for change in config.changes
    ]
    return dataclasses.replace(config, steps=steps, changes=tuple(change for change in moved if change.step < steps))


# ---------------------------------------------------------------------------------------------- JSON


def to_dict(config: RunConfig[Any]) -> dict[str, Any]:
    """Return a JSON-ready dictionary, which ``from_dict`` turns back into an equal config."""
    values = dataclasses.asdict(config)
    values["model"] = {"name": config.model_name, **values["model"]}
    return json.loads(json.dumps(values))


def from_dict(values: dict[str, Any]) -> RunConfig[Any]:
    """Return the config in a dictionary written by ``to_dict``.

    Raises:
        UserError: a field or model is unknown, a value has the wrong type, or the config refuses it.
    """
    if not isinstance(values, dict):
        raise UserError(f"config: expected an object, got {type(values).__name__}")
    model = values.get("model")
    model = model if isinstance(model, dict) else {}
    name = model.get("name")
    known = known_models()
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"config: model.name must be one of {', '.join(known)}, not {name!r}; "
            "a model of your own must be registered by a module that RAYTRAIN_PLUGINS names"
        )
    kind = known[name].config
    fields = {
        "model": _build(kind, {key: value for key, value in model.items() if key != "name"}, "model."),
        "objective": _build(ObjectiveConfig, values.get("objective", {}), "objective."),
        "optimizer": _build(OptimizerConfig, values.get("optimizer", {}), "optimizer."),
    }
    if isinstance(values.get("changes"), list):
        fields["changes"] = [_build(Change, change, "changes.") for change in values["changes"]]
    return _build(RunConfig, {**values, **fields}, "")


def flatten(config: RunConfig[Any]) -> dict[str, Any]:
    """Return the config as a flat dictionary of dotted names, as used for MLflow parameters and in search spaces."""
    flat: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            flat[name] = value
    return flat


def override(config: RunConfig[Any], changes: dict[str, Any]) -> RunConfig[Any]:
    """Return ``config`` with the dotted fields in ``changes`` replaced, as given by a search space.

    Raises:
        UserError: the config does not have such a field, or refuses its value.
    """
    values = to_dict(config)
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        target = values.get(section) if section else values
        if not isinstance(target, dict) or key not in target or isinstance(target[key], dict) or name == "model.name":
            raise UserError(
                f"unknown field {name!r} for {config.model_name}; known: {', '.join(sorted(flatten(config)))}"
            )
        target[key] = value
    return from_dict(values)


def fingerprint(config: RunConfig[Any], corpus_digest: str) -> str:
    """Return a hash of everything that determines a run's result: its resolved config (seed included) and its corpus.

    Two runs may share a fingerprint, so it is not an identity. The location of the text on this machine is left out,
    since the corpus digest identifies the text. The config names an encoder that the run starts from by its digest.
    """
    values = to_dict(config)
    for name in LOCATION:
        del values[name]
    payload = json.dumps([values, corpus_digest], sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()[:16]


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Return a line of text for each field that differs between two configs."""
    parts = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            parts.append(f"{prefix}{key} was {old}, is {new}")
    return parts


def _build(kind: type[Any], values: Any, prefix: str) -> Any:
    try:
        fields = validate_fields(kind, values, prefix)
        check_complete(kind, fields, prefix)
        for name, value in fields.items():
            if isinstance(value, float):
                require(math.isfinite(value), prefix + name, value, "must be a finite number")
            if isinstance(value, str):
                check_text(value, f"config: {prefix}{name}")
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"config: {error}") from None
