from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from raytrain import models
from raytrain.config import models as registry
from raytrain.config.models import ByteLstmConfig, HybridConfig, LstmVaeConfig
from raytrain.config.schema import RunConfig
from raytrain.data.vocabulary import PAD, STOP
from raytrain.models import Model, build, build_empty, encoder_tensors
from raytrain.models.byte_lstm import ByteLstm
from raytrain.models.hybrid import Hybrid
from raytrain.models.noise import Noise
from raytrain.models.normalisation import CodeNorm, GroupBatchNorm, synchronise_statistics
from raytrain.models.posterior import gaussian_kl
from raytrain.models.sampling import sample
from raytrain.utils.errors import UserError
from tests.conftest import TINY_MODELS, TINY_VARIANTS, tiny_config

MODELS = pytest.mark.parametrize("name", [*TINY_MODELS, *TINY_VARIANTS])


def num_parameters(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def documents(lengths: list[int], width: int, seed: int = 0) -> torch.Tensor:
    """Random documents of these many bytes, each with STOP, padded to ``width``."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(lengths), width), PAD)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(256, (length,), generator=generator)
        row[length] = STOP
    return tokens


def noise(num: int, step: int = 0) -> Noise:
    return Noise(1, step, range(-(-num // 16)), 16, count=num)


def test_a_model_that_is_first_built_empty_trains_in_the_same_process() -> None:
    """Modules are imported when a model is first built: their constants must not land on the meta device."""
    code = """
from raytrain.models import build, build_empty
from raytrain.models.noise import Noise
from tests.conftest import TINY_MODELS, TINY_VARIANTS, tiny_config
import torch
for name in TINY_MODELS:
    config = tiny_config(name)
    assert next(build_empty(config).parameters()).is_meta
    terms = build(config)(torch.randint(256, (16, 24)), Noise(0, 0, range(1), 16))
    terms.reconstruction.sum().backward()
    assert terms.reconstruction.isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_implementation_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for implementation in ("raytrain.models.nowhere:Model", "raytrain.models.hybrid:Nothing", "raytrain.models.hybrid"):
        monkeypatch.setitem(
            registry.MODELS, "hybrid", replace(registry.MODELS["hybrid"], implementation=implementation)
        )
        with pytest.raises(UserError, match=f"model hybrid: cannot import its implementation '{implementation}'"):
            build(tiny_config("hybrid"))


@MODELS
def test_models_implement_the_protocol(name: str) -> None:
    for sampling in ("windows", "documents"):
        config = tiny_config(name, sampling=sampling)
        model = build_empty(config)
        assert (model.latent > 0) == registry.MODELS[config.model_name].has_latent == hasattr(model, "encode")
        assert (model.length, model.documents) == (24, sampling == "documents")
        for member in ("from_config", "forward", "predict", "begin", "advance"):
            assert callable(getattr(model, member))
        for member in ("stream_state", "read"):
            assert hasattr(model, member) == registry.MODELS[config.model_name].carries_state


@pytest.mark.parametrize("name", [name for name in (*TINY_MODELS, *TINY_VARIANTS) if not name.startswith("byte_lstm")])
def test_a_model_declares_what_encodes(name: str) -> None:
    """With another's encoder it encodes as that one does, and nothing but its encoder has a gradient by that."""
    tokens = documents([5, 23, 1, 12] * 4, 24)
    model, other = build(tiny_config(name)), with_statistics(build(tiny_config(name, seed=1)))
    before = model.state_dict()["posterior.linear.weight"].clone()
    model.load_state_dict({**model.state_dict(), **encoder_tensors(other)})
    assert not torch.equal(before, model.state_dict()["posterior.linear.weight"])
    pairs = zip(model.eval().encode(tokens), other.encode(tokens), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    model.train()
    mean, log_variance = model.encode(tokens)
    (mean.square().sum() + log_variance.sum()).backward()
    moved = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {key for key, _ in model.named_parameters()} & encoder_tensors(model).keys()


def test_a_language_model_has_no_encoder() -> None:
    assert encoder_tensors(build(tiny_config("byte_lstm"))) == {}


def with_statistics(model: Model) -> Model:
    """The model in evaluation mode, its running statistics moved away from their first values."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, GroupBatchNorm | CodeNorm):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def test_the_tweet_models_have_the_papers_sizes() -> None:
    maps = (128, 256, 512, 512, 512), (512, 512, 256, 128, 200)
    hybrid = build_empty(RunConfig(model=HybridConfig(*maps, latent=100, hidden=1000), length=128))
    assert isinstance(hybrid, Hybrid)
    assert num_parameters(hybrid) - num_parameters(hybrid.output) == 10_827_913  # 10.8M in the paper
    lstm_vae = build_empty(RunConfig(model=LstmVaeConfig(latent=100, hidden=1000), length=128))
    assert num_parameters(lstm_vae) - num_parameters(lstm_vae.output) == 10_490_200  # 10.5M in the paper


def test_a_models_module_is_never_imported_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant tensor of a module that was first imported for ``build_empty`` would have no value ever after."""
    find, devices = models._implementation, []

    def note_device(config: Any) -> Any:
        devices.append(torch.get_default_device().type)
        return find(config)

    monkeypatch.setattr(models, "_implementation", note_device)
    build_empty(tiny_config("hybrid"))
    assert devices == ["cpu"]


def test_the_byte_lstm_has_the_posts_size() -> None:
    assert num_parameters(ByteLstm(ByteLstmConfig(), 200, inputs=206, outputs=206)) == 7_883_982
    assert num_parameters(build_empty(RunConfig(model=ByteLstmConfig(), length=201))) == 8_018_689


@MODELS
def test_terms_have_a_value_for_each_sample(name: str) -> None:
    model = build(tiny_config(name))
    tokens = documents([5, 23, 1, 12] * 8, 24)
    terms = model(tokens, noise(32))
    assert terms.reconstruction.shape == terms.auxiliary.shape == (32,)
    assert terms.kl.shape == terms.mean.shape == (32, model.latent)
    assert terms.reconstruction.dtype == terms.kl.dtype == torch.float32
    # an untrained model knows little: about log 257 nats for each byte and STOP
    expected = (tokens != PAD).sum().item() * math.log(257)
    assert terms.reconstruction.sum().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("length", [4, 7, 12, 24, 60, 61, 127, 128])
@pytest.mark.parametrize("maps", [(8,), (8, 16), (8, 16, 16)])
def test_the_hybrid_takes_any_feature_maps_that_fit(length: int, maps: tuple[int, ...]) -> None:
    config = HybridConfig(maps, maps[::-1], latent=4, hidden=16)
    if 2 ** len(maps) > length:
        with pytest.raises(ValueError, match=r"model\.feature_maps"):
            Hybrid(config, length, group_size=16)
        return
    model = Hybrid(config, length, group_size=16)
    model(torch.randint(256, (16, length)), noise(16)).reconstruction.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "auxiliary" not in name)


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("model.feature_maps", lambda: HybridConfig(feature_maps=())),
        ("model.decoder_maps", lambda: HybridConfig(feature_maps=(8, 8), decoder_maps=(8,))),
        ("model.decoder_maps", lambda: HybridConfig(decoder_maps=(8, -1))),
        ("model.latent", lambda: LstmVaeConfig(latent=0)),
        ("model.dropout", lambda: ByteLstmConfig(dropout=1.0)),
        ("model.weight_dropout", lambda: ByteLstmConfig(weight_dropout=1.0)),
        ("model.weight_dropout", lambda: LstmVaeConfig(weight_dropout=-0.1)),
        ("model.weight_dropout", lambda: HybridConfig(weight_dropout=1.5)),
        ("model.weight_dropout", lambda: HybridConfig(decoder="bytenet", weight_dropout=0.1)),
        ("model.feature_maps", lambda: RunConfig(model=HybridConfig(), length=3)),
    ],
)
def test_wrong_shapes_name_the_field(field: str, config: Any) -> None:
    with pytest.raises(ValueError, match=field.replace(".", r"\.")):
        config()


@MODELS
def test_a_padded_batch_costs_what_its_documents_cost_alone(name: str) -> None:
    model = with_statistics(build(tiny_config(name)))
    lengths = [3, 22, 10, 1, 17]
    tokens = documents(lengths, 24)
    together = model(tokens, noise(5))
    z_noise = noise(5).normal(model.latent)

    class Row(Noise):
        """The noise of one sample of the batch."""

        def __init__(self, row: int) -> None:
            self.row = row

        def normal(self, *shape: int) -> torch.Tensor:
            return z_noise[self.row : self.row + 1]

    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, : length + 1], Row(row))
        torch.testing.assert_close(alone.reconstruction[0], together.reconstruction[row], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(alone.auxiliary[0], together.auxiliary[row], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(alone.kl[0], together.kl[row], rtol=1e-4, atol=1e-5)


def test_kl_agrees_with_monte_carlo() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 3, generator=generator), torch.randn(2, 3, generator=generator)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    draws = mean + (0.5 * log_variance).exp() * torch.randn(200_000, 2, 3, generator=generator)
    samples = posterior.log_prob(draws) - torch.distributions.Normal(0, 1).log_prob(draws)
    error = samples.std(0) / samples.shape[0] ** 0.5
    assert ((samples.mean(0) - gaussian_kl(mean, log_variance)).abs() < 4 * error).all()


def test_statistics_are_those_of_groups_and_leave_padding_out() -> None:
    layer = GroupBatchNorm(3, group_size=4)
    features = torch.randn(8, 3, 6) * 2 + 1
    mask = (torch.arange(6) < torch.tensor([6, 2, 4, 1, 3, 6, 5, 2])[:, None]).float()[:, None]
    normalised = layer(features, mask)
    for group in (slice(0, 4), slice(4, 8)):
        valid = normalised[group].transpose(0, 1)[:, mask[group, 0].bool()]
        torch.testing.assert_close(valid.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(valid.var(1, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)
        # another group in the batch changes nothing
        torch.testing.assert_close(layer(features[group], mask[group]), normalised[group])
    layer(features, mask)
    synchronise_statistics(layer, 2, torch.tensor(True))
    expected = torch.stack(
        [features[g].transpose(0, 1)[:, mask[g, 0].bool()].mean(1) for g in (slice(0, 4), slice(4, 8))]
    )
    torch.testing.assert_close(layer.running_mean, 0.1 * expected.mean(0))


# a normalised mean, which a fixed variance has too, is of the whole batch
@pytest.mark.parametrize(
    "name", [*TINY_MODELS, *(name for name in TINY_VARIANTS if not name.endswith((", normalised", "fixed")))]
)
def test_noise_belongs_to_sample_groups(name: str) -> None:
    """A group's terms are the same whether it is computed with others or by itself, dropout included."""
    model = build(tiny_config(name)).train()
    tokens = documents([9] * 48, 24)
    whole = model(tokens, Noise(3, 7, range(3), 16), 0.3)
    part = model(tokens[16:32], Noise(3, 7, range(1, 2), 16), 0.3)
    torch.testing.assert_close(part.reconstruction, whole.reconstruction[16:32])
    other_step = model(tokens[16:32], Noise(3, 8, range(1, 2), 16), 0.3)
    assert not torch.equal(other_step.reconstruction, part.reconstruction)


@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_acts_on_the_outputs_of_every_layer(layers: int) -> None:
    model = ByteLstm(ByteLstmConfig(layers=layers, hidden=64, dropout=0.25), 24)
    tokens = documents([23] * 48, 24)
    read: dict[str, torch.Tensor] = {}
    model.output.register_forward_pre_hook(lambda module, inputs: read.update(last=inputs[0]))
    model.eval()(tokens, noise(48))
    whole = read["last"]
    model.train()(tokens, noise(48))
    kept = read["last"] != 0
    # a mask for each sample, position and unit: its mean is that of any part
    for part in (kept, kept[0], kept[:, 0], kept[:, :, 0]):
        assert abs(part.double().mean() - 0.75) < 4.5 * math.sqrt(0.25 * 0.75 / part.numel())
    if layers == 1:  # what is kept is scaled; above a dropout the outputs are others
        torch.testing.assert_close(read["last"][kept], whole[kept] / 0.75)
    else:
        assert not torch.allclose(read["last"][kept], whole[kept] / 0.75)


@pytest.mark.parametrize("name", [name for name in TINY_VARIANTS if "regularised" in name])
def test_what_predicts_bytes_drops_recurrent_weights_in_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, ...]] = []

    def keep(noise: Noise, probability: float, *shape: int) -> torch.Tensor:
        drawn.append(shape)
        return torch.zeros(shape, dtype=torch.bool)

    monkeypatch.setattr(Noise, "keep_shared", keep)
    model, tokens = build(tiny_config(name)), documents([23] * 16, 24)
    model.train()(tokens, noise(16))
    expected = [(4 * 32, 32)] * (2 if name.startswith("byte_lstm") else 1)
    assert drawn == expected
    model.eval()(tokens, noise(16))
    model.predict(tokens, torch.zeros(16, model.latent))
    assert drawn == expected


@MODELS
def test_weights_follow_from_the_seed_alone(name: str) -> None:
    torch.manual_seed(123)
    first = build(tiny_config(name)).state_dict()
    state = torch.random.get_rng_state()
    second = build(tiny_config(name)).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    other = build(tiny_config(name, seed=1)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@MODELS
def test_a_samples_probability_is_what_the_model_gives_its_text(name: str) -> None:
    model = with_statistics(build(tiny_config(name)))
    z = torch.randn(6, model.latent, generator=torch.Generator().manual_seed(5))
    for temperature in (0.0, 0.7, 1.0):
        drawn = sample(model, 6, z=z, temperature=temperature, seed=3, max_length=20)
        for code, item in zip(z, drawn, strict=True):
            state: Any = model.begin(code[None])
            previous, total = torch.tensor([STOP]), 0.0
            for symbol in [*item.text, *([] if item.truncated else [STOP])]:
                logits, state = model.advance(previous, state)
                total += logits.log_softmax(-1)[0, symbol].item()
                previous = torch.tensor([symbol])
            assert item.log_probability == pytest.approx(total, abs=1e-3)


@MODELS
def test_sampling_is_seeded_and_bounded(name: str) -> None:
    model = build(tiny_config(name))
    assert sample(model, 3, seed=1) == sample(model, 3, seed=1)
    assert sample(model, 3, seed=1) != sample(model, 3, seed=2)
    assert all(len(item.text) <= 5 for item in sample(model, 20, max_length=5))
    with pytest.raises(ValueError, match="temperature"):
        sample(model, 1, temperature=-1)
    with pytest.raises(ValueError, match="max_length"):
        sample(model, 1, max_length=25)


def test_a_model_that_is_first_built_empty_trains_afterwards() -> None:
    """Its module is imported then, and what it keeps must not lie on the meta device."""
    code = (
        "import torch\n"
        "from raytrain.models import build, build_empty\n"
        "from raytrain.models.noise import Noise\n"
        "from tests.conftest import tiny_config\n"
        "config = tiny_config('hybrid')\n"
        "build_empty(config)\n"
        "terms = build(config)(torch.full((16, 24), 97), Noise(0, 0, range(1), 16))\n"
        "assert terms.reconstruction.isfinite().all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
