"""Decoder nets taken one symbol at a time, with their weights arranged for it; nothing here is differentiated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from raytrain.models.cpu_lstm import affine


class LstmStep:
    """A one-layer ``nn.LSTM`` whose last inputs are a one-hot vector: what that adds is looked up, not multiplied."""

    def __init__(self, lstm: nn.LSTM, symbols: int) -> None:
        """``symbols``: how many of the LSTM's inputs, the last ones, are the one-hot vector; may be 0."""
        dense = lstm.input_size - symbols
        inputs, recurrent, *biases = (parameter.detach() for parameter in lstm.all_weights[0])
        bias = biases[0] + biases[1]
        self.weight = torch.cat((inputs[:, :dense], recurrent), dim=1)
        self.table = inputs[:, dense:].t() + bias if symbols else bias

    def __call__(self, symbol: Tensor | None, dense: Tensor | None, hidden: Tensor, cell: Tensor) -> list[Tensor]:
        """The hidden and cell states [batch, hidden] after ``symbol`` [batch] beside ``dense`` [batch, inputs]."""
        inputs = hidden if dense is None else torch.cat((dense, hidden), dim=1)
        gates = affine(inputs, self.weight, self.table if symbol is None else self.table[symbol])
        width = hidden.shape[1]
        # slices of one tensor, in place: what lies between the products is bound by memory
        keep = gates[:, : 2 * width].sigmoid_()
        update, output = gates[:, 2 * width : 3 * width].tanh_(), gates[:, 3 * width :].sigmoid_()
        cell = (keep[:, width:] * cell).addcmul_(keep[:, :width], update)
        return [output * cell.tanh(), cell]


@dataclass(frozen=True)
class LstmState:
    """Where a stack of LSTMs stands: of each layer its weights, its hidden and its cell state [batch, hidden]."""

    steps: list[LstmStep]
    states: list[list[Tensor]]

    def advance(self, symbol: Tensor, dense: Tensor | None = None) -> tuple[Tensor, LstmState]:
        """The last layer's output [batch, hidden], and the state after it.

        The first layer is given ``dense`` [batch, inputs] and ``symbol`` [batch], every other one the
        output of the layer below.
        """
        states: list[list[Tensor]] = []
        for layer, (step, (hidden, cell)) in enumerate(zip(self.steps, self.states, strict=True)):
            states.append(step(symbol if layer == 0 else None, dense, hidden, cell))
            dense = states[-1][0]
        return states[-1][0], LstmState(self.steps, states)

    def keep(self, rows: Tensor) -> LstmState:
        """The state of these rows of the batch only."""
        return replace(self, states=[[state[rows] for state in layer] for layer in self.states])
