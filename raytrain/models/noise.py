"""Seeded noise by sample group."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """Source of all randomness of one step, drawn for fixed groups of samples and never for a rank.

    Each group has its own generator, seeded by (seed, step, group). So the noise of a sample is the same for any number
    of workers, and a resumed run needs only the step number to draw it again.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        groups: Sequence[int],
        group_size: int,
        *,
        count: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make noise for ``groups`` of ``group_size`` samples; ``count`` samples if the last group is not full."""
        self.group_size = group_size
        self._count = len(groups) * group_size if count is None else count
        self._device = torch.device(device)
        self._generators = [torch.Generator(self._device).manual_seed(_mix(seed, step, group)) for group in groups]

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal noise [samples, *shape]."""
        noise = torch.empty(len(self._generators), self.group_size, *shape, device=self._device)
        for part, generator in zip(noise, self._generators, strict=True):
            part.normal_(generator=generator)
        return noise.flatten(0, 1)[: self._count]

    def keep(self, probability: float, *shape: int) -> Tensor:
        """Draw a Bernoulli mask [samples, *shape]: 1 with ``probability``, otherwise 0."""
        mask = torch.empty(len(self._generators), self.group_size, *shape, device=self._device)
        for part, generator in zip(mask, self._generators, strict=True):
            part.bernoulli_(probability, generator=generator)
        return mask.flatten(0, 1)[: self._count]

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform noise in [0, 1), [samples, *shape]."""
        noise = torch.empty(len(self._generators), self.group_size, *shape, device=self._device)
        for part, generator in zip(noise, self._generators, strict=True):
            part.uniform_(generator=generator)
        return noise.flatten(0, 1)[: self._count]


def _mix(seed: int, step: int, group: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


EVALUATION_SEED = 0x5EED
"""Seed of the posterior noise in evaluation: the same for every run, so that their ELBOs can be compared."""
