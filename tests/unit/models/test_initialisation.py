"""Where training starts: the frequencies of the symbols, codes near the prior, first steps of the right size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from raytrain.config.models import MODELS, ByteLstmConfig, HybridConfig, LstmVaeConfig
from raytrain.config.presets import PRESETS, preset
from raytrain.config.schema import OptimizerConfig, RunConfig
from raytrain.data.batches import TrainingBatches
from raytrain.data.corpus import Corpus
from raytrain.data.frequencies import symbol_counts, symbol_frequencies
from raytrain.data.vocabulary import SIZE
from raytrain.models import Model, build
from raytrain.models.byte_lstm import ByteLstm
from raytrain.models.heads import start_from_frequencies
from raytrain.models.hybrid import Hybrid
from raytrain.models.lstm import run_lstm
from raytrain.models.noise import Noise
from raytrain.models.normalisation import CodeNorm, synchronise_statistics
from raytrain.models.symbols import OneHot
from raytrain.training.trainer import Trainer, World
from tests.conftest import TINY_MODELS, TINY_VARIANTS, tiny_config

SHIPPED = pytest.mark.parametrize(("name", "model"), list(PRESETS))


def started(config: RunConfig[Any], corpus: Corpus) -> Model:
    """The model of a run before its first step."""
    model = build(config)
    start_from_frequencies(model, symbol_frequencies(corpus.split("train"), config.sampling))
    return model.train()


def first_batch(config: RunConfig[Any], corpus: Corpus) -> torch.Tensor:
    """16 samples that the run would begin with."""
    return TrainingBatches(corpus, replace(config, batch_size=16)).batch(0).tokens


def unigram_nats(corpus: Corpus, sampling: str, tokens: torch.Tensor) -> float:
    """Nats of a batch under the frequencies of single symbols."""
    frequencies = symbol_frequencies(corpus.split("train"), sampling)
    return -frequencies.log()[tokens[tokens < len(frequencies)]].sum().item()


@SHIPPED
def test_every_preset_starts_at_the_entropy_of_single_symbols_with_a_code_near_the_prior(
    name: str, model: str, corpus: Corpus
) -> None:
    config = preset(name, model)
    network = started(config, corpus)
    tokens = first_batch(config, corpus)
    with torch.no_grad():
        terms = network(tokens, Noise(0, 0, range(1), 16))
    unigram = unigram_nats(corpus, config.sampling, tokens)
    assert terms.reconstruction.sum().item() == pytest.approx(unigram, rel=0.05)
    if MODELS[model].has_latent:
        assert terms.kl.sum(1).mean().item() < 10
    if isinstance(network, Hybrid):
        assert terms.auxiliary.sum().item() == pytest.approx(unigram, rel=0.05)


def test_a_trainer_starts_from_the_frequencies_of_its_corpus(corpus: Corpus) -> None:
    trainer = Trainer(tiny_config("byte_lstm"), corpus, World())
    expected = symbol_frequencies(corpus.split("train"), "windows").log().float()
    torch.testing.assert_close(trainer.model.get_parameter("output.bias").detach(), expected)


def test_one_step_moves_what_reads_the_features_no_further_than_what_reads_a_byte(corpus: Corpus) -> None:
    """Of the gates, one byte's weight moves by the learning rate; so may all dense features together, times ten."""
    config = replace(preset("laptop", "hybrid"), batch_size=16, precision="float32")
    trainer = Trainer(config, corpus, World())
    model: Any = trainer.model
    tokens = first_batch(config, corpus)
    seen: dict[str, torch.Tensor] = {}
    model.posterior.linear.register_forward_pre_hook(lambda module, inputs: seen.update(posterior=inputs[0].detach()))
    with torch.no_grad():
        z = torch.randn(16, model.latent, generator=torch.Generator().manual_seed(0))
        features = model.deconvolve(z, model._masks(tokens)) * model.feature_scale
        model.encode(tokens)
    gates, posterior = model.lstm.weight_ih_l0, model.posterior.linear.weight
    before = gates.detach().clone(), posterior.detach().clone()
    trainer.train_step(0)
    moved = [after.detach() - old for after, old in zip((gates, posterior), before, strict=True)]
    rate = config.optimizer.learning_rate
    assert (features @ moved[0][:, : features.shape[-1]].T).abs().max() < 10 * rate
    # about the root of 2,048 features, where they summed up to 800 learning rates before
    assert (seen["posterior"] @ moved[1].T).abs().max() < 40 * rate


@pytest.mark.parametrize(
    ("model", "layer"),
    [("byte_lstm", "layers.0"), ("hybrid", "lstm"), ("lstm_vae", "encoder"), ("lstm_vae", "decoder")],
)
def test_what_an_lstm_says_at_its_start_differs_from_text_to_text(model: str, layer: str) -> None:
    """By more than a tenth, of -1 to 1; it was 0.02 with all weights from uniform(-0.1, 0.1)."""
    torch.manual_seed(0)
    lstm: Any = build(preset("laptop", model)).get_submodule(layer)
    tokens = torch.randint(97, 123, (64, 20), generator=torch.Generator().manual_seed(1))
    width = lstm.input_size - SIZE
    dense = torch.zeros(64, 20, width) if width else None
    with torch.no_grad():
        assert run_lstm(lstm, OneHot(), tokens, dense)[:, -1].std(0).mean() > 0.1


def test_the_top_of_a_deep_stack_follows_the_newest_byte() -> None:
    """Its share of what varies there between samples is more than half; it was a tenth of it with uniform weights."""
    torch.manual_seed(0)
    model = ByteLstm(ByteLstmConfig(layers=4, hidden=256, dropout=0.0), 40).eval()
    outputs: dict[str, torch.Tensor] = {}
    model.output.register_forward_pre_hook(lambda module, inputs: outputs.update(top=inputs[0]))
    tokens = torch.randint(97, 123, (64, 40), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[:, 30] = tokens[:, 30].roll(1)
    tops = []
    with torch.no_grad():
        for symbols in (tokens, other):
            model.predict(symbols, torch.zeros(64, 0))
            tops.append(outputs["top"][:, 31])  # which has read the byte at 30
    assert (tops[0] - tops[1]).abs().mean() > 0.5 * tops[0].std(0).mean()


def test_the_first_layer_hears_a_piece_as_loud_as_a_byte() -> None:
    """Its pre-activations vary as much; with vectors from uniform(-0.1, 0.1) they varied a fifth as much."""
    torch.manual_seed(0)
    models = [ByteLstm(ByteLstmConfig(layers=2, hidden=128), 40, longer=longer) for longer in (0, 44)]
    weights: list[Any] = [model._lstms()[0].weight_ih_l0.detach() for model in models]
    vectors: Any = models[1].embedding
    heard = [weights[0], weights[1] @ vectors.weight.detach().T]
    assert heard[1].std().item() == pytest.approx(heard[0].std().item(), rel=0.05)


def test_a_deep_stack_leaves_the_entropy_of_single_symbols_at_once(corpus: Corpus) -> None:
    config = tiny_config("byte_lstm", steps=60, optimizer=OptimizerConfig(learning_rate=4e-3))
    config = replace(config, model=ByteLstmConfig(layers=4, hidden=64, dropout=0.0))
    trainer = Trainer(config, corpus, World())
    for step in range(config.steps):
        batch, terms, _ = trainer.train_step(step)
    unigram = unigram_nats(corpus, config.sampling, batch.tokens) / len(batch.tokens)
    assert trainer.batch_metrics(batch, terms)["bound"] < 0.9 * unigram


def test_counts_of_a_split_are_exact_and_stay_so_when_it_is_sampled(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = corpus.split("train")
    exact = torch.bincount(torch.from_numpy(split.stream[:].copy()).long(), minlength=257).double()
    torch.testing.assert_close(torch.from_numpy(symbol_counts(split, "windows")), exact)
    documents = symbol_counts(split, "documents")
    assert documents[256] == split.num_documents == 4000
    assert documents.sum() == pytest.approx(len(split.stream))
    monkeypatch.setattr("raytrain.data.frequencies.BLOCK", 1 << 10)
    sampled = torch.from_numpy(symbol_counts(split, "windows"))
    assert sampled.sum().item() == pytest.approx(len(split.stream))
    common = exact > 1000
    torch.testing.assert_close(sampled[common], exact[common], rtol=0.25, atol=0)


# ------------------------------------------------------------------------------------- normalised codes


def test_a_normalised_mean_has_its_standard_deviation_and_costs_what_it_promises() -> None:
    norm = CodeNorm(4, 0.6).train()
    mean = norm(torch.randn(256, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1.0, 30, 5]) + 9)
    torch.testing.assert_close(mean.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(mean.std(0, unbiased=False)[1:], torch.full((3,), 0.6), atol=1e-4, rtol=0)
    assert 0.5 * mean[:, 1:].square().mean(0).min() > 0.6**2 / 2 - 1e-3


def test_running_statistics_are_of_the_unbiased_variance() -> None:
    norm = CodeNorm(2, 0.5).train()
    values = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for _ in range(200):
        norm(values)
        assert synchronise_statistics(norm, 1, torch.tensor(True))
    torch.testing.assert_close(norm.running_mean, values.mean(0))
    torch.testing.assert_close(norm.running_var, values.var(0, unbiased=True))
    expected = 0.5 * (values - values.mean(0)) / values.std(0)
    torch.testing.assert_close(norm.eval()(values), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_normalised_mean_is_that_of_its_formula() -> None:
    norm = CodeNorm(3, 0.6).train()
    values = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    (norm(values) * weights).sum().backward()
    found, values.grad = values.grad, None
    centred = values - values.mean(0)
    (0.6 * centred * torch.rsqrt(centred.square().mean(0) + norm.epsilon) * weights).sum().backward()
    torch.testing.assert_close(found, values.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["hybrid, fixed", "lstm_vae, fixed"])
def test_the_kl_of_a_fixed_variance_is_known(name: str, corpus: Corpus) -> None:
    config = tiny_config(name)
    model: Any = started(config, corpus)
    tokens = TrainingBatches(corpus, config).batch(0).tokens
    terms = model(tokens, Noise(0, 0, range(4), 16))
    nats = -0.5 * math.log(1 - 0.6**2)
    torch.testing.assert_close(terms.kl.mean(0), torch.full((8,), nats), rtol=1e-4, atol=0)
    # the code has the prior's variance; the bias costs what it adds to the squared mean
    log_variance = model.posterior(torch.randn(4, model.posterior.linear.in_features))[1]
    torch.testing.assert_close(log_variance.exp(), torch.full((4, 8), 1 - 0.6**2))
    with torch.no_grad():
        model.posterior.norm.bias.fill_(0.5)
    terms = model(tokens, Noise(0, 0, range(4), 16))
    torch.testing.assert_close(terms.kl.mean(0), torch.full((8,), nats + 0.5**2 / 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("mean_norm", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("kind", [HybridConfig, LstmVaeConfig])
def test_a_fixed_variance_needs_a_normalised_mean_that_leaves_some(kind: Any, mean_norm: float) -> None:
    with pytest.raises(ValueError, match=rf"model\.mean_norm is {mean_norm}: must be in \(0, 1\) with model\.fixed_v"):
        kind(mean_norm=mean_norm, fixed_variance=True)


@pytest.mark.parametrize("name", [*TINY_MODELS, *TINY_VARIANTS])
def test_every_weight_of_a_variant_learns(name: str, corpus: Corpus) -> None:
    config = tiny_config(name)
    trainer = Trainer(config, corpus, World())
    before = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    for step in range(2):
        _, terms, norm = trainer.train_step(step)
        assert norm.isfinite()
        assert math.isfinite(terms.reconstruction.sum().item())
    after = dict(trainer.model.named_parameters())
    # what precedes a batch normalisation is shifted back by it: its bias has no gradient but rounding
    assert [key for key, value in before.items() if torch.equal(value, after[key])] == []
