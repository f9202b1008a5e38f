"""Interface of the networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor, nn

from raytrain.config.schema import RunConfig
from raytrain.data.pieces import Vocabulary
from raytrain.models.layers import StreamState, Terms
from raytrain.models.noise import Noise


class TextModel(Protocol):
    """A network that reads tokens, returns the terms of the ELBO, and generates text token by token.

    Implementations are ``nn.Module`` classes. Tokens are int64: bytes, the STOP and PAD of ``data.vocabulary`` and, of
    some vocabularies, longer pieces.
    """

    latent: int
    """Dimensions of the latent code z; 0 without one."""
    length: int
    """Symbols of the longest text, STOP included."""
    vocabulary: Vocabulary
    """Its symbols. ``build`` sets it, for longer pieces without any: those are its corpus's or its checkpoint's."""
    documents: bool
    """True if texts end with STOP; false for a model of windows."""

    @classmethod
    def from_config(cls, config: RunConfig[Any]) -> Self:
        """Build the model of a run, with weights drawn from PyTorch's global generator.

        It is also called on the ``meta`` device, to count parameters without memory for them.
        """

    def forward(self, tokens: Tensor, noise: Noise, input_dropout: float = 0.0) -> Terms:
        """Return the terms of the ELBO for ``tokens`` [batch, at most self.length], PAD after each STOP.

        On a GPU a training step is recorded for each shape of batch and repeated. So what changes from step to step
        must come from ``tokens``, ``noise`` and tensors of the model, not from Python's numbers: those stay as they
        were recorded.
        """

    def predict(self, tokens: Tensor, z: Tensor) -> Tensor:
        """Return logits [batch, length, NUM_OUTPUTS] of each of ``tokens`` [batch, length] given z and those before it.

        The model is in evaluation mode; ``z`` is [batch, latent].
        """

    def begin(self, z: Tensor) -> Any:
        """Return the decoder's state before the first byte, for codes z [batch, latent].

        A state has ``keep(rows)``: the state of these rows of the batch only.
        """

    def advance(self, previous: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return logits [batch, NUM_OUTPUTS] of the byte after ``previous`` [batch], and the state after it."""


class StreamModel(TextModel, Protocol):
    """A language model that reads a stream chunk by chunk: it takes the state of each lane and returns it.

    Training does not go back beyond the beginning of a chunk: the states have no gradients.
    """

    def stream_state(self, lanes: int) -> StreamState:
        """Return the state of so many lanes at their beginning."""

    def forward(
        self,
        tokens: Tensor,
        noise: Noise,
        input_dropout: float = 0.0,
        previous: Tensor | None = None,
        state: StreamState | None = None,
    ) -> Terms:
        """Return the terms for chunks ``tokens`` [lanes, length] after the symbols ``previous`` [lanes] and ``state``.

        ``Terms.state`` is the state after them. Without ``previous`` and ``state``, ``tokens`` are samples that begin.
        """

    def read(self, tokens: Tensor, previous: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Return logits [lanes, length, NUM_OUTPUTS] of each of the chunks' symbols given all before, and the state.

        The model is in evaluation mode.
        """


class LatentTextModel(TextModel, Protocol):
    """A ``TextModel`` with a latent code."""

    encoder_parts: tuple[str, ...]
    """Attributes that hold the modules which ``encode`` uses, and no others."""

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | x), [batch, latent] each, in float32."""


if TYPE_CHECKING:

    class Model(nn.Module, StreamModel, LatentTextModel):
        """A module that implements ``TextModel``.

        It has ``encode`` only where ``latent`` is above 0, and what ``StreamModel`` adds only where its spec says so.
        """

else:
    Model = nn.Module
