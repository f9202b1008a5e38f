from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from itertools import combinations, pairwise
from operator import add
from typing import Any

import numpy as np
import pytest
import torch

from raytrain.analysis import evaluation
from raytrain.analysis.evaluation import evaluate
from raytrain.config.schema import RunConfig
from raytrain.data import batches as batches_module
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus
from raytrain.data.vocabulary import STOP, UNPREDICTED
from raytrain.models import Model, build, likelihood
from raytrain.models.likelihood import aggregate_posterior, importance_weighted, log_likelihood
from raytrain.models.noise import Noise
from raytrain.training.trainer import Trainer, World
from tests.conftest import TINY_MODELS, tiny_config
from tests.unit.models.test_models import with_statistics

Estimate = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""The importance-weighted NLL and the Monte-Carlo bound, [batch] each, of so many draws."""
WINDOWS = {"sampling": "windows", "length": 24}
DOCUMENTS = {"sampling": "documents", "length": 64}
STREAM = {"sampling": "stream", "length": 24}
SAMPLINGS = pytest.mark.parametrize("sampling", [WINDOWS, DOCUMENTS], ids=["windows", "documents"])
MODELS = pytest.mark.parametrize("name", list(TINY_MODELS))
SAMPLED_MODELS = pytest.mark.parametrize(
    ("name", "sampling"),
    [*((name, sampling) for name in TINY_MODELS for sampling in (WINDOWS, DOCUMENTS)), ("byte_lstm", STREAM)],
    ids=lambda value: value if isinstance(value, str) else str(value["sampling"]),
)


def speaking(config: RunConfig[Any]) -> Model:
    """A model whose code says something: its posterior is far from the prior."""
    model = with_statistics(build(config))
    if model.latent:
        std = 0.6 / model.posterior.scale
        torch.nn.init.normal_(model.posterior.linear.weight, std=std, generator=torch.Generator().manual_seed(1))
    return model


def noise(num: int, group_size: int = 16) -> Noise:
    return Noise(1, 0, range(-(-num // group_size)), group_size, count=num)


# ------------------------------------------------------------------------------- a model that is known


class LinearGaussian:
    """x = w z + e with z ~ N(0, 1), e ~ N(0, s^2 I): p(x) and p(z | x) are known; q is p(z | x) or worse."""

    def __init__(self, num: int, *, width: float = 1.0, shift: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.w, self.s = torch.tensor([0.8, -0.5, 0.3]), 0.7
        self.x = torch.randn(num, 1, generator=generator) * self.w
        self.x += self.s * torch.randn(num, 3, generator=generator)
        variance = 1 / (1 + self.w.square().sum() / self.s**2)
        self.mean = (variance * (self.x @ self.w) / self.s**2)[:, None] + shift
        self.log_variance = torch.full((num, 1), math.log(variance) + 2 * math.log(width))

    def log_likelihood(self, z: torch.Tensor) -> torch.Tensor:
        squares = (self.x - z * self.w).square().sum(-1) / self.s**2
        return -0.5 * squares - 3 * math.log(self.s * math.sqrt(2 * math.pi))

    def exact(self) -> torch.Tensor:
        covariance = torch.outer(self.w, self.w) + self.s**2 * torch.eye(3)
        return -torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(self.x).double()

    def estimate(self, num_draws: int, at_once: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
        return importance_weighted(
            self.log_likelihood, self.mean, self.log_variance, noise(len(self.x)), num_draws, at_once
        )


def test_the_estimate_is_exact_where_the_posterior_is() -> None:
    toy = LinearGaussian(64)
    weighted, monte_carlo = toy.estimate(3)
    torch.testing.assert_close(weighted, toy.exact(), rtol=0, atol=1e-5)
    torch.testing.assert_close(monte_carlo, toy.exact(), rtol=0, atol=1e-5)


def test_the_estimate_comes_within_a_hundredth_of_a_nat_where_the_posterior_is_wrong() -> None:
    toy = LinearGaussian(256, width=1.3, shift=0.4)
    weighted, monte_carlo = toy.estimate(2000, at_once=500)
    assert abs(float((weighted - toy.exact()).mean())) < 0.01
    assert float((monte_carlo - toy.exact()).mean()) > 0.2  # the bound alone is not near


def test_streaming_gives_the_same_as_all_at_once() -> None:
    toy = LinearGaussian(40, width=1.5)
    for at_once in (1, 7, 64, 1000):
        for streamed, whole in zip(toy.estimate(50, at_once), toy.estimate(50, 50), strict=True):
            torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-10)


def test_no_more_draws_are_held_than_were_asked_for() -> None:
    toy = LinearGaussian(8)
    sizes = []

    def watched(z: torch.Tensor) -> torch.Tensor:
        sizes.append(len(z))
        return toy.log_likelihood(z)

    importance_weighted(watched, toy.mean, toy.log_variance, noise(8), 1000, 64)
    assert max(sizes) == 64
    assert sum(sizes) == 1000


def test_streaming_survives_likelihoods_that_are_no_floating_point_numbers() -> None:
    toy = LinearGaussian(8, width=1.5)

    def far(z: torch.Tensor) -> torch.Tensor:
        return toy.log_likelihood(z) - 5000.0  # exp of it is 0 in any precision

    weighted, _ = importance_weighted(far, toy.mean, toy.log_variance, noise(8), 50, 7)
    torch.testing.assert_close(weighted, toy.estimate(50)[0] + 5000, rtol=0, atol=1e-2)


def check_nested_subsets(estimate: Estimate, draws: int = 6) -> None:
    """The mean over all subsets of k of the same weights falls with k, and is the Monte-Carlo bound at k = 1."""
    weights = log_weights(estimate, draws)
    means = []
    for size in range(1, draws + 1):
        subsets = [weights[list(chosen)] for chosen in combinations(range(draws), size)]
        means.append(float(torch.stack([math.log(size) - subset.logsumexp(0) for subset in subsets]).mean()))
    weighted, monte_carlo = estimate(draws)
    assert means[0] == pytest.approx(float(monte_carlo.mean()))
    assert means[-1] == pytest.approx(float(weighted.mean()))
    assert all(later < earlier - 1e-6 for earlier, later in pairwise(means)), means


def log_weights(estimate: Estimate, draws: int) -> torch.Tensor:
    """Each draw's log weight [draws, batch], from the sums up to it: the first draws are the same for any number."""
    sums = torch.stack([-number * estimate(number)[1] for number in range(1, draws + 1)])
    return sums.diff(dim=0, prepend=torch.zeros_like(sums[:1]))


def test_more_draws_never_raise_the_estimate_averaged_over_nested_subsets() -> None:
    check_nested_subsets(LinearGaussian(32, width=2.0, shift=0.5).estimate)


# -------------------------------------------------------------------------------------- real models


@SAMPLED_MODELS
def test_the_bound_is_the_one_that_training_reports(corpus: Corpus, name: str, sampling: dict[str, Any]) -> None:
    config = tiny_config(name, **sampling)
    trainer = Trainer(config, corpus, World())
    with_statistics(trainer.model)
    expected = trainer.evaluate()
    trainer.model.eval()
    batches = EvaluationBatches(corpus.split("valid"), config, config.evaluate_samples)
    metrics = evaluate(trainer.model, batches, 1).metrics()
    for key in ("bound", "reconstruction", "kl", "bits_per_byte"):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-6), key
    if name != "byte_lstm":
        assert metrics["active_units"] == expected["active_units"]
        assert metrics["used"] == pytest.approx(expected["used"], rel=1e-3, abs=1e-3)
        assert metrics["mutual_information"] == pytest.approx(expected["mutual_information"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("most", [8192, 30])
def test_training_reports_the_mutual_information_of_as_many_samples_and_encodes_them_once(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    for module in ("raytrain.analysis.evaluation", "raytrain.training.trainer"):
        monkeypatch.setattr(f"{module}.MIXTURE_SAMPLES", most)
    config = tiny_config("hybrid", evaluate_samples=150)  # the last group is not full
    trainer = Trainer(config, corpus, World())
    trainer.model.load_state_dict(speaking(config).state_dict())
    encoded: list[int] = []
    encode = trainer.model.encode

    def counted(tokens: torch.Tensor, *masks: Any) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.append(len(tokens))
        return encode(tokens, *masks)

    monkeypatch.setattr(trainer.model, "encode", counted)
    found = trainer.evaluate()
    assert sum(encoded) == 150
    metrics = evaluate(trainer.model, EvaluationBatches(corpus.split("valid"), config, 150), 1).metrics()
    assert metrics["mixture_samples"] == min(most, 150)
    assert found["mutual_information"] == pytest.approx(metrics["mutual_information"], rel=1e-5)
    assert found["mutual_information"] > 0.1


@SAMPLED_MODELS
def test_shares_of_workers_add_to_the_same(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, name: str, sampling: dict[str, Any]
) -> None:
    monkeypatch.setattr(evaluation, "MIXTURE_SAMPLES", 60)  # fewer than there are: a part of them is taken
    config = tiny_config(name, **sampling)
    model = speaking(config)
    batches = EvaluationBatches(corpus.split("valid"), config, 150)  # the last group is not full
    whole = evaluate(model, batches, 5).metrics()
    for workers in (2, 3, 10):
        parts = [evaluate(model, batches, 5, rank, workers) for rank in range(workers)]
        same(reduce(add, reversed(parts)).metrics(), whole)
    if name != "byte_lstm":
        assert whole["mixture_samples"] == 50  # every third of 150


def same(left: Any, right: Any) -> None:
    if isinstance(right, dict):
        assert left.keys() == right.keys()
        for key in right:
            same(left[key], right[key])
    elif isinstance(right, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same(one, other)
    else:
        assert left == pytest.approx(right, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("name", ["hybrid", "lstm_vae"])
@SAMPLINGS
def test_importance_weighting_tightens_the_bound_of_the_same_draws(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, name: str, sampling: dict[str, Any]
) -> None:
    config = tiny_config(name, **sampling)
    model = speaking(config)
    batches = EvaluationBatches(corpus.split("valid"), config, 40)
    metrics = evaluate(model, batches, 12).metrics()
    assert metrics["importance_weighted"] < metrics["monte_carlo_bound"] - 0.01
    # the mean over K draws estimates what the bound has in closed form but for one draw of z
    assert metrics["monte_carlo_bound"] == pytest.approx(metrics["bound"], rel=0.05)
    single = evaluate(model, batches, 1).metrics()
    assert single["importance_weighted"] == pytest.approx(single["monte_carlo_bound"], abs=1e-9)
    monkeypatch.setattr(evaluation, "SYMBOLS_AT_ONCE", 1)  # draw by draw
    streamed = evaluate(model, batches, 12).metrics()
    for key in ("importance_weighted", "monte_carlo_bound"):
        assert streamed[key] == pytest.approx(metrics[key], rel=1e-7)


@pytest.mark.parametrize("name", ["hybrid", "lstm_vae"])
@SAMPLINGS
def test_more_draws_never_raise_a_models_estimate_averaged_over_nested_subsets(
    corpus: Corpus, name: str, sampling: dict[str, Any]
) -> None:
    config = tiny_config(name, **sampling)
    model = speaking(config)
    assert model.latent > 0
    tokens = next(EvaluationBatches(corpus.split("valid"), config, 32).batches()).tokens

    @torch.no_grad()
    def estimate(num_draws: int) -> tuple[torch.Tensor, torch.Tensor]:
        return importance_weighted(
            lambda z: log_likelihood(model, tokens, z), *model.encode(tokens), noise(32), num_draws, 4
        )

    check_nested_subsets(estimate)


@SAMPLED_MODELS
def test_positions_and_lengths_sum_to_the_total(corpus: Corpus, name: str, sampling: dict[str, Any]) -> None:
    config = tiny_config(name, **sampling)
    batches = EvaluationBatches(corpus.split("valid"), config, 100)
    metrics = evaluate(speaking(config), batches, 1).metrics()
    positions = metrics["by_position"]
    bits = sum(a * b for a, b in zip(positions["bits"], positions["predictions"], strict=True))
    samples, text_bytes = metrics["samples"], metrics["text_bytes"]
    assert bits == pytest.approx(metrics["reconstruction"] * samples / math.log(2))
    # every byte is predicted and, of documents, every STOP; PAD never is
    stops = samples if config.sampling == "documents" else 0
    assert sum(positions["predictions"]) == text_bytes + stops
    assert positions["predictions"][0] == samples == 100
    lengths = metrics["by_length"]
    assert sum(row["samples"] for row in lengths) == samples
    assert sum(row["samples"] * (row["reconstruction"] + row["kl"]) for row in lengths) == pytest.approx(
        metrics["bound"] * samples
    )
    if config.sampling == "windows":
        assert [(row["from_bytes"], row["to_bytes"]) for row in lengths] == [(24, 24)]
        assert lengths[0]["bits_per_byte"] == pytest.approx(metrics["bits_per_byte"])
    elif config.sampling == "stream":
        assert [(row["from_bytes"], row["to_bytes"]) for row in lengths] == [(16, 24)]
    else:
        assert len(lengths) > 1
        numbers = batches.samples.split.by_length[batches.positions]
        sizes = batches.samples.split.lengths(numbers)
        expected = [int(((sizes >= row["from_bytes"]) & (sizes <= row["to_bytes"])).sum()) for row in lengths]
        assert [row["samples"] for row in lengths] == expected


@pytest.mark.parametrize("name", ["hybrid", "lstm_vae"])
def test_kl_by_dimension_sums_to_the_kl(corpus: Corpus, name: str) -> None:
    config = tiny_config(name, **WINDOWS)
    metrics = evaluate(speaking(config), EvaluationBatches(corpus.split("valid"), config, 64), 1).metrics()
    assert len(metrics["kl_by_dimension"]) == 8
    assert sum(metrics["kl_by_dimension"]) == pytest.approx(metrics["kl"])
    assert metrics["kl"] > 0.1
    assert metrics["mutual_information"] + metrics["marginal_kl"] == pytest.approx(metrics["kl"])


def test_a_language_models_bound_is_its_likelihood(corpus: Corpus) -> None:
    config = tiny_config("byte_lstm", **DOCUMENTS)
    model = speaking(config)
    batches = EvaluationBatches(corpus.split("valid"), config, 32)
    metrics = evaluate(model, batches, 100).metrics()
    assert metrics["kl"] == 0
    assert metrics["bound"] == metrics["reconstruction"]
    absent = {"importance_weighted", "monte_carlo_bound", "active_units", "mutual_information", "kl_by_dimension"}
    assert not absent & metrics.keys()
    # the same, one document and one byte at a time
    total = 0.0
    for batch in batches.batches():
        for row in batch.tokens.tolist():
            state = model.begin(torch.zeros(1, 0))
            previous = STOP
            for token in row[: row.index(STOP) + 1]:
                logits, state = model.advance(torch.tensor([previous]), state)
                total -= float(logits.log_softmax(-1)[0, token])
                previous = token
    assert metrics["bound"] * 32 == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("vocabulary", ["byte", "bpe:300"])
def test_a_stream_costs_what_its_text_costs_symbol_by_symbol(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, vocabulary: str
) -> None:
    """A lane is one text: its state is carried over the chunks, and it begins once."""
    monkeypatch.setattr(batches_module, "EVALUATION_LANES", 3)
    config = tiny_config("byte_lstm", **STREAM, vocabulary=vocabulary)
    model = speaking(config)
    batches = EvaluationBatches(corpus.split("valid"), config, 20)
    metrics = evaluate(model, batches, 1).metrics()
    total, lanes = 0.0, batches.sequences()
    for lane in lanes:
        state, previous = model.begin(torch.zeros(1, 0)), STOP
        for token in lane.tolist():
            logits, state = model.advance(torch.tensor([previous]), state)
            total -= float(logits.log_softmax(-1)[0, token if token < STOP else token - UNPREDICTED])
            previous = token
    chunk, lengths = batches.samples.chunk, batches.samples.vocabulary.lengths
    assert [len(lane) for lane in lanes] == [7 * chunk, 7 * chunk, 6 * chunk]
    assert (chunk == 24) == (vocabulary == "byte")
    assert (metrics["samples"], metrics["text_bytes"]) == (20, lengths[np.concatenate(lanes)].sum())
    assert sum(row["samples"] for row in metrics["by_length"]) == 20
    assert metrics["bound"] * 20 == pytest.approx(total, rel=1e-5)


# ------------------------------------------------------------------------------------ mutual information


def test_mutual_information_of_codes_that_say_nothing_and_of_codes_that_say_which_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    epsilon = torch.randn(300, 4, generator=generator)
    silent = aggregate_posterior(torch.zeros(300, 4), torch.zeros(300, 4), epsilon)
    assert silent["mutual_information"] == pytest.approx(0, abs=0.1)
    assert silent["marginal_kl"] == pytest.approx(0, abs=0.1)
    mean = 5 * torch.randn(300, 4, generator=generator)
    narrow = torch.full((300, 4), -8.0)
    telling = aggregate_posterior(mean, narrow, mean + (0.5 * narrow).exp() * epsilon)
    assert telling["mutual_information"] == pytest.approx(math.log(300), abs=0.1)


def test_mutual_information_of_a_gaussian_channel_is_what_is_known() -> None:
    """x ~ N(0, a), z | x ~ N(x, b): I = ln(1 + a / b) / 2, and q(z) = N(0, a + b)."""
    a, b, num = 0.75, 0.25, 4000
    generator = torch.Generator().manual_seed(0)
    mean = math.sqrt(a) * torch.randn(num, 1, generator=generator)
    z = mean + math.sqrt(b) * torch.randn(num, 1, generator=generator)
    found = aggregate_posterior(mean, torch.full((num, 1), math.log(b)), z)
    assert found["mutual_information"] == pytest.approx(0.5 * math.log(1 + a / b), abs=0.03)
    assert found["marginal_kl"] == pytest.approx(0, abs=0.03)  # a + b = 1: q(z) is the prior


def test_mutual_information_is_the_same_by_blocks_and_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_variance, epsilon = torch.randn(3, 50, 6, generator=generator).double()
    z = mean + (0.5 * log_variance).exp() * epsilon
    monkeypatch.setattr(likelihood, "ROWS_AT_ONCE", 7)
    found = aggregate_posterior(mean, log_variance, z)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    log_q = normal.log_prob(z[:, None]).sum(-1).logsumexp(1) - math.log(50)
    expected = float((-normal.entropy().sum(1) - log_q).mean())
    assert found["mutual_information"] == pytest.approx(expected, abs=1e-9)
