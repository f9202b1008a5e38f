"""Lagrange multiplier: it holds the expected KL at a rate, whatever the model and the text."""

from __future__ import annotations

import torch
from torch import Tensor


class Multiplier:
    """The multiplier u of the constraint E[KL] >= rate (minimum desired rate: Pelsmaeker and Aziz 2020, section 3).

    The loss has the term |u| (rate - KL), with the mean KL over the batch of all workers. The model descends that loss
    and u ascends it, by RMSprop at the learning rate of the run, as in the authors' code. While the KL is below the
    rate, |u| rises until the KL is worth having. Above the rate, |u| falls and then stays near 0: there the constraint
    costs nothing.

    A rate that the model cannot reach lets |u| rise without bound, by about one learning rate a step. The logged
    ``train/multiplier`` then still rises at the end of the run while ``train/kl`` stays below the rate, and the term
    drowns the reconstruction.

    The KL measures the cost of a code, not its information. If the decoder ignores the code, |u| settles at the KL
    weight, and the model reaches the rate with posterior means that are the same for all samples. This shows as
    ``train/multiplier`` near 1, with ``mutual_information`` and ``used`` near 0.

    Both tensors live on the device and belong to the run's state. Nothing here waits for the device.
    """

    START = 1.01
    """A little above the KL weight of 1, so that the first steps do not pay for the KL at all."""
    DECAY = 0.99
    EPSILON = 1e-8

    def __init__(self, rate: float, device: torch.device | str = "cpu") -> None:
        self.rate = rate
        self.value = torch.full((), self.START, device=device)
        """u, in nats of loss for each nat of KL. Its sign has no meaning."""
        self.square = torch.zeros((), device=device)
        """Running mean of its squared gradient."""

    def term(self, kl: Tensor) -> Tensor:
        """Return |u| (rate - KL), summed over the samples of ``kl`` [batch, latent]; u has no gradient in it."""
        return self.value.abs() * (len(kl) * self.rate - kl.sum())

    def ascend(self, kl: Tensor, learning_rate: float | Tensor, good: Tensor) -> None:
        """Update u from the mean ``kl`` per sample over all workers; leave it unchanged if ``good`` is false.

        ``kl`` and the bool ``good`` are scalars and the same on all workers.
        """
        slack = self.rate - kl
        gradient = torch.where(self.value < 0, -slack, slack)  # not by sign(), which would keep a u of 0 there
        square = self.DECAY * self.square + (1 - self.DECAY) * gradient.square()
        value = self.value + learning_rate * gradient / (square.sqrt() + self.EPSILON)
        self.square.copy_(torch.where(good, square, self.square))
        self.value.copy_(torch.where(good, value, self.value))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that change from step to step, by their names in a checkpoint."""
        return {"multiplier": self.value, "multiplier.square": self.square}
