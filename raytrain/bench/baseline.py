"""Plain PyTorch baseline: the training step that a user would write without raytrain.

The equations are those of ``raytrain.models``, in float32: one-hot inputs, ``nn.LSTM``, ``nn.BatchNorm1d`` over the
whole batch, Adam. Raytrain's additions are left out: noise by sample group, batch statistics without PAD, free bits,
the multiplier of a rate. So is weight dropout: an LSTM with it has no plain version.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.config.models import ByteLstmConfig, HybridConfig, LstmVaeConfig
from raytrain.config.schedules import auxiliary_weight, kl_weight
from raytrain.config.schema import RunConfig
from raytrain.data.vocabulary import DROP, NUM_OUTPUTS, PAD, SIZE, STOP
from raytrain.models.posterior import Posterior


def one_hot(tokens: Tensor) -> Tensor:
    """Return one-hot vectors [..., SIZE]; zeros at PAD."""
    return F.one_hot(tokens, SIZE).float() * (tokens != PAD)[..., None]


def decoder_inputs(tokens: Tensor, dropout: float) -> Tensor:
    """Return the decoder's inputs for ``tokens`` [batch, length]; bytes are dropped with probability ``dropout``."""
    inputs = F.pad(tokens[:, :-1], (1, 0), value=STOP)
    if dropout > 0:
        dropped = (torch.rand(inputs.shape, device=inputs.device) < dropout) & (inputs < STOP)
        inputs = inputs.masked_fill(dropped, DROP)
    return inputs


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the total nats of all ``tokens``, without PAD."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=PAD, reduction="sum")


def draw(mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Draw z from N(mean, exp(log_variance)); return it and the KL to the standard normal, summed over all samples."""
    z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    return z, 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()


class PlainByteLstm(nn.Module):
    """The stacked LSTM language model."""

    def __init__(self, config: ByteLstmConfig) -> None:
        super().__init__()
        dropout = config.dropout if config.layers > 1 else 0.0  # nn.LSTM drops only between layers, and warns for one
        self.lstm = nn.LSTM(SIZE, config.hidden, config.layers, batch_first=True, dropout=dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.hidden, NUM_OUTPUTS)

    def forward(self, tokens: Tensor, weight: float, alpha: float, input_dropout: float) -> Tensor:
        """Return the loss of ``tokens`` [batch, length], summed over the batch; there is no KL to weight."""
        hidden, _ = self.lstm(one_hot(decoder_inputs(tokens, input_dropout)))
        return cross_entropy(self.output(self.dropout(hidden)), tokens)


class PlainLstmVae(nn.Module):
    """The LSTM VAE."""

    def __init__(self, config: LstmVaeConfig) -> None:
        super().__init__()
        self.encoder = nn.LSTM(SIZE, config.hidden, batch_first=True)
        self.pool, self.code_to_inputs = config.pool, config.code_to_inputs
        self.posterior = Posterior(config.hidden, config.latent, config.mean_norm, config.fixed_variance)
        self.first_state = nn.Linear(config.latent, 2 * config.hidden)
        width = SIZE + config.latent * config.code_to_inputs
        self.decoder = nn.LSTM(width, config.hidden, batch_first=True)
        self.output = nn.Linear(config.hidden, NUM_OUTPUTS)

    def forward(self, tokens: Tensor, weight: float, alpha: float, input_dropout: float) -> Tensor:
        """Return the loss of ``tokens`` [batch, length], summed over the batch."""
        outputs, _ = self.encoder(one_hot(tokens))
        z, kl = draw(*self.posterior(self._pooled(outputs, tokens != PAD)))
        hidden, cell = torch.tanh(self.first_state(z)).chunk(2, dim=-1)
        state = hidden[None].contiguous(), cell[None].contiguous()
        inputs = one_hot(decoder_inputs(tokens, input_dropout))
        if self.code_to_inputs:
            inputs = torch.cat((z[:, None].expand(-1, inputs.shape[1], -1), inputs), dim=-1)
        outputs, _ = self.decoder(inputs, state)
        return cross_entropy(self.output(outputs), tokens) + weight * kl

    def _pooled(self, outputs: Tensor, covered: Tensor) -> Tensor:
        """Pool ``outputs`` [batch, length, hidden] into the features [batch, hidden] that the posterior reads."""
        if self.pool == "mean":
            return (outputs * covered[..., None]).sum(1) / covered.sum(1, keepdim=True)
        if self.pool == "max":
            return torch.where(covered[..., None], outputs, -1).amax(1)
        return outputs[torch.arange(len(outputs), device=outputs.device), covered.sum(1) - 1]


class PlainHybrid(nn.Module):
    """The hybrid, with either net on top."""

    def __init__(self, config: HybridConfig, length: int) -> None:
        super().__init__()
        depth = len(config.feature_maps)
        self.code = config.feature_maps[-1], -(-length // 2**depth)
        self.padded_length = self.code[1] * 2**depth
        self.convolutions = nn.Sequential()
        for before, after in pairwise((SIZE, *config.feature_maps)):
            self.convolutions.append(nn.Conv1d(before, after, 3, stride=2, padding=1))
            self.convolutions.extend([nn.BatchNorm1d(after), nn.ReLU()])
        self.posterior = Posterior(self.code[0] * self.code[1], config.latent, config.mean_norm, config.fixed_variance)
        self.expand = nn.Linear(config.latent, self.code[0] * self.code[1])
        self.deconvolutions = nn.Sequential()
        for before, after in pairwise((self.code[0], *config.decoder_maps)):
            self.deconvolutions.append(nn.ConvTranspose1d(before, after, 3, stride=2, padding=1, output_padding=1))
            self.deconvolutions.extend([nn.BatchNorm1d(after), nn.ReLU()])
        self.auxiliary = nn.Linear(config.decoder_maps[-1], NUM_OUTPUTS)
        width = config.decoder_maps[-1] + SIZE
        self.top: nn.Module = (
            nn.LSTM(width, config.hidden, batch_first=True)
            if config.decoder == "lstm"
            else PlainByteNet(width, config.hidden, config.decoder_layers)
        )
        self.output = nn.Linear(config.hidden, NUM_OUTPUTS)
        self.skip, self.feature_scale = config.skip, config.decoder_maps[-1] ** -0.5

    def forward(self, tokens: Tensor, weight: float, alpha: float, input_dropout: float) -> Tensor:
        """Return the loss of ``tokens`` [batch, length], summed over the batch."""
        padded = F.pad(tokens, (0, self.padded_length - tokens.shape[1]), value=PAD)
        z, kl = draw(*self.posterior(self.convolutions(one_hot(padded).transpose(1, 2)).flatten(1)))
        features = self.deconvolutions(F.relu(self.expand(z)).unflatten(1, self.code))
        features = features.transpose(1, 2)[:, : tokens.shape[1]]
        inputs = one_hot(decoder_inputs(tokens, input_dropout))
        hidden, _ = self.top(torch.cat((features * self.feature_scale, inputs), dim=-1))
        auxiliary = self.auxiliary(features)
        logits = self.output(hidden) + auxiliary if self.skip else self.output(hidden)
        return cross_entropy(logits, tokens) + weight * kl + alpha * cross_entropy(auxiliary, tokens)


class PlainByteNet(nn.Module):
    """The causal convolutions that can stand in for the hybrid's LSTM."""

    def __init__(self, inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.resize = nn.Sequential(nn.Conv1d(inputs, 2 * hidden, 1), nn.BatchNorm1d(2 * hidden))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(hidden, 3 * hidden, 2), nn.BatchNorm1d(3 * hidden)) for _ in range(layers)
        )

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        """Map ``inputs`` [batch, length, inputs] to [batch, length, hidden] and no state, as ``nn.LSTM`` would."""
        candidate, gate = self.resize(inputs.transpose(1, 2)).chunk(2, dim=1)
        features = torch.tanh(candidate) * torch.sigmoid(gate)
        for block in self.blocks:
            update, carry, candidate = block(F.pad(features, (1, 0))).chunk(3, dim=1)
            features = torch.sigmoid(carry) * features + torch.sigmoid(update) * torch.tanh(candidate)
        return features.transpose(1, 2), None


PLAIN: dict[type, Callable[[RunConfig[Any]], nn.Module]] = {
    HybridConfig: lambda config: PlainHybrid(config.model, config.length),
    LstmVaeConfig: lambda config: PlainLstmVae(config.model),
    ByteLstmConfig: lambda config: PlainByteLstm(config.model),
}
"""Config class of a model -> its plain version."""


def has_plain(config: RunConfig[Any]) -> bool:
    """Return whether the model has a plain version. Without one there is nothing to compare or to count."""
    known = type(config.model) in PLAIN and config.vocabulary == "byte"
    return known and config.model.weight_dropout == 0 and not config.model.layer_norm


def build_plain(config: RunConfig[Any]) -> nn.Module:
    """Return the plain model of ``config``, which ``has_plain``."""
    return PLAIN[type(config.model)](config)


class PlainTrainer:
    """The plain model and its optimiser."""

    def __init__(self, config: RunConfig[Any], device: torch.device) -> None:
        self.config = config
        self.model = build_plain(config).to(device)
        settings = config.optimizer
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2)
        )

    def train_step(self, tokens: Tensor, step: int) -> Tensor:
        """Do an optimiser step on ``tokens`` [batch, length]; return the loss in nats per sample."""
        objective = self.config.objective
        self.optimizer.zero_grad()
        weight = kl_weight(objective, step, self.config.steps)
        alpha = auxiliary_weight(objective, step, self.config.steps)
        loss: Tensor = self.model(tokens, weight, alpha, objective.input_dropout) / len(tokens)
        loss.backward()
        if self.config.optimizer.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
        self.optimizer.step()
        return loss.detach()
