"""Weight dropout of LSTMs, by our own implementation and by PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from raytrain.data.vocabulary import SIZE
from raytrain.models import cpu_lstm
from raytrain.models.lstm import Lstm, run_lstm
from raytrain.models.noise import Noise
from raytrain.models.symbols import OneHot

BATCH, LENGTH, WIDTH = 5, 7, 32
IMPLEMENTATIONS = pytest.mark.parametrize("enabled", [True, False], ids=["ours", "pytorchs"])


@pytest.fixture
def lstm() -> Lstm:
    torch.manual_seed(0)
    return Lstm(SIZE, WIDTH, weight_dropout=0.3).double()


def symbols() -> Tensor:
    return torch.randint(256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def noise(step: int = 3) -> Noise:
    return Noise(1, step, range(1), BATCH)


def pytorchs(lstm: Lstm, recurrent: Tensor) -> Tensor:
    """Outputs of a plain LSTM with another hidden-to-hidden matrix."""
    plain = nn.LSTM(SIZE, WIDTH, batch_first=True).double()
    plain.load_state_dict({**lstm.state_dict(), "weight_hh_l0": recurrent})
    outputs: Tensor = plain(OneHot().double()(symbols()))[0]
    return outputs


@IMPLEMENTATIONS
def test_a_training_step_has_one_mask_and_gradients_of_the_parameter(
    monkeypatch: pytest.MonkeyPatch, lstm: Lstm, enabled: bool
) -> None:
    monkeypatch.setattr(cpu_lstm, "ENABLED", enabled)
    mask = noise().keep_shared(0.7, 4 * WIDTH, WIDTH)
    assert abs(mask.double().mean() - 0.7) < 4.5 * math.sqrt(0.3 * 0.7 / mask.numel())
    dropped = (lstm.weight_hh_l0.detach() * mask / 0.7).requires_grad_()
    outputs = run_lstm(lstm, OneHot().double(), symbols(), noise=noise())
    torch.testing.assert_close(outputs, pytorchs(lstm, dropped), rtol=1e-12, atol=1e-12)

    weights = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((outputs * weights).sum(), list(lstm.parameters()))
    plain = Lstm(SIZE, WIDTH).double()
    plain.load_state_dict({**lstm.state_dict(), "weight_hh_l0": dropped})
    theirs = run_lstm(plain, OneHot().double(), symbols())
    expected = torch.autograd.grad((theirs * weights).sum(), list(plain.parameters()))
    for number, (ours, other) in enumerate(zip(found, expected, strict=True)):
        wanted = other * mask / 0.7 if number == 1 else other
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


@IMPLEMENTATIONS
def test_without_a_training_step_the_whole_matrix_counts(
    monkeypatch: pytest.MonkeyPatch, lstm: Lstm, enabled: bool
) -> None:
    monkeypatch.setattr(cpu_lstm, "ENABLED", enabled)
    whole = pytorchs(lstm, lstm.weight_hh_l0)
    torch.testing.assert_close(run_lstm(lstm, OneHot().double(), symbols()), whole, rtol=1e-12, atol=1e-12)
    lstm.eval()
    outputs = run_lstm(lstm, OneHot().double(), symbols(), noise=noise())
    torch.testing.assert_close(outputs, whole, rtol=1e-12, atol=1e-12)


def test_every_step_and_every_layer_drops_other_weights(lstm: Lstm) -> None:
    one_step = noise()
    kept = [lstm.weights(source)[1] != 0 for source in (one_step, one_step, noise(4))]
    # of pairs of two independent masks, 0.7^2 + 0.3^2 agree
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (kept[first] == kept[second]).double().mean() == pytest.approx(0.58, abs=0.04)
    assert torch.equal(lstm.weights(noise())[1] != 0, kept[0])
