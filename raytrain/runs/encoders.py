"""Encoders that new runs start from: found in stored checkpoints, and kept in the storage under their digests.

An encoder is everything that computes q(z | x), as the model declares it. A run starts from it with a decoder of new
weights (Li et al. 2019). Once an encoder has been kept, no run needs the checkpoint that it is from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from raytrain.config.schema import RunConfig
from raytrain.models import build_empty, encoder_tensors
from raytrain.runs.records import ENCODERS
from raytrain.runs.references import resolve
from raytrain.runs.trained_model import from_checkpoint
from raytrain.storage.base import NotFoundError, Storage, StorageError, retry_storage
from raytrain.utils.errors import UserError

DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Encoder:
    """The encoder of a trained model."""

    reference: str
    """What ``--encoder-from`` called it: a model reference, or a digest."""
    tensors: Mapping[str, Tensor]
    """Its parameters and statistics, by their names in the model."""

    @property
    def data(self) -> bytes:
        """The file that holds it: the same bytes for the same weights."""
        return safetensors.torch.save(dict(self.tensors))

    @property
    def digest(self) -> str:
        """SHA-256 sum of its file, by which configs name it."""
        return hashlib.sha256(self.data).hexdigest()

    def check(self, config: RunConfig[Any]) -> None:
        """Make sure that it is an encoder of the model of ``config``.

        Raises:
            UserError: the model has none, or one with other names, shapes or types of tensors.
        """
        own = encoder_tensors(build_empty(config))
        for name in sorted(own.keys() | self.tensors.keys()):
            sizes = [
                f"{list(group[name].shape)} of {group[name].dtype}" if name in group else "missing"
                for group in (self.tensors, own)
            ]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"--encoder-from {self.reference}: {name} is {sizes[0]} there, and {sizes[1]} in the "
                    f"{config.model_name} of this config"
                )

    def publish(self, storage: Storage) -> None:
        """Put it into ``storage``, unless it is there.

        Raises:
            StorageError: the storage does not take it.
        """
        if not storage.exists(_key(self.digest)):
            storage.write(_key(self.digest), self.data)

    def named(self, config: RunConfig[Any]) -> RunConfig[Any]:
        """Return ``config`` with the digest in place of the reference: what a run is does not depend on the latter."""
        return dataclasses.replace(config, encoder_from=self.digest)

    def start(self, config: RunConfig[Any], storage: Storage) -> RunConfig[Any]:
        """Return the config of a run that starts from it, once ``storage`` has it.

        Raises:
            UserError: see ``check``.
        """
        self.check(config)
        self.publish(storage)
        return self.named(config)


def find_encoder(config: RunConfig[Any], storage: Storage) -> Encoder | None:
    """Return the encoder that ``config`` starts from, ``None`` where it starts from new weights.

    The config names it by a model reference, or by the digest under which ``storage`` has it.

    Raises:
        UserError: there is no such thing, or the model has no encoder.
    """
    reference = config.encoder_from
    if reference is None:
        return None
    if DIGEST.fullmatch(reference):
        return Encoder(reference, read_encoder(storage, reference))
    try:
        tensors = encoder_tensors(from_checkpoint(resolve(reference).stored))
    except (UserError, StorageError) as error:
        raise UserError(f"--encoder-from: {error}") from None
    if not tensors:
        raise UserError(f"--encoder-from {reference}: that model has no encoder")
    return Encoder(reference, tensors)


def read_encoder(storage: Storage, digest: str) -> dict[str, Tensor]:
    """Return the tensors of the encoder that ``storage`` keeps under ``digest``.

    Raises:
        UserError: it is not there, or was altered.
        StorageError: the storage does not answer.
    """
    try:
        data = retry_storage(lambda: storage.read(_key(digest)))
    except NotFoundError:
        raise UserError(
            f"encoder_from: there is no {storage.uri(_key(digest))}; give --encoder-from the checkpoint that it was "
            "taken from, or --storage"
        ) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"encoder_from: {storage.uri(_key(digest))} was altered: delete it, and give the checkpoint")
    return safetensors.torch.load(data)


def _key(digest: str) -> str:
    return f"{ENCODERS}/{digest}.safetensors"
