"""Noise: known answers, distribution, and independence of who asks for it."""

from __future__ import annotations

import math

import pytest
import torch

from raytrain.models import buffers, compiled
from raytrain.models.noise import (
    GOLDEN,
    LEVELS,
    WORD,
    Noise,
    hashes,
    hashes_by_tensors,
    mix,
    normal_table,
    scramble,
    signed,
)


def test_mix_is_splitmix64() -> None:
    # the first outputs of SplitMix64 with seed 1234567, as published with its reference implementation
    outputs = [mix(1234567 + (number + 1) * GOLDEN) for number in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_tensors_are_scrambled_as_integers_are() -> None:
    words = [0, 1, WORD - 1, WORD // 2, 0x0123456789ABCDEF]
    scrambled = scramble(torch.tensor([signed(word) for word in words]))
    assert [word % WORD for word in scrambled.tolist()] == [mix(word) for word in words]


@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_hashes_are_those_of_tensors(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Devices without compiled kernels hash by tensors."""
    monkeypatch.setattr(compiled, "_LEAST", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    samples, key = torch.arange(-1, 34), signed(0xFEDCBA9876543210)
    expected = hashes_by_tensors(samples, key, 21)
    buffers.clear()
    buffers.empty(*expected.shape, dtype=torch.int64).fill_(0)  # the memory that the hashes get
    assert torch.equal(hashes(samples, key, 21), expected)
    assert expected[3, 20] == signed(mix(mix(2 * GOLDEN + key) + 20 * GOLDEN))


def test_a_number_follows_from_seed_step_sample_and_index() -> None:
    noise = Noise(5, 7, range(2, 4), 16)
    noise.uniform(1)
    second = noise.uniform(3)
    key = mix(mix(5 * GOLDEN) + 7 * GOLDEN)
    stream = mix(33 * GOLDEN + mix(key + 2 * GOLDEN))  # the second draw of sample 33 = 2 * 16 + 1
    words = [mix(stream + index * GOLDEN) for index in range(2)]
    expected = [words[0] & 0xFFFFFF, words[0] >> 32 & 0xFFFFFF, words[1] & 0xFFFFFF]
    assert (second[1] * 2**24).tolist() == expected


@pytest.mark.parametrize("kind", ["normal", "uniform", "keep"])
def test_a_samples_noise_depends_neither_on_the_others_nor_on_the_length(kind: str) -> None:
    def draw(noise: Noise, length: int) -> torch.Tensor:
        return noise.keep(0.5, length) if kind == "keep" else getattr(noise, kind)(length)

    whole = draw(Noise(3, 4, range(6), 16), 9)
    torch.testing.assert_close(draw(Noise(3, 4, range(2, 6, 2), 16), 9), torch.cat((whole[32:48], whole[64:80])))
    torch.testing.assert_close(draw(Noise(3, 4, range(6), 16, count=90), 5), whole[:90, :5])
    for other in (Noise(4, 4, range(6), 16), Noise(3, 5, range(6), 16)):
        assert (draw(other, 9) != whole).float().mean() > 0.4


def test_what_a_step_shares_follows_from_seed_step_and_index_alone() -> None:
    noise = Noise(5, 7, range(2, 4), 16)
    noise.normal(3)
    mask = noise.keep_shared(0.3, 2, 3)
    key = mix(mix(5 * GOLDEN) + 7 * GOLDEN)
    stream = mix(mix(key + 2 * GOLDEN) - GOLDEN)  # the second draw, in the place of sample -1
    bits = [mix(stream + index // 4 * GOLDEN) >> 16 * (index % 4) & 0xFFFF for index in range(6)]
    # int16 is signed: half of the levels are below 0
    expected = [(value + LEVELS // 2) % LEVELS < round(0.3 * LEVELS) for value in bits]
    assert mask.flatten().tolist() == expected


def test_what_a_step_shares_is_the_same_on_every_rank_and_nothing_of_a_sample() -> None:
    def draw(noise: Noise) -> torch.Tensor:
        return noise.keep_shared(0.5, 40, 50)

    mask = draw(Noise(3, 4, range(6), 16))
    assert torch.equal(draw(Noise(3, 4, range(1, 6, 2), 16, count=17)), mask)
    noise = Noise(3, 4, range(6), 16)
    others = [draw(Noise(3, 5, range(6), 16)), draw(Noise(4, 4, range(6), 16)), *noise.keep(0.5, 40, 50), draw(noise)]
    # of 2,000 coins half agree, with a standard deviation of 22
    assert all(abs((other == mask).sum() - 1000) < 4.5 * 22.4 for other in others)


@pytest.mark.parametrize("probability", [0.0, 1e-6, 0.2, 0.5, 0.999, 1.0])
def test_a_mask_keeps_as_many_as_it_should(probability: float) -> None:
    mask = Noise(0, 0, range(64), 16).keep(probability, 50, 20)
    assert mask.dtype == torch.bool
    assert mask.shape == (1024, 50, 20)
    spread = math.sqrt(probability * (1 - probability) / mask.numel())
    assert abs(mask.double().mean() - probability) <= 4 * spread + 1 / LEVELS


def test_uniform_noise_is_uniform_and_uncorrelated() -> None:
    noise = Noise(1, 2, range(64), 16)
    first, second = noise.uniform(1000).double(), noise.uniform(1000).double()
    assert 0 <= first.min() < 1e-5
    assert 1 - 1e-5 < first.max() < 1
    counts = torch.histc(first, bins=1000, min=0, max=1)
    expected = first.numel() / 1000
    # chi square of 999 degrees of freedom has a standard deviation of sqrt(1998)
    assert abs(((counts - expected) ** 2 / expected).sum() - 999) < 4.5 * math.sqrt(1998)
    pairs = {
        "samples": (first[1:], first[:-1]),
        "indices": (first[:, 1:], first[:, :-1]),
        "words": (first[:, 2:], first[:, :-2]),
        "draws": (first, second),
        "steps": (first, Noise(1, 3, range(64), 16).uniform(1000).double()),
        "seeds": (first, Noise(2, 2, range(64), 16).uniform(1000).double()),
    }
    for name, (one, other) in pairs.items():
        correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(one.numel()), name


def test_normal_noise_is_normal() -> None:
    values = Noise(1, 2, range(64), 16).normal(1000).double().flatten()
    num = len(values)
    assert abs(values.mean()) < 4.5 / math.sqrt(num)
    assert abs(values.square().mean() - 1) < 4.5 * math.sqrt(2 / num)
    assert abs(values.pow(4).mean() - 3) < 4.5 * math.sqrt(96 / num)
    assert 4.5 < values.abs().max() < 6.1
    # Kolmogorov and Smirnov: 1.95 / sqrt(num) is exceeded once in a thousand
    cumulative = torch.special.ndtr(values.sort().values)
    assert (cumulative - torch.arange(num) / num).abs().max() < 1.95 / math.sqrt(num)


def test_the_normal_table_is_symmetric_with_half_the_variance() -> None:
    table = normal_table(torch.device("cpu")).double()
    assert torch.equal(table, -table.flip(0))
    assert (table.diff() >= 0).all()
    assert table.square().mean() == pytest.approx(0.5, rel=1e-6)


def test_noise_needs_no_values_of_its_device() -> None:
    noise = Noise(0, 0, range(2), 16, device="meta")
    drawn = noise.normal(4), noise.keep(0.5, 4), noise.uniform(4), noise.keep_shared(0.5, 4)
    assert all(numbers.device.type == "meta" for numbers in drawn)
