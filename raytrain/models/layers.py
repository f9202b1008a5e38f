"""Parts that models share: loss terms, one-hot inputs, batch statistics by group, posterior, likelihoods."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.data.vocabulary import DROP, NUM_OUTPUTS, PAD, SIZE, STOP, UNPREDICTED
from raytrain.models import cpu_kernels, fused_norm, products
from raytrain.models.gpu_lstm import filled
from raytrain.models.noise import Noise

StreamState = dict[str, Tensor]
"""State that a model carries from one chunk of a stream to the next: name -> [lanes, ...], float32, no gradients."""


@dataclass
class Terms:
    """Terms of the negative ELBO of a batch, in nats per sample and float32."""

    reconstruction: Tensor
    """[batch]: -log p(x | z), summed over the sample's bytes and its STOP."""
    kl: Tensor
    """[batch, latent]: KL(q(z | x) || p(z)) by dimension; [batch, 0] without a latent code."""
    auxiliary: Tensor
    """[batch]: reconstruction loss of the auxiliary head; zeros for models without one."""
    mean: Tensor
    """[batch, latent]: mean of q(z | x)."""
    log_variance: Tensor
    """[batch, latent]: log variance of q(z | x)."""
    z: Tensor
    """[batch, latent]: the code that the sample was reconstructed from."""
    swapped: Tensor | None = None
    """[batch]: the reconstruction with another sample's code; only in evaluation, by ``likelihood.swapped_loss``."""
    state: StreamState | None = None
    """The state after a chunk of a stream, for the next chunk; only if a state was given."""

    @classmethod
    def without_code(cls, reconstruction: Tensor) -> Terms:
        """Return the terms of a model that has neither a latent code nor an auxiliary head."""
        nothing = reconstruction.new_zeros(len(reconstruction), 0)
        return cls(reconstruction, nothing, torch.zeros_like(reconstruction), nothing, nothing, nothing)


class OneHot(nn.Module):
    """Map tokens [...] to one-hot vectors [..., SIZE]; PAD is all zeros, so that it carries no information.

    It is a look-up in the identity matrix. The recurrent networks and the first convolution see the one-hot vectors of
    the paper, with no embedding in between.
    """

    identity: Tensor

    def __init__(self, symbols: int = SIZE) -> None:
        super().__init__()
        # not torch.eye: on the meta device (build_empty) that imports torch's compiler, which takes seconds
        identity = torch.zeros(symbols, symbols).fill_diagonal_(1)
        if symbols > PAD:
            identity[PAD] = 0
        self.register_buffer("identity", identity, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.identity)


MOMENTUM = 0.1
"""Weight of a step's statistics in the running statistics."""


def piece_vectors(longer: int, width: int) -> nn.Embedding | None:
    """Return learnt vectors for all symbols of a vocabulary with ``longer`` pieces; ``None`` for bytes alone.

    With one-hot vectors of thousands of pieces, most of a network's weights would belong to pieces and be seldom
    trained.
    """
    return nn.Embedding(SIZE + longer, width) if longer else None


class GroupBatchNorm(nn.Module):
    """Batch normalisation over [batch, channels, length] with statistics of groups of samples.

    In training, statistics are taken over each group of ``group_size`` samples, without positions outside the mask. So
    they do not depend on how a batch is split over workers. In evaluation the running statistics are used;
    ``synchronise_statistics`` updates them once a step, identically on all ranks.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, group_size: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.group_size = group_size
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.batch_statistics: Tensor | None = None
        """[2, groups, channels]: statistics of this rank's groups, until ``synchronise_statistics`` takes them."""

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Normalise ``features`` [batch, channels, length] in float32; ``mask`` [batch, 1, length] holds 0s and 1s."""
        features = features.float()
        if not self.training:
            scale, shift = self.running_scale_and_shift()
            return features * scale[:, None] + shift[:, None]
        grouped = features.unflatten(0, (-1, self.group_size))
        weight = mask.unflatten(0, (-1, self.group_size))
        weight = weight / weight.sum((1, 3), keepdim=True)
        mean = (grouped * weight).sum((1, 3), keepdim=True)
        centred = grouped - mean
        variance = (centred.square() * weight).sum((1, 3), keepdim=True)
        self.batch_statistics = torch.stack((mean.detach(), variance.detach())).flatten(2)
        normalised = centred * torch.rsqrt(variance + self.epsilon)
        return (normalised * self.weight[:, None] + self.bias[:, None]).flatten(0, 1)

    def activate(self, features: Tensor, mask: Tensor, *, cover: bool) -> Tensor:
        """Normalise, apply ReLU and, if ``cover``, the mask; the result has the type of ``features``."""
        if self.training and fused_norm.kernels_for(features.device) is not None:
            settings = self.group_size, self.epsilon, cover
            activations, statistics = fused_norm.FusedNorm.apply(features, mask, self.weight, self.bias, *settings)
            self.batch_statistics = statistics.detach()
            return activations
        activations = F.relu(self(features, mask))
        return (activations * mask if cover else activations).to(features.dtype)

    def running_scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the scale and the shift of each channel in evaluation, [channels] each."""
        scale = self.weight * torch.rsqrt(self.running_var + self.epsilon)
        return scale, self.bias - self.running_mean * scale


def synchronise_statistics(model: nn.Module, num_groups: int, good: Tensor) -> Tensor:
    """Move the running statistics of every ``GroupBatchNorm`` and ``CodeNorm`` towards those of the whole batch.

    Call it once after each forward pass in training; ``num_groups`` counts the groups of all ranks. One small
    all-reduce keeps the statistics identical on all ranks at every step. So evaluation needs no reduction, and a
    checkpoint at any step is the same whichever rank writes it.

    ``good`` is a scalar bool, the same on all ranks. If it is false or a statistic is not finite, no statistic moves
    and the result is false; otherwise the result is true.
    """
    groups = [layer for layer in model.modules() if isinstance(layer, GroupBatchNorm)]
    codes = [layer for layer in model.modules() if isinstance(layer, CodeNorm)]
    layers: list[GroupBatchNorm | CodeNorm] = [*groups, *codes]
    if not layers:
        return good
    # a CodeNorm already has the statistics of the whole batch
    parts = [layer.batch_statistics for layer in codes if layer.batch_statistics is not None]
    if groups:
        each = torch.cat([layer.batch_statistics for layer in groups if layer.batch_statistics is not None], dim=2)
        parts.insert(0, _sum_over_ranks(each.sum(1)) / num_groups)
    means = torch.cat(parts, dim=1)
    good = good & means.isfinite().all()
    buffers = [layer.running_mean for layer in layers] + [layer.running_var for layer in layers]
    running = torch.cat(buffers)
    moved = torch.where(good, running.lerp(means.flatten(), MOMENTUM), running)
    torch._foreach_copy_(buffers, moved.split([len(buffer) for buffer in buffers]))
    for layer in layers:
        layer.batch_statistics = None
    return good


# ----------------------------------------------------------------------------------------- functions


def read_symbols(
    vectors: nn.Embedding | None, symbols: Tensor, dense: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return symbols and dense features that an LSTM reads, from ``symbols`` [...] and ``dense`` [..., features].

    With learnt ``vectors`` of symbols, everything it reads is dense, and the symbols are ``None``.
    """
    if vectors is None:
        return symbols, dense
    learnt = vectors(symbols)
    return None, learnt if dense is None else torch.cat((dense, learnt.to(dense.dtype)), dim=-1)


def shift_right(tokens: Tensor, previous: Tensor | None = None) -> Tensor:
    """Return a decoder's inputs: ``previous`` [batch], then ``tokens`` [batch, length] without the last.

    Without ``previous``, START comes first; it is the same symbol as STOP.
    """
    if previous is None:
        return F.pad(tokens[:, :-1], (1, 0), value=STOP)
    return torch.cat((previous[:, None], tokens[:, :-1]), dim=1)


def drop_input(inputs: Tensor, noise: Noise, probability: float) -> Tensor:
    """Replace input bytes and pieces by DROP with ``probability``; START and STOP stay."""
    if probability == 0:
        return inputs
    keep = noise.keep(1 - probability, inputs.shape[1])
    return torch.where(keep | ((inputs >= STOP) & (inputs < SIZE)), inputs, DROP)


def drop_features(features: Tensor, noise: Noise, probability: float) -> Tensor:
    """Set each of ``features`` [batch, length, width] to 0 with ``probability``; scale the others to keep the mean."""
    keep = noise.keep(1 - probability, *features.shape[1:])
    return features * keep.to(features.dtype) / (1 - probability)


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


def outputs_of(symbols: Tensor) -> Tensor:
    """Return the outputs that stand for ``symbols``: bytes and STOP keep their numbers, longer pieces follow STOP."""
    return torch.where(symbols >= SIZE, symbols - UNPREDICTED, symbols)


def symbols_of(outputs: Tensor) -> Tensor:
    """Return the symbols that ``outputs`` stand for."""
    return torch.where(outputs >= NUM_OUTPUTS, outputs + UNPREDICTED, outputs)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, 1)) by dimension, in nats; shapes [batch, latent]."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


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


class Posterior(nn.Module):
    """Head for q(z | x) = N(mean, diag(exp(log variance))) on features [batch, inputs], in float32.

    Features are divided by the square root of their number. One step of Adam changes each weight by the learning rate,
    so it would otherwise move a sum over thousands of features thousands of times as far as one of them.

    The log variance is bounded softly: while the KL weight is near 0, nothing else holds it. With a fixed variance it
    is the constant ln(1 - gamma^2), gamma being ``mean_norm``, so that the aggregate posterior has the variance 1 of
    the prior (bounded information rate: Braithwaite and Kleijn 2018). With b the bias of the normalised mean, the KL of
    a dimension is then -ln(1 - gamma^2) / 2 + b^2 / 2 nats on average over a training batch, whatever the KL weight.
    For b = 0 that is the capacity of a Gaussian channel: the mutual information can approach but not exceed it.
    """

    LOG_VARIANCE_BOUND = 10.0
    INITIAL_BOUND = 0.5
    """Initial weights are uniform in +- this: the KL of a dimension starts below 0.1 nats."""

    def __init__(self, inputs: int, latent: int, mean_norm: float = 0.0, fixed_variance: bool = False) -> None:
        """Build the modules.

        Args:
            inputs: number of features.
            latent: dimensions of the code.
            mean_norm: see ``CodeNorm``; 0 does not normalise.
            fixed_variance: whether the variance is fixed at 1 - ``mean_norm``^2 instead of learnt.
        """
        super().__init__()
        self.linear = nn.Linear(inputs, latent if fixed_variance else 2 * latent)
        self.scale = inputs**-0.5
        self.norm = CodeNorm(latent, mean_norm) if mean_norm else None
        self.fixed_log_variance = math.log1p(-(mean_norm**2)) if fixed_variance else None

    def initialise(self) -> None:
        """Draw the weights so that the posterior starts near the prior's mean and variance."""
        nn.init.uniform_(self.linear.weight, -self.INITIAL_BOUND, self.INITIAL_BOUND)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        outputs: Tensor = self.linear(features * self.scale).float()
        if self.fixed_log_variance is None:
            mean, log_variance = outputs.chunk(2, dim=-1)
            log_variance = self.LOG_VARIANCE_BOUND * torch.tanh(log_variance / self.LOG_VARIANCE_BOUND)
        else:
            mean, log_variance = outputs, torch.full_like(outputs, self.fixed_log_variance)
        return mean if self.norm is None else self.norm(mean), log_variance


class CodeNorm(nn.Module):
    """Batch normalisation of posterior means [batch, latent] to a fixed standard deviation gamma (Zhu et al. 2020).

    The KL of a dimension is then at least gamma^2 / 2 nats on average, whatever the decoder does. In training, the
    statistics are those of the batch of all workers. In evaluation the running statistics are used, with the unbiased
    variance. The mean has a learnt bias; gamma is fixed.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, latent: int, gamma: float, epsilon: float = 1e-10) -> None:
        super().__init__()
        self.gamma = gamma
        self.epsilon = epsilon
        self.bias = nn.Parameter(torch.zeros(latent))
        self.register_buffer("running_mean", torch.zeros(latent))
        self.register_buffer("running_var", torch.ones(latent))
        self.batch_statistics: Tensor | None = None
        """[2, latent]: mean and variance of the batch of all workers, until ``synchronise_statistics`` takes them."""

    def forward(self, mean: Tensor) -> Tensor:
        """Normalise ``mean`` [batch, latent], this worker's share of the batch."""
        if not self.training:
            return (mean - self.running_mean) * (self.gamma * torch.rsqrt(self.running_var + self.epsilon)) + self.bias
        wide = mean.double()  # the variance is a difference of two sums
        count = wide.new_full((1,), len(wide))
        sums = AllReduce.apply(torch.cat((wide.sum(0), wide.square().sum(0), count)))
        first, second = sums[:-1].view(2, -1) / sums[-1]
        variance = second - first.square()
        unbiased = variance * sums[-1] / (sums[-1] - 1).clamp(min=1)
        self.batch_statistics = torch.stack((first, unbiased)).detach().float()
        normalised = (wide - first) * torch.rsqrt(variance.clamp(min=0) + self.epsilon)
        return self.gamma * normalised.float() + self.bias


class AllReduce(torch.autograd.Function):
    """Sum over all ranks, whose gradient is the sum of all ranks' gradients; the tensor itself for one worker."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Return the sum of every rank's ``tensor``."""
        return _sum_over_ranks(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient for this rank's summand."""
        return _sum_over_ranks(gradient)


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def draw_posterior(mean: Tensor, log_variance: Tensor, noise: Noise) -> Tensor:
    """Draw z = mean + sigma * noise (reparametrisation), [batch, latent]."""
    return mean + (0.5 * log_variance).exp() * noise.normal(mean.shape[-1])


def initialise_uniform(module: nn.Module, bound: float = 0.1) -> None:
    """Draw all weights and biases from uniform(-bound, bound), as the paper's code does; see ``Lstm.raise_symbols``.

    Normalisation keeps its initial identity, and posteriors have bounds of their own.
    """
    for layer in module.modules():
        if not isinstance(layer, GroupBatchNorm | CodeNorm | nn.LayerNorm):
            for parameter in layer.parameters(recurse=False):
                nn.init.uniform_(parameter, -bound, bound)
    for layer in module.modules():
        if isinstance(layer, Posterior):
            layer.initialise()


def start_from_frequencies(model: nn.Module, frequencies: Tensor) -> None:
    """Set the bias of every ``SymbolHead`` to the logarithms of ``frequencies`` [NUM_OUTPUTS], which sum to 1."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, SymbolHead):
                layer.bias.copy_(frequencies.log())
