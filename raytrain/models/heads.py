"""Heads that predict symbols, their likelihood, and the frequencies from which they start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.data.vocabulary import NUM_OUTPUTS, PAD
from raytrain.models import cpu_kernels, products
from raytrain.models.gpu_lstm import filled
from raytrain.models.symbols import outputs_of


class Head(nn.Linear):
    """Classifier over symbols. In training on GPUs its outputs are padded to a size that suits matrix products."""

    def forward(self, features: Tensor) -> Tensor:
        if features.device.type == "cpu":
            return products.linear(features, self.weight, self.bias)
        more = filled(self.out_features) - self.out_features
        if not self.training or more == 0:
            return super().forward(features)
        weight, bias = F.pad(self.weight, (0, 0, 0, more)), F.pad(self.bias, (0, more))
        return F.linear(features, weight, bias)[..., : self.out_features]


class SymbolHead(Head):
    """Classifier over the next symbol, whose bias starts at the log frequencies of the training text.

    With a bias near 0, the network below spends hundreds of steps learning the frequencies in weights that it needs for
    the context, and hundreds more unlearning them there.
    """

    def __init__(self, inputs: int, longer: int = 0) -> None:
        """``longer``: number of pieces longer than one byte that can be predicted too."""
        super().__init__(inputs, NUM_OUTPUTS + longer)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the nats [batch, length] of ``targets`` under ``logits`` [batch, length, outputs]; 0 at PAD."""
    scored, ignored = targets, PAD
    if logits.shape[-1] > NUM_OUTPUTS:  # with pieces, PAD's number is also that of an output
        scored, ignored = torch.where(targets == PAD, -1, outputs_of(targets)), -1
    rows, symbols = logits.flatten(0, 1), scored.flatten()
    if cpu_kernels.loss is not None and logits.device.type == "cpu":
        nats: Tensor = cpu_kernels.loss.CrossEntropy.apply(rows, symbols, ignored)
    else:
        nats = F.cross_entropy(rows.float(), symbols, ignore_index=ignored, reduction="none")
    return nats.view(targets.shape)


def start_from_frequencies(model: nn.Module, frequencies: Tensor) -> None:
    """Set the bias of every ``SymbolHead`` to the logarithms of ``frequencies`` [NUM_OUTPUTS], which sum to 1."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, SymbolHead):
                layer.bias.copy_(frequencies.log())
