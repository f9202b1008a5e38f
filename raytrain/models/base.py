"""Interface of the networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor, nn

from raytrain.config.schema import RunConfig
from raytrain.data.pieces import Vocabulary
from raytrain.models.noise import Noise
from raytrain.models.terms import StreamState, Terms


class TextModel(Protocol):
    """A network that reads tokens, returns the terms of the ELBO, and generates text token by token.

    Implementations are ``nn.Module`` classes. Tokens are int64: bytes, the STOP and PAD of ``data.vocabulary`` and, in
    some vocabularies, longer pieces.
    """

    latent: int
    """Dimensions of the latent code z; 0 if the model has none."""
    length: int
    """Symbols of the longest text, STOP included."""
    vocabulary: Vocabulary
    """Its symbols. ``build`` sets it without the longer pieces, which come from the corpus or the checkpoint."""
    documents: bool
    """True if texts end with STOP; false for a model of windows."""

    @classmethod
    def from_config(cls, config: RunConfig[Any]) -> Self:
        """Build the model of a run, with weights drawn from PyTorch's global generator.

        It is also called on the ``meta`` device, to count parameters without memory for them.
        """

    def forward(self, tokens: Tensor, noise: Noise, input_dropout: float = 0.0) -> Terms:
        """Return the terms of the ELBO for ``tokens`` [batch, at most self.length], PAD after each STOP.

        On a GPU a training step is recorded for each batch shape and replayed. So everything that changes from step to
        step must come from ``tokens``, ``noise`` or tensors of the model. Python numbers keep their recorded values.
        """

    def predict(self, tokens: Tensor, z: Tensor) -> Tensor:
        """Return logits [batch, length, NUM_OUTPUTS] for ``tokens`` [batch, length], each given z and those before it.

        The model is in evaluation mode; ``z`` is [batch, latent].
        """

    def begin(self, z: Tensor) -> Any:
        """Return the decoder's state before the first byte, for codes z [batch, latent].

        A state has a method ``keep(rows)``, which returns the state of these rows of the batch only.
        """

    def advance(self, previous: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return logits [batch, NUM_OUTPUTS] for the byte after ``previous`` [batch], and the state after it."""


class StreamModel(TextModel, Protocol):
    """A language model that reads a stream chunk by chunk: it takes the state of each lane and returns it.

    Backpropagation is truncated at the beginning of each chunk: the states carry no gradients.
    """

    def stream_state(self, lanes: int) -> StreamState:
        """Return the initial state of ``lanes`` lanes."""

    def forward(
        self,
        tokens: Tensor,
        noise: Noise,
        input_dropout: float = 0.0,
        previous: Tensor | None = None,
        state: StreamState | None = None,
    ) -> Terms:
        """Return the terms for chunks ``tokens`` [lanes, length] after the symbols ``previous`` [lanes] and ``state``.

        ``Terms.state`` is the state after the chunks. Without ``previous`` and ``state``, each row of ``tokens`` begins
        a new sample.
        """

    def read(self, tokens: Tensor, previous: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Return logits [lanes, length, NUM_OUTPUTS] for each symbol of the chunks given all before, and the new state.

        The model is in evaluation mode.
        """


class LatentTextModel(TextModel, Protocol):
    """A ``TextModel`` with a latent code."""

    encoder_parts: tuple[str, ...]
    """Names of the attributes that hold the modules used by ``encode``, and only those."""

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | x), [batch, latent] each, in float32."""


if TYPE_CHECKING:

    class Model(nn.Module, StreamModel, LatentTextModel):
        """A module that implements ``TextModel``.

        It has ``encode`` only if ``latent`` is above 0, and the additions of ``StreamModel`` only if its spec says so.
        """

else:
    Model = nn.Module
