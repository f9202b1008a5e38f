"""Likelihood estimates of models with a latent code, and the decomposition of their KL.

All noise is drawn by sample group, with the seed of the training loop's own evaluation. So estimates do not depend on
how workers share the samples, and the ELBO is the one that training reported, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from raytrain.data.batches import Batch
from raytrain.models import Model
from raytrain.models.heads import negative_log_likelihood
from raytrain.models.noise import EVALUATION_SEED, Noise
from raytrain.models.posterior import gaussian_kl

SYMBOLS_AT_ONCE = 1 << 15
"""Symbols, over samples and draws, that are predicted at once. This bounds the memory of many draws."""
MIXTURE_SAMPLES = 8192
"""Maximum number of samples in the aggregate posterior. Its cost grows with the square of their number."""
ROWS_AT_ONCE = 512
"""Number of codes whose density under the whole mixture is computed at once."""


# ------------------------------------------------------------------------------------------ estimates


@torch.no_grad()
def estimate_likelihood(model: Model, batches: Iterable[Batch], group_size: int, num_draws: int) -> Tensor:
    """Return [2] in float64, on the model's device: importance-weighted negative log-likelihood in nats, sample count.

    Both are sums, which add up over workers. ``model`` is in evaluation mode and has a latent code. For this estimate
    together with all other measures, see ``analysis.evaluation.evaluate``.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
    for batch in batches:
        nats = sample_likelihoods(model, batch, group_size, num_draws)
        sums += torch.stack((nats.sum(), nats.new_tensor(len(nats))))
    return sums


def sample_likelihoods(model: Model, batch: Batch, group_size: int, num_draws: int) -> Tensor:
    """Return the importance-weighted negative log-likelihood [batch] of every sample, in float64 nats."""
    device = next(model.parameters()).device
    tokens = batch.tokens.to(device)
    mean, log_variance = model.encode(tokens)
    nats, _ = importance_weighted(
        partial(log_likelihood, model, tokens),
        mean,
        log_variance,
        Noise(EVALUATION_SEED, 0, batch.groups, group_size, count=len(tokens), device=device),
        num_draws,
        draws_at_once=max(1, SYMBOLS_AT_ONCE // tokens.numel()),
    )
    return nats


def log_likelihood(model: Model, tokens: Tensor, z: Tensor) -> Tensor:
    """Return log p(x | z) [draws, batch] of ``tokens`` [batch, length] at codes ``z`` [draws, batch, latent]."""
    repeated = tokens.repeat(len(z), 1)
    nats = negative_log_likelihood(model.predict(repeated, z.flatten(0, 1)), repeated)
    return -nats.sum(1).view(len(z), len(tokens))


def swapped_loss(model: Model, tokens: Tensor, z: Tensor, group_size: int) -> Tensor:
    """Return the reconstruction [batch], in nats, of ``tokens`` at the code of another sample of the same group.

    Its excess over the reconstruction at the samples' own codes ``z`` [batch, latent] is how much of the code the
    decoder uses. The KL does not tell: with a normalised posterior it is positive whether or not the code is read.
    """
    swapped = torch.cat([codes.roll(1, 0) for codes in z.split(group_size)])
    return negative_log_likelihood(model.predict(tokens, swapped), tokens).sum(1)


def importance_weighted(
    log_likelihood: Callable[[Tensor], Tensor],
    mean: Tensor,
    log_variance: Tensor,
    noise: Noise,
    num_draws: int,
    draws_at_once: int,
) -> tuple[Tensor, Tensor]:
    """Return an estimate of -log p(x) and the Monte-Carlo negative ELBO of its draws, [batch] each in float64 nats.

    They are -log of the mean, and the mean of -log, of the weights p(x, z) / q(z | x), z ~ q (Burda et al. 2016). The
    weights are summed as they come, in the log domain. So memory grows with ``draws_at_once`` alone, and the first
    draws are the same for any ``num_draws``.

    Args:
        log_likelihood: maps codes [draws, batch, latent] to log p(x | z) [draws, batch].
        mean, log_variance: of q(z | x), [batch, latent] each.
    """
    log_sum = torch.full_like(mean[:, 0], -torch.inf, dtype=torch.float64)
    total = torch.zeros_like(log_sum)
    for first in range(0, num_draws, draws_at_once):
        # one call for each draw, so that the draws do not depend on how many are taken at once
        epsilon = torch.stack(
            [noise.normal(mean.shape[1]) for _ in range(first, min(first + draws_at_once, num_draws))]
        )
        z = mean + (0.5 * log_variance).exp() * epsilon
        # log p(z) - log q(z | x): the constants of the two normal densities cancel
        log_ratio = 0.5 * (epsilon.square() + log_variance - z.square()).double().sum(-1)
        log_weights = log_likelihood(z).double() + log_ratio
        log_sum = torch.logaddexp(log_sum, log_weights.logsumexp(0))
        total += log_weights.sum(0)
    return math.log(num_draws) - log_sum, -total / num_draws


def aggregate_posterior(mean: Tensor, log_variance: Tensor, z: Tensor) -> dict[str, float]:
    """Return ``mutual_information`` I_q(x; z) and ``marginal_kl`` KL(q(z) || p(z)), in nats; they sum to the mean KL.

    I_q = mean KL(q(z | x) || p(z)) - KL(q(z) || p(z)) (Hoffman & Johnson 2016). Here q(z) is the mixture of the
    posteriors of these samples. The expectation of log q(z) is taken over one draw of each, as in He et al. 2019; the
    rest is in closed form. N samples cannot show more than about ln N nats of information: near that, the marginal KL
    is only an upper bound.

    Args:
        mean, log_variance: of q(z | x), [samples, latent] each.
        z: a draw from each q(z | x), [samples, latent].
    """
    mean, log_variance, z = mean.double(), log_variance.double(), z.double()
    precision = (-log_variance).exp()
    constant = (mean.square() * precision + log_variance).sum(1) + mean.shape[1] * math.log(2 * math.pi)
    log_q = 0.0
    for rows in z.split(ROWS_AT_ONCE):
        # the squares are expanded: two matrix products instead of [rows, samples, latent] differences
        exponents = rows.square() @ precision.T - 2 * rows @ (mean * precision).T + constant
        log_q += float(((-0.5 * exponents).logsumexp(1) - math.log(len(mean))).sum())
    negative_entropy = -0.5 * float((1 + math.log(2 * math.pi) + log_variance).sum(1).mean())
    information = negative_entropy - log_q / len(z)
    kl = float(gaussian_kl(mean, log_variance).sum(1).mean())
    return {"mutual_information": information, "marginal_kl": kl - information}
