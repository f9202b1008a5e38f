"""LSTMs with layer normalisation: the kernels of CPUs and the plain path against the equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.data.vocabulary import PAD, SIZE, STOP
from raytrain.models import build, compiled, cpu_lstm, norm_kernels, sampling
from raytrain.models.compiled import array
from raytrain.models.lstm import Lstm, State, continue_lstm, run_lstm
from raytrain.models.symbols import OneHot
from tests.conftest import tiny_config

BATCH, LENGTH, WIDTH, FEATURES = 5, 7, 6, 3
IMPLEMENTATIONS = pytest.mark.parametrize("enabled", [True, False], ids=["kernels", "plain"])
READS = pytest.mark.parametrize(("reads_symbols", "reads_dense"), [(True, False), (False, True), (True, True)])


class Case:
    """An LSTM in double precision, what it reads, and what the equations give."""

    def __init__(self, reads_symbols: bool, reads_dense: bool, width: int = WIDTH) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lstm = Lstm(FEATURES * reads_dense + SIZE * reads_symbols, width, layer_norm=True).double()
        for parameter in self.lstm.parameters():
            nn.init.uniform_(parameter, -1, 1, generator=generator)
        self.symbols = torch.randint(256, (BATCH, LENGTH), generator=generator) if reads_symbols else None
        if self.symbols is not None:
            self.symbols[0, 3], self.symbols[0, 4:] = STOP, PAD

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

        self.dense = normal(BATCH, LENGTH, FEATURES) if reads_dense else None
        self.state: State = normal(BATCH, width), normal(BATCH, width)
        self.weights = normal(BATCH, LENGTH, width).detach()

    def inputs(self) -> Tensor:
        parts = [] if self.dense is None else [self.dense]
        if self.symbols is not None:
            parts.append(OneHot().double()(self.symbols))
        return torch.cat(parts, dim=-1)

    def expected(self) -> Tensor:
        """i, f, g, o = scale (a - mean a) / sqrt(var a + 1e-4) + shift, for a = W x + U h + b."""
        weight, recurrent, *biases = self.lstm.all_weights[0]
        assert self.lstm.norm is not None
        hidden, cell = self.state
        outputs = []
        for step in self.inputs().unbind(1):
            before = step @ weight.t() + hidden @ recurrent.t() + biases[0] + biases[1]
            centred = before - before.mean(1, keepdim=True)
            normalised = centred / (centred.square().mean(1, keepdim=True) + 1e-4).sqrt()
            update, keep, candidate, release = (normalised * self.lstm.norm.weight + self.lstm.norm.bias).chunk(4, 1)
            cell = keep.sigmoid() * cell + update.sigmoid() * candidate.tanh()
            hidden = release.sigmoid() * cell.tanh()
            outputs.append(hidden)
        return torch.stack(outputs, dim=1)

    def outputs(self) -> Tensor:
        return run_lstm(self.lstm, OneHot().double(), self.symbols, self.dense, self.state)

    def gradients(self, outputs: Tensor) -> tuple[Tensor, ...]:
        learnt = [*([] if self.dense is None else [self.dense]), *self.state, *self.lstm.parameters()]
        return torch.autograd.grad((outputs * self.weights).sum(), learnt)


@READS
@IMPLEMENTATIONS
def test_outputs_and_gradients_are_those_of_the_equations(
    monkeypatch: pytest.MonkeyPatch, enabled: bool, reads_symbols: bool, reads_dense: bool
) -> None:
    monkeypatch.setattr(cpu_lstm, "ENABLED", enabled)
    case = Case(reads_symbols, reads_dense)
    found, expected = case.outputs(), case.expected()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, wanted in zip(case.gradients(found), case.gradients(expected), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-11)


@IMPLEMENTATIONS
def test_gradients_are_those_of_small_steps(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    monkeypatch.setattr(cpu_lstm, "ENABLED", enabled)
    case = Case(False, True, width=2)
    learnt = list(case.lstm.parameters())

    def outputs(dense: Tensor, hidden: Tensor, cell: Tensor, *_: Tensor) -> Tensor:
        return run_lstm(case.lstm, OneHot().double(), None, dense, (hidden, cell))

    assert case.dense is not None
    assert torch.autograd.gradcheck(
        outputs,
        (
            case.dense[:2, :3].detach().requires_grad_(),
            *[part[:2].detach().requires_grad_() for part in case.state],
            *learnt,
        ),
    )


@IMPLEMENTATIONS
def test_what_follows_goes_on_from_the_last_state(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    monkeypatch.setattr(cpu_lstm, "ENABLED", enabled)
    case = Case(True, True)
    assert case.symbols is not None
    assert case.dense is not None
    first, carried = continue_lstm(case.lstm, OneHot().double(), case.symbols[:, :4], case.dense[:, :4], case.state)
    rest, last = continue_lstm(case.lstm, OneHot().double(), case.symbols[:, 4:], case.dense[:, 4:], carried)
    torch.testing.assert_close(torch.cat((first, rest), 1), case.expected(), rtol=1e-12, atol=1e-12)
    assert torch.equal(last[0], rest[:, -1])
    assert not any(part.requires_grad for part in (*carried, *last))


@IMPLEMENTATIONS
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_coarser_products_come_near(
    monkeypatch: pytest.MonkeyPatch, enabled: bool, kind: torch.dtype, tolerance: float
) -> None:
    """Relative to the largest figure: outputs, and the gradients of all that is learnt."""
    monkeypatch.setattr(cpu_lstm, "ENABLED", enabled)
    case = Case(True, False, width=32)
    exact = case.expected()
    expected = [exact, *case.gradients(exact)]
    case.lstm.float()
    case.state = case.state[0].detach().float().requires_grad_(), case.state[1].detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        outputs, last = continue_lstm(case.lstm, OneHot(), case.symbols, case.dense, case.state)
    assert outputs.dtype == kind
    assert {part.dtype for part in last} == {torch.float32}
    for found, wanted in zip([outputs, *case.gradients(outputs.float())], expected, strict=True):
        assert (found.double() - wanted).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_kernels_are_pytorchs_layer_norm(monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, threads: int) -> None:
    monkeypatch.setattr(compiled, "_LEAST", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    wide = torch.promote_types(kind, torch.float32)
    product = (3 + 5 * torch.randn(40, 37)).to(kind)
    scale, shift, gradient = torch.randn(40, dtype=wide), torch.randn(40, dtype=wide), torch.randn(40, 37, dtype=wide)
    statistics = torch.empty(2, 37, dtype=wide)
    normalised, of_product = torch.empty(40, 37, dtype=wide), torch.empty(40, 37, dtype=kind)
    shares = torch.ones(2, 40, 37, dtype=wide)  # the gradients are added to what there is
    norm_kernels.forward(
        *(array(part) for part in (product, scale, shift)), 1e-4, *(array(part) for part in (*statistics, normalised))
    )
    learnt = product.to(wide).requires_grad_(), scale.requires_grad_(), shift.requires_grad_()
    expected = F.layer_norm(learnt[0].t(), (40,), learnt[1], learnt[2], 1e-4).t()
    limits = {"rtol": 1e-12, "atol": 1e-12} if kind == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(normalised, expected, **limits)

    of_normalised = gradient.clone()
    norm_kernels.backward(*(array(part) for part in (of_normalised, product, scale, *statistics, *shares, of_product)))
    wanted = torch.autograd.grad(expected, learnt, gradient)
    narrow = {"rtol": 0.005, "atol": 1e-4} if kind == torch.bfloat16 else limits
    torch.testing.assert_close(of_product, wanted[0].to(kind), **narrow)
    for share, other in zip(shares, wanted[1:], strict=True):
        torch.testing.assert_close((share - 1).sum(1), other, **limits)


def test_a_nan_stays_in_its_column() -> None:
    product = torch.randn(8, 20)
    product[3, 7] = math.nan
    statistics, normalised = torch.empty(2, 20), torch.empty(8, 20)
    given = (array(part) for part in (product, torch.ones(8), torch.zeros(8)))
    norm_kernels.forward(*given, 1e-4, *(array(part) for part in (*statistics, normalised)))
    assert normalised.isnan().any(0).nonzero().tolist() == [[7]]
    assert normalised[:, 7].isnan().all()


@pytest.mark.parametrize("name", ["hybrid", "lstm_vae", "byte_lstm"])
def test_models_normalise_all_their_lstms_and_start_from_the_identity(name: str) -> None:
    model = build(tiny_config(f"{name}, layer-normalised"))
    lstms = [layer for layer in model.modules() if isinstance(layer, Lstm)]
    assert len(lstms) == {"hybrid": 1, "lstm_vae": 2, "byte_lstm": 2}[name]
    for lstm in lstms:
        assert lstm.norm is not None
        assert (lstm.norm.weight == 1).all()
        assert not lstm.norm.bias.any()
    plain = sum(parameter.numel() for parameter in build(tiny_config(name)).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == plain + len(lstms) * 2 * 4 * 32


@pytest.mark.parametrize("name", ["hybrid", "lstm_vae", "byte_lstm"])
def test_a_text_is_as_likely_byte_by_byte_as_at_once(name: str) -> None:
    model = build(tiny_config(f"{name}, layer-normalised", sampling="documents")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for lstm in model.modules():
            if isinstance(lstm, Lstm) and lstm.norm is not None:
                lstm.norm.weight.uniform_(1, 3, generator=generator)
                lstm.norm.bias.uniform_(-1, 1, generator=generator)
    z = torch.randn(6, model.latent, generator=generator)
    drawn = sampling.sample(model, 6, z=z, max_length=12, seed=3)
    scored = sampling.score(model, [item.text for item in drawn], z, [item.truncated for item in drawn])
    torch.testing.assert_close(torch.tensor([item.log_probability for item in drawn]), scored, rtol=1e-5, atol=1e-4)
