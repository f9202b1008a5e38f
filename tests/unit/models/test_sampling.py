"""What is drawn from a model: its distribution, its probabilities, and that every sample stands for itself."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from raytrain import models
from raytrain.config.models import HybridConfig
from raytrain.config.schema import RunConfig
from raytrain.models import Model, sampling
from raytrain.models.byte_lstm import ByteLstm
from raytrain.models.noise import Noise
from raytrain.models.normalisation import GroupBatchNorm
from raytrain.utils.errors import UserError
from tests.conftest import TINY_MODELS, tiny_config

STOP = 256
CONFIGS = {
    **{name: tiny_config(name, sampling="documents") for name in TINY_MODELS},
    "bytenet": replace(
        tiny_config("hybrid", sampling="documents"),
        model=HybridConfig((16, 32), (32, 16), latent=8, hidden=32, decoder="bytenet", decoder_layers=2),
    ),
}
MODELS = pytest.mark.parametrize("name", list(CONFIGS))
CODED = pytest.mark.parametrize("name", [name for name in CONFIGS if name != "byte_lstm"])


def build(name: str, symbols: list[int] | None = None, sharpness: float = 6.0, **changes: Any) -> Model:
    """A model whose predictions are far from even and depend on z and on what came before.

    It says nothing but ``symbols``, if they are given.
    """
    config: RunConfig[Any] = replace(CONFIGS[name], **changes)
    model = models.build(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, GroupBatchNorm):
                layer.running_mean.normal_(0, 0.1, generator=generator)
                layer.running_var.uniform_(0.2, 0.5, generator=generator)
        model.output.weight.mul_(sharpness)
        if symbols is not None:
            model.output.bias[[symbol for symbol in range(257) if symbol not in symbols]] = -1e4
        else:
            model.output.bias[STOP] += 2.5
    return model.eval()


def codes(model: Model, num: int) -> torch.Tensor:
    return torch.randn(num, model.latent, generator=torch.Generator().manual_seed(5))


@MODELS
def test_samples_follow_the_models_exact_distribution(name: str) -> None:
    length, num = 3, 4000
    model = build(name, symbols=[97, 98, STOP])
    with torch.no_grad():
        model.output.bias[97] += 1.5
    z = codes(model, 1)
    texts = [bytes(text) for size in range(length + 1) for text in itertools.product(b"ab", repeat=size)]
    cut = [len(text) == length for text in texts]
    exact = sampling.score(model, texts, z.expand(len(texts), -1), cut).exp()
    assert exact.sum().item() == pytest.approx(1, abs=1e-4)
    assert exact.max() > 3 * exact.min()

    def statistic(temperature: float) -> float:
        drawn = sampling.sample(model, num, z=z.expand(num, -1), max_length=length, temperature=temperature, seed=1)
        counts = torch.tensor([sum(item.text == text for item in drawn) for text in texts])
        assert counts.sum() == num
        return ((counts - num * exact).square() / (num * exact)).sum().item()

    # 15 outcomes: chi-squared of 14 degrees of freedom is above 36.1 once in a thousand times
    assert statistic(1.0) < 36.1
    assert statistic(0.7) > 100


@MODELS
def test_the_probability_is_what_scoring_and_evaluation_give(name: str) -> None:
    model = build(name)
    z = sampling.prior_codes(model, 40, seed=3)
    drawn = sampling.sample(model, 40, seed=3, max_length=9)
    texts, cut = [item.text for item in drawn], [item.truncated for item in drawn]
    assert 5 < sum(cut) < 35
    scores = sampling.score(model, texts, z, cut).tolist()
    assert [item.log_probability for item in drawn] == pytest.approx(scores, abs=1e-4)
    if name == "byte_lstm":
        tokens = sampling.tokenise(model, texts, cut)
        terms = model(tokens, Noise(0, 0, range(40), 1))
        assert [-item.log_probability for item in drawn] == pytest.approx(terms.reconstruction.tolist(), abs=1e-4)


@MODELS
def test_prediction_is_what_the_forward_pass_costs(name: str) -> None:
    """``predict`` at the z that the forward pass draws gives its reconstruction, bit for bit."""
    model = build(name)
    texts = [b"abc", b"a longer text", b""]
    tokens = sampling.tokenise(model, texts)
    noise = lambda: Noise(1, 2, range(3), 1)  # noqa: E731
    terms = model(tokens, noise())
    z = torch.zeros(3, 0)
    if not isinstance(model, ByteLstm):
        mean, log_variance = model.encode(tokens)
        z = mean + (0.5 * log_variance).exp() * noise().normal(model.latent)
    logits = model.predict(tokens, z)
    assert logits.shape == (3, tokens.shape[1], 257)
    costs = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, ignore_index=257, reduction="none")
    torch.testing.assert_close(costs.sum(1), terms.reconstruction)
    torch.testing.assert_close(-sampling.score(model, texts, z), terms.reconstruction)


@MODELS
def test_a_sample_stands_for_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the number of samples, nor the cut into batches, nor what has left the batch changes it."""
    model = build(name)
    many = sampling.sample(model, 40, seed=2)
    assert len({len(item.text) for item in many}) > 5
    for num, rows, check_every in ((3, 256, 8), (40, 7, 1), (40, 256, 1000)):
        monkeypatch.setattr(sampling, "ROWS", rows)
        monkeypatch.setattr(sampling, "CHECK_EVERY", check_every)
        drawn = sampling.sample(model, num, seed=2)
        assert [item.text for item in drawn] == [item.text for item in many[:num]]
        for one, other in zip(drawn, many, strict=False):
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
            assert one.entropy == pytest.approx(other.entropy, abs=1e-4)


def test_the_work_ends_with_the_texts() -> None:
    model = build("byte_lstm", length=200)
    with torch.no_grad():
        model.output.bias[STOP] += 2
    calls = []
    advance = model.advance
    model.advance = lambda previous, state: calls.append(len(previous)) or advance(previous, state)  # type: ignore
    longest = max(len(item.text) for item in sampling.sample(model, 50)) + 1
    assert len(calls) == -(-longest // sampling.CHECK_EVERY) * sampling.CHECK_EVERY < 100
    assert calls[-1] < 50


def test_the_nucleus_is_the_fewest_likely_symbols() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    expected = {0.3: [[1], [0, 1]], 0.69: [[1, 3], [0, 1, 2]], 0.71: [[1, 2, 3], [0, 1, 2]], 0.95: [[0, 1, 2, 3]] * 2}
    for top_p, rows in expected.items():
        kept = sampling._nucleus(probabilities, top_p)
        assert [row.nonzero()[:, 0].tolist() for row in kept] == rows
        assert torch.equal(kept[kept > 0], probabilities[kept > 0])


def test_what_has_no_probability_is_never_chosen() -> None:
    logits = torch.tensor([[-1e4, 0.0, -1e4, 1.0, -1e4]] * 2)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert sampling._choose(logits, ends, 1.0, 1.0).tolist() == [1, 3]


@MODELS
def test_top_p_draws_from_the_whole_nucleus_and_nothing_else(name: str) -> None:
    model = build(name, symbols=[*range(97, 105)])
    z = codes(model, 1)
    first = model.predict(torch.tensor([[97]]), z)[0, 0].softmax(-1)
    ordered, order = first.sort(descending=True)
    size = int((ordered.cumsum(0) < 0.6).sum()) + 1
    drawn = sampling.sample(model, 600, z=z.expand(600, -1), max_length=1, top_p=0.6)
    assert {item.text[0] for item in drawn} == set(order[:size].tolist())
    assert 1 < size < 8
    # the probability is the model's own, not that of the nucleus
    assert drawn[0].log_probability == pytest.approx(first[drawn[0].text[0]].log().item(), abs=1e-5)


@MODELS
def test_a_prefix_is_written_and_counted(name: str) -> None:
    model = build(name)
    z = codes(model, 12)
    prefix = "é!".encode()
    drawn = sampling.sample(model, 12, z=z, prefix=prefix, seed=4)
    assert all(item.text.startswith(prefix) for item in drawn)
    assert len({item.text for item in drawn}) > 6
    scores = sampling.score(model, [item.text for item in drawn], z, [item.truncated for item in drawn])
    assert [item.log_probability for item in drawn] == pytest.approx(scores.tolist(), abs=1e-4)
    whole = sampling.sample(model, 1, z=z[:1], prefix=b"x" * 24)
    assert (whole[0].text, whole[0].truncated) == (b"x" * 24, True)
    with pytest.raises(UserError, match="prefix has 25 bytes"):
        sampling.sample(model, 1, prefix=b"x" * 25)


def test_the_coldest_sample_is_the_most_likely_one() -> None:
    model = build("byte_lstm")
    greedy = sampling.sample(model, 2, temperature=0.0)
    assert greedy[0] == greedy[1]
    assert sampling.sample(model, 5, temperature=1e-4)[0].text == greedy[0].text
    assert sampling.sample(model, 5, top_p=1e-6)[0].text == greedy[0].text


@CODED
def test_interpolation_goes_from_one_reconstruction_to_the_other(name: str) -> None:
    model = build(name)
    a, b = b"one text", b"quite another"
    path = sampling.interpolate(model, a, b, steps=5)
    assert len(path) == 5
    ends = sampling.reconstruct(model, [a, b])
    assert [path[0].text, path[-1].text] == [item.text for item in ends]
    means = sampling.posterior_means(model, [a, b])
    middle = sampling.sample(model, 1, z=means.mean(0, keepdim=True), temperature=0.0)
    assert path[2].text == middle[0].text
    assert sampling.reconstruct(model, [b])[0].text == ends[1].text
    with pytest.raises(UserError, match="at least 2"):
        sampling.interpolate(model, a, b, steps=1)


def test_a_model_of_windows_is_never_shown_a_stop() -> None:
    windows, documents = build("lstm_vae", sampling="windows"), build("lstm_vae")
    assert sampling.tokenise(windows, [b"ab", b"a"]).tolist() == [[97, 98], [97, 257]]
    assert sampling.tokenise(documents, [b"ab", b""]).tolist() == [[97, 98, STOP], [STOP, 257, 257]]
    assert sampling.tokenise(documents, [b"a" * 24]).tolist() == [[97] * 24]
    with pytest.raises(UserError, match="empty"):
        sampling.tokenise(windows, [b""])


def test_what_a_model_cannot_do_is_said() -> None:
    byte_lstm, vae = build("byte_lstm"), build("lstm_vae")
    for request in (
        lambda: sampling.interpolate(byte_lstm, b"a", b"b"),
        lambda: sampling.reconstruct(byte_lstm, [b"a"]),
    ):
        with pytest.raises(UserError, match="no latent code"):
            request()
    with pytest.raises(UserError, match="25 bytes"):
        sampling.reconstruct(vae, [b"a" * 25])
    with pytest.raises(UserError, match="no text"):
        sampling.reconstruct(vae, [])
    for changes in ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}):
        with pytest.raises(UserError, match=next(iter(changes))):
            sampling.sample(vae, 1, **changes)
    with pytest.raises(UserError, match="shape"):
        sampling.sample(vae, 2, z=torch.zeros(2, 3))
