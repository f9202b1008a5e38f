"""Incremental decoding without gradients: LSTMs run one symbol at a time, with weights arranged for that."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raytrain.models.lstm import Lstm
from raytrain.models.products import affine


class LstmStep:
    """Step of an ``Lstm``. Its last inputs are a one-hot vector, whose product is looked up, not computed."""

    def __init__(self, lstm: Lstm, symbols: int) -> None:
        """Arrange the weights of ``lstm``, whose last ``symbols`` inputs (possibly 0) are the one-hot vector."""
        dense = lstm.input_size - symbols
        inputs, recurrent, *biases = (parameter.detach() for parameter in lstm.all_weights[0])
        bias = biases[0] + biases[1]
        self.weight = torch.cat((inputs[:, :dense], recurrent), dim=1)
        self.table = inputs[:, dense:].t() + bias if symbols else bias
        self.norm = lstm.norm

    def __call__(self, symbol: Tensor | None, dense: Tensor | None, hidden: Tensor, cell: Tensor) -> list[Tensor]:
        """Return hidden and cell state [batch, hidden] after ``symbol`` [batch] and ``dense`` [batch, inputs]."""
        inputs = hidden if dense is None else torch.cat((dense, hidden), dim=1)
        gates = affine(inputs, self.weight, self.table if symbol is None else self.table[symbol])
        if self.norm is not None:
            gates = self.norm(gates)
        width = hidden.shape[1]
        # slices of one tensor, in place: the work between the products is memory-bound
        keep = gates[:, : 2 * width].sigmoid_()
        update, output = gates[:, 2 * width : 3 * width].tanh_(), gates[:, 3 * width :].sigmoid_()
        cell = (keep[:, width:] * cell).addcmul_(keep[:, :width], update)
        return [output * cell.tanh(), cell]


@dataclass(frozen=True)
class LstmState:
    """State of a stack of LSTMs: weights, hidden and cell state [batch, hidden] of each layer."""

    steps: list[LstmStep]
    states: list[list[Tensor]]

    def advance(self, symbol: Tensor | None, dense: Tensor | None = None) -> tuple[Tensor, LstmState]:
        """Return the last layer's output [batch, hidden], and the state after it.

        The first layer reads ``dense`` [batch, inputs] and ``symbol`` [batch], or one of them; every other layer reads
        the output of the layer below.
        """
        states: list[list[Tensor]] = []
        for layer, (step, (hidden, cell)) in enumerate(zip(self.steps, self.states, strict=True)):
            states.append(step(symbol if layer == 0 else None, dense, hidden, cell))
            dense = states[-1][0]
        return states[-1][0], LstmState(self.steps, states)

    def keep(self, rows: Tensor) -> LstmState:
        """Return the state of these rows of the batch only."""
        return replace(self, states=[[state[rows] for state in layer] for layer in self.states])
