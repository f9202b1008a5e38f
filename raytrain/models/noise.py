"""Noise as a function of (seed, step, sample, index).

Every number is a hash of its position, computed by integer arithmetic on the model's device. So a sample's noise has
the same bits on CPUs and GPUs and with any number of workers. A resumed run needs only the step number to draw it
again, and no generator object holds a state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import count as count_from
from statistics import NormalDist

import torch
from torch import Tensor

from raytrain.models import buffers, cpu_kernels, gpu_kernels

EVALUATION_SEED = 0x5EED
"""Seed of the posterior noise in evaluation: the same for every run, so that their ELBOs can be compared."""
LEVELS = 1 << 16
"""Levels of a normal table and of a probability: 16 bits of noise each."""
GOLDEN = 0x9E3779B97F4A7C15
"""Increment of the counter: 2^64 divided by the golden ratio, as in SplitMix64."""
MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Factors of SplitMix64's finaliser (Steele, Lea and Flood 2014, with Stafford's variant 13)."""
SHIFTS = 30, 27, 31
WORD = 1 << 64
WHOLE_STEP = -1
"""Takes the place of a sample's number in draws that all samples of a step share."""


class Noise:
    """Source of all randomness of one step: a function of the sample's number, never of the rank that asks."""

    def __init__(
        self,
        seed: int,
        step: int,
        groups: range,
        group_size: int,
        *,
        count: int | None = None,
        device: torch.device | str = "cpu",
        keys: Tensor | None = None,
    ) -> None:
        """Make noise for ``groups`` of ``group_size`` samples; ``count`` samples if the last group is not full.

        ``keys`` [draws] are the keys of the step's draws as a tensor on the device. A recorded step takes its noise
        from them, whatever ``seed`` and ``step`` it was recorded with.
        """
        self._device = torch.device(device)
        self._keys: Iterator[int | Tensor] = draw_keys(seed, step) if keys is None else iter(keys.unbind())
        self.draws = 0
        """Number of draws so far."""
        members = torch.arange(group_size, device=self._device)
        first = torch.arange(groups.start, groups.stop, groups.step, device=self._device) * group_size
        self._samples = (first[:, None] + members).flatten()[:count]
        """[samples]: their numbers in the global batch."""

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal noise [samples, *shape].

        A number is the sum of two entries of a table, chosen by 16 random bits each: an addition gives the same bits on
        every device, logarithms and cosines do not. No number is larger than 6.1 in magnitude.
        """
        bits = self._draw(self._samples, 2 * math.prod(shape), torch.int16)
        first, second = normal_table(self._device)[bits.int() + LEVELS // 2].unflatten(1, (-1, 2)).unbind(2)
        return (first + second).unflatten(1, shape)

    def keep(self, probability: float, *shape: int) -> Tensor:
        """Draw a Bernoulli mask, bool [samples, *shape]: true with ``probability``, to the nearest of 2^-16."""
        return self._keep(self._samples, probability, shape)

    def keep_shared(self, probability: float, *shape: int) -> Tensor:
        """Draw a Bernoulli mask that all samples of the step share, bool [*shape]: the same on every rank."""
        return self._keep(torch.full((1,), WHOLE_STEP, device=self._device), probability, shape)[0]

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform noise in [0, 1), [samples, *shape], in steps of 2^-24."""
        bits = self._draw(self._samples, math.prod(shape), torch.int32) & 0xFFFFFF
        return (bits.float() * 2.0**-24).unflatten(1, shape)

    def _keep(self, samples: Tensor, probability: float, shape: tuple[int, ...]) -> Tensor:
        """Return a mask, bool [len(samples), *shape]; see ``keep``."""
        bits = self._draw(samples, math.prod(shape), torch.int16)
        kept = round(probability * LEVELS)
        # int16 is signed: -LEVELS / 2 stands for 0
        mask = bits <= kept - 1 - LEVELS // 2 if kept else torch.zeros_like(bits, dtype=torch.bool)
        return mask.unflatten(1, shape)

    def _draw(self, samples: Tensor, count: int, kind: torch.dtype) -> Tensor:
        """Return [len(samples), count] integers of ``kind`` that share no bits with other draws, samples or indices."""
        self.draws += 1
        return hashes(samples, next(self._keys), -(-count * kind.itemsize // 8)).view(kind)[:, :count]


def draw_keys(seed: int, step: int) -> Iterator[int]:
    """Yield the key of each draw of a step, as an int64."""
    base = mix(mix(seed * GOLDEN) + step * GOLDEN)
    return (signed(mix(base + draw * GOLDEN)) for draw in count_from(1))


def hashes(samples: Tensor, key: int | Tensor, num: int) -> Tensor:
    """Return the int64 hashes [samples, num] of ``samples`` [samples] and ``num`` indices, in the draw with ``key``.

    A key is an int64, or a scalar tensor on the device of the samples.
    """
    if samples.device.type == "cpu" and cpu_kernels.noise is not None:
        words = buffers.empty(len(samples), num, dtype=torch.int64)
        cpu_kernels.noise.fill(samples, int(key), words)
        return words
    if gpu_kernels.available(samples.device):
        words = samples.new_empty(len(samples), num)
        gpu_kernels.noise.fill(samples, key, words)
        return words
    return hashes_by_tensors(samples, key, num)


def hashes_by_tensors(samples: Tensor, key: int | Tensor, num: int) -> Tensor:
    """Return what ``hashes`` returns, computed by tensor operations on any device."""
    streams = scramble(samples * signed(GOLDEN) + key)
    return scramble(streams[:, None] + torch.arange(num, device=samples.device) * signed(GOLDEN))


def mix(word: int) -> int:
    """Return the hash of a 64-bit word: the finaliser of SplitMix64, a bijection."""
    word %= WORD
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        word = (word ^ word >> shift) * multiplier % WORD
    return word


def scramble(words: Tensor) -> Tensor:
    """Return ``mix`` of every element of an int64 tensor, in place."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        # a right shift of signed words copies the sign: the mask clears the copies
        words ^= (words >> shift).bitwise_and_((1 << 64 - shift) - 1)
        if multiplier != 1:
            words *= signed(multiplier)
    return words


def signed(word: int) -> int:
    """Return the int64 with the bits of a 64-bit word."""
    return (word + WORD // 2) % WORD - WORD // 2


@cache
def normal_table(device: torch.device) -> Tensor:
    """Return [LEVELS] quantiles of a normal distribution, scaled so that a sum of two has a variance of 1."""
    normal = NormalDist()
    half = [normal.inv_cdf((level + 0.5) / LEVELS) for level in range(LEVELS // 2)]
    variance = sum(value * value for value in half) / len(half)
    lower = torch.tensor(half, dtype=torch.float64) / math.sqrt(2 * variance)
    return torch.cat((lower, -lower.flip(0))).float().to(device)
