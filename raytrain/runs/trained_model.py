"""A trained model as the Python API and the commands use it: it samples, reconstructs, interpolates and scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytrain.config.schema import RunConfig, from_dict
from raytrain.data.pieces import Vocabulary, byte_vocabulary
from raytrain.models import Model, build, build_empty, sampling
from raytrain.models.noise import Noise
from raytrain.models.sampling import Sample
from raytrain.runs import checkpoint as checkpoints
from raytrain.runs.checkpoint import Checkpoint
from raytrain.utils.errors import UserError


@dataclass(frozen=True)
class TextScore:
    """The likelihood of one text under a model."""

    reconstruction: float
    """-log p(text | z) in nats for one z drawn from q(z | text); exact -log p(text) without a latent code."""
    kl: float
    """KL(q(z | text) || p(z)) in nats; 0 without a latent code."""
    bits_per_byte: float
    """(reconstruction + kl) / (ln 2 x bytes of the text); infinite for an empty text."""

    @property
    def bound(self) -> float:
        """The negative ELBO in nats: an upper bound on -log p(text)."""
        return self.reconstruction + self.kl


class TrainedModel:
    """The model of a checkpoint, in evaluation mode, on a GPU if this machine has one.

    Texts are ``str`` or ``bytes``; a ``str`` is encoded as UTF-8. Every method raises ``RequestError`` (a
    ``ValueError``) for a text that is longer than the model's length and for a value outside its range.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Build the model of ``checkpoint``.

        Raises:
            UserError: the weights do not match the model in the checkpoint's config.
        """
        self.checkpoint = checkpoint
        self.config: RunConfig[Any] = from_dict(checkpoint.config)
        self.network: Model = from_checkpoint(checkpoint)
        self.network.to("cuda" if torch.cuda.is_available() else "cpu")

    def __repr__(self) -> str:
        return f"TrainedModel({self.config.model_name}, step {self.checkpoint.step}, {self.checkpoint.uri})"

    @property
    def length(self) -> int:
        """Longest text that the model reads or writes, in symbols (bytes and STOP)."""
        return self.network.length

    @property
    def latent(self) -> int:
        """Dimensions of the latent code; 0 if the model has none."""
        return self.network.latent

    def sample(
        self,
        num: int = 10,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_length: int | None = None,
        prefix: str | bytes = b"",
        seed: int = 0,
    ) -> list[Sample]:
        """Draw ``num`` texts; sample i depends on ``seed`` and i alone, however many are drawn.

        Args:
            num: number of texts.
            temperature: divides the logits; 0 takes the most likely byte each time.
            top_p: draw bytes only from the smallest set of most likely ones with this total probability.
            max_length: longest text in symbols; the model's length if ``None``.
            prefix: start of every text.
            seed: seed of the codes and of the bytes.
        """
        return sampling.sample(
            self.network,
            num,
            temperature=temperature,
            top_p=top_p,
            max_length=max_length,
            prefix=_bytes(prefix),
            seed=seed,
        )

    def reconstruct(
        self,
        texts: Sequence[str | bytes],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_length: int | None = None,
        seed: int = 0,
    ) -> list[Sample]:
        """Write one text for the posterior mean of each of ``texts``, greedily by default.

        Raises:
            RequestError: the model has no latent code.
        """
        return sampling.reconstruct(
            self.network,
            [_bytes(text) for text in texts],
            temperature=temperature,
            top_p=top_p,
            max_length=max_length,
            seed=seed,
        )

    def interpolate(
        self,
        a: str | bytes,
        b: str | bytes,
        steps: int = 7,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_length: int | None = None,
        seed: int = 0,
    ) -> list[Sample]:
        """Decode ``steps`` codes evenly spaced from the posterior mean of ``a`` to that of ``b``, both included.

        Raises:
            RequestError: the model has no latent code, or ``steps`` is less than 2.
        """
        return sampling.interpolate(
            self.network,
            _bytes(a),
            _bytes(b),
            steps,
            temperature=temperature,
            top_p=top_p,
            max_length=max_length,
            seed=seed,
        )

    def encode(self, texts: Sequence[str | bytes]) -> torch.Tensor:
        """Return the means of q(z | text), [len(texts), latent], on the CPU.

        Raises:
            RequestError: the model has no latent code.
        """
        return sampling.posterior_means(self.network, [_bytes(text) for text in texts]).cpu()

    def score(self, texts: Sequence[str | bytes], *, seed: int = 0) -> list[TextScore]:
        """Return the negative ELBO of each text, including the end of the text if the model has learnt ends.

        Args:
            texts: texts of at most the model's length.
            seed: seed of the single draw of z for each text; the draw for text i depends on ``seed`` and i alone.
        """
        scores = []
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            for number, text in enumerate(map(_bytes, texts)):
                tokens = sampling.tokenise(self.network, [text]).to(device)
                terms = self.network(tokens, Noise(seed, 0, range(number, number + 1), 1, device=device))
                reconstruction, kl = terms.reconstruction.item(), terms.kl.sum().item()
                bits = (reconstruction + kl) / (math.log(2) * len(text)) if text else math.inf
                scores.append(TextScore(reconstruction, kl, bits))
        return scores


def load(location: str | Path) -> Model:
    """Return the trained model of a checkpoint folder or ``s3://`` address, in evaluation mode.

    Raises:
        UserError: it is not a checkpoint, or is damaged.
    """
    return from_checkpoint(checkpoints.load(location))


def from_checkpoint(stored: Checkpoint) -> Model:
    """Return the trained model of an open checkpoint, in evaluation mode.

    Raises:
        UserError: its weights do not match the model in its config.
    """
    try:
        config = from_dict(stored.config)
        expected = build_empty(config).state_dict()  # first: a config may describe a model too large for memory
    except (UserError, RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"checkpoint {stored.uri}: its config is not that of a model: {error}") from None
    weights = stored.matching("model", expected)
    model = build(config)
    model.load_state_dict(weights)
    model.vocabulary = stored_vocabulary(stored)
    return model.eval()


def stored_vocabulary(stored: Checkpoint) -> Vocabulary:
    """Return the vocabulary of an open checkpoint.

    Raises:
        UserError: its vocabulary is damaged, or is not the one in its config.
    """
    name = from_dict(stored.config).vocabulary
    if name == "byte":
        return byte_vocabulary()
    try:
        vocabulary = Vocabulary.from_values(stored.state.get("vocabulary"))
    except ValueError as error:
        raise UserError(f"checkpoint {stored.uri}: its vocabulary is damaged: {error}") from None
    if vocabulary.name != name:
        raise UserError(f"checkpoint {stored.uri}: its vocabulary is {vocabulary.name}, that of its config {name}")
    return vocabulary


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text
