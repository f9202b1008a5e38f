"""LSTMs over symbols and dense features: our own implementation on CPUs, cuDNN's on GPUs."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.models import cpu_kernels, gpu_lstm
from raytrain.models.noise import Noise
from raytrain.models.symbols import OneHot

EPSILON = 1e-4
"""Added to the variance by layer normalisation, as in the code of Semeniuta et al. 2017."""
State = tuple[Tensor, Tensor]
"""Hidden and cell state before the first or after the last step, [batch, hidden] each."""


class Lstm(nn.LSTM):
    """One-layer LSTM, run by ``run_lstm`` or ``continue_lstm``.

    With ``weight_dropout`` a training step drops entries of the hidden-to-hidden matrix with this probability, the same
    ones for all samples and at all positions (DropConnect, as in Merity, Keskar and Socher 2018, section 2).

    With ``layer_norm`` the pre-activations of all gates, biases included, are normalised together, and each is then
    scaled and shifted, as in the code of Semeniuta et al. 2017. PyTorch has no such LSTM: on GPUs it is a loop over the
    steps.
    """

    def __init__(self, inputs: int, hidden: int, weight_dropout: float = 0.0, layer_norm: bool = False) -> None:
        super().__init__(inputs, hidden, batch_first=True)
        self.weight_dropout = weight_dropout
        self.norm = nn.LayerNorm(4 * hidden, eps=EPSILON) if layer_norm else None

    @torch.no_grad()
    def open_gates(self, dense: int) -> None:
        """Redraw the weights so that the output follows the newest input, as layers of a deep stack must at first.

        Input and output gates are open, the forget gate is nearly closed, and the recurrent weights are small. The
        weights of the ``dense`` features, which come first, are scaled by their number. If all weights are drawn from
        uniform(-0.1, 0.1), a tenth of the variation of the fourth of four layers is due to the newest byte. Here more
        than half is: docs/develop/log.md, 2026-11-29.
        """
        inputs, recurrent, bias, second_bias = self.all_weights[0]
        nn.init.uniform_(inputs, -0.5, 0.5)
        if dense:
            nn.init.uniform_(inputs[:, :dense], -((3 / dense) ** 0.5), (3 / dense) ** 0.5)
        bound = 0.3 * (3 / self.hidden_size) ** 0.5
        nn.init.uniform_(recurrent, -bound, bound)
        nn.init.zeros_(second_bias)
        for part, value in zip(bias.chunk(4), (1.0, -1.0, 0.0, 1.0), strict=True):  # input, forget, cell, output
            part.fill_(value)

    @torch.no_grad()
    def raise_symbols(self, dense: int) -> None:
        """Draw the weights of one-hot symbols, which follow ``dense`` features, from uniform(-1, 1).

        A gate reads one of them a step. If they are drawn from uniform(-0.1, 0.1), the outputs hardly differ from text
        to text (by a standard deviation of 0.02, here 0.15), and training begins by growing the weights:
        docs/develop/log.md, 2026-11-30.
        """
        nn.init.uniform_(self.all_weights[0][0][:, dense:], -1.0, 1.0)

    def weights(self, noise: Noise | None) -> list[Tensor]:
        """Return the weights of a pass: those of inputs and hidden state, and both biases.

        In training with ``noise``, the hidden-to-hidden matrix has entries dropped and the others scaled, so that each
        entry keeps its mean. Gradients reach the parameter itself.
        """
        weights: list[Tensor] = list(self.all_weights[0])
        inputs, recurrent, *biases = weights
        if self.training and noise is not None and self.weight_dropout > 0:
            keep = noise.keep_shared(1 - self.weight_dropout, *recurrent.shape)
            recurrent = recurrent * (keep.to(recurrent.dtype) / (1 - self.weight_dropout))
        return [inputs, recurrent, *biases]


def run_lstm(
    lstm: Lstm,
    one_hot: OneHot,
    symbols: Tensor | None,
    dense: Tensor | None = None,
    state: State | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Return the outputs [batch, length, hidden] of ``lstm``, which reads ``dense``, then one-hot vectors.

    Args:
        symbols: [batch, length], or None if the LSTM reads no symbols.
        dense: [batch, length, features], or None if it reads nothing else.
        state: state before the first step; None for zeros.
        noise: of the training step, for the weight dropout; None for none.
    """
    return continue_lstm(lstm, one_hot, symbols, dense, state, noise)[0]


def continue_lstm(
    lstm: Lstm,
    one_hot: OneHot,
    symbols: Tensor | None,
    dense: Tensor | None = None,
    state: State | None = None,
    noise: Noise | None = None,
) -> tuple[Tensor, State]:
    """Return the outputs of ``run_lstm`` and the state after the last step, without gradient and at least float32."""
    weights = lstm.weights(noise)
    ours = cpu_kernels.lstm
    if ours is not None and ours.ENABLED and weights[0].device.type == "cpu":
        norm = (None, None, 0.0) if lstm.norm is None else (lstm.norm.weight, lstm.norm.bias, EPSILON)
        kind = product_type(weights[0])
        outputs, *last = ours.Recurrence.apply(kind, symbols, dense, *(state or (None, None)), *norm, *weights)
        return outputs, (last[0], last[1])
    if lstm.norm is None and weights[0].device.type != "cpu":
        kind = product_type(weights[0])
        outputs, *last = gpu_lstm.run(kind, one_hot.identity, symbols, dense, state, weights, lstm.training)
        return outputs, (_carried(last[0]), _carried(last[1]))
    inputs = _joined(one_hot, symbols, dense)
    if lstm.norm is not None:
        return _normalised(inputs, state, lstm.norm, *weights)
    first = [
        inputs.new_zeros(1, len(inputs), lstm.hidden_size) if part is None else part[None].contiguous()
        for part in state or (None, None)
    ]
    kind = product_type(weights[0])
    wide = inputs.device.type == "cpu" and not has_narrow_lstm()
    if wide:
        inputs, *first = (part.to(weights[0].dtype) for part in (inputs, *first))
    with torch.autocast("cpu", enabled=False) if wide else nullcontext():
        # the function that nn.LSTM calls: the module would not take weights as arguments
        outputs, hidden, cell = torch.lstm(inputs, first, weights, True, 1, 0.0, lstm.training, False, True)
    if wide:
        outputs, hidden = outputs.to(kind), hidden.to(kind)
    return outputs, (_carried(hidden[0]), _carried(cell[0]))


def has_narrow_lstm() -> bool:
    """Return whether PyTorch's LSTM computes in bfloat16 on this CPU: without AVX-512 it raises an error."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_type(weight: Tensor) -> torch.dtype:
    """Return the type in which products with ``weight`` are computed: that of autocast, or the weight's own."""
    device = weight.device.type
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else weight.dtype


def _carried(state: Tensor) -> Tensor:
    """Return a state without gradient and at least float32."""
    return state.detach().to(torch.promote_types(state.dtype, torch.float32))


def _normalised(
    inputs: Tensor, state: State | None, norm: nn.LayerNorm, weight: Tensor, recurrent: Tensor, *biases: Tensor
) -> tuple[Tensor, State]:
    """Run an LSTM with layer normalisation step by step; return what ``continue_lstm`` returns."""
    products = F.linear(inputs, weight, biases[0] + biases[1]).unbind(1)
    wide = torch.promote_types(products[0].dtype, torch.float32)
    zeros = products[0].new_zeros(len(inputs), recurrent.shape[1])
    hidden, cell = (zeros, zeros) if state is None else state
    outputs = []
    for product in products:
        before = norm((product + F.linear(hidden.to(product.dtype), recurrent)).to(wide))
        update, keep, candidate, release = before.chunk(4, dim=1)
        cell = keep.sigmoid() * cell.to(wide) + update.sigmoid() * candidate.tanh()
        hidden = (release.sigmoid() * cell.tanh()).to(product.dtype)
        outputs.append(hidden)
    return torch.stack(outputs, dim=1), (hidden.detach().to(wide), cell.detach())


def _joined(one_hot: OneHot, symbols: Tensor | None, dense: Tensor | None) -> Tensor:
    """Return the inputs of an LSTM, [batch, length, features and symbols]."""
    inputs = [] if dense is None else [dense]
    if symbols is not None:
        vectors = one_hot(symbols)
        inputs.append(vectors if dense is None else vectors.to(dense.dtype))
    return torch.cat(inputs, dim=-1)
