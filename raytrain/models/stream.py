"""Reading a stream: the state of its lanes from one batch of chunks to the next, in evaluation."""

from __future__ import annotations

from raytrain.data.batches import Batch
from raytrain.models import Model
from raytrain.models.terms import StreamState


def state_before(model: Model, batch: Batch, state: StreamState | None) -> StreamState | None:
    """Return the state of the lanes before ``batch``, given that after the previous one; ``None`` without a stream.

    If ``state`` is ``None``, return the initial state. Lanes that have ended leave the state: they are the last rows.
    """
    if batch.previous is None:
        return None
    if state is None:
        return model.stream_state(len(batch.tokens))
    return {name: lanes[: len(batch.tokens)] for name, lanes in state.items()}
