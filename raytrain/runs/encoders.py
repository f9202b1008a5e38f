"""Encoders that new runs start from: found in stored checkpoints, and kept in the storage under their digests.

An encoder is everything that computes q(z | x), as declared by the model. A run starts from it with a newly initialised
decoder (Li et al. 2019). Once an encoder has been stored, no run needs the checkpoint it came from.
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
    """The value of ``--encoder-from``: a model reference, or a digest."""
    tensors: Mapping[str, Tensor]
    """Its parameters and buffers, by their names in the model."""

    @property
    def data(self) -> bytes:
        """The content of its file: equal weights give equal bytes."""
        return safetensors.torch.save(dict(self.tensors))

    @property
    def digest(self) -> str:
        """SHA-256 digest of its file, by which configs name it."""
        return hashlib.sha256(self.data).hexdigest()

    def check(self, config: RunConfig[Any]) -> None:
        """Make sure that it fits the model of ``config``.

        Raises:
            UserError: the model has no encoder, or one whose tensors have other names, shapes or types.
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
        """Put it into ``storage``, unless it is there already.

        Raises:
            StorageError: the storage does not accept it.
        """
        if not storage.exists(_key(self.digest)):
            storage.write(_key(self.digest), self.data)

    def named(self, config: RunConfig[Any]) -> RunConfig[Any]:
        """Return ``config`` with the digest instead of the reference, which is not part of a run's identity."""
        return dataclasses.replace(config, encoder_from=self.digest)

    def start(self, config: RunConfig[Any], storage: Storage) -> RunConfig[Any]:
        """Check the encoder and store it; return the config of a run that starts from it.

        Raises:
            UserError: see ``check``.
        """
        self.check(config)
        self.publish(storage)
        return self.named(config)


def find_encoder(config: RunConfig[Any], storage: Storage) -> Encoder | None:
    """Return the encoder that ``config`` starts from; ``None`` if it starts from new weights.

    The config names it by a model reference, or by its digest in ``storage``.

    Raises:
        UserError: there is no such model or encoder, or the model has no encoder.
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
    """Return the tensors of the encoder stored in ``storage`` under ``digest``.

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
