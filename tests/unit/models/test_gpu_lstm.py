"""LSTMs as GPUs run them, on the CPU: filled up and packed, they are the LSTMs that they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from raytrain.models.gpu_lstm import PackedWeights, filled, run

SYMBOLS = 30
IDENTITY = torch.eye(SYMBOLS)


def test_a_width_is_filled_up_to_what_products_take_well_at_little_cost() -> None:
    widths = {1000: 1024, 459: 512, 512: 512, 500: 512, 291: 320, 257: 264, 259: 264, 1: 8, 8: 8}
    assert {width: filled(width) for width in widths} == widths


@pytest.mark.parametrize(("features", "symbols"), [(10, True), (0, True), (10, False), (16, False)])
@pytest.mark.parametrize("hidden", [13, 16])
@pytest.mark.parametrize("begins", [True, False])
def test_outputs_state_and_gradients_are_those_of_pytorchs_lstm(
    features: int, symbols: bool, hidden: int, begins: bool
) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(features + SYMBOLS * symbols, hidden, batch_first=True)
    dense = torch.randn(4, 9, features, requires_grad=True) if features else None
    numbers = torch.randint(SYMBOLS, (4, 9)) if symbols else None
    state = None if begins else (torch.randn(4, hidden), torch.randn(4, hidden))
    given = ([] if dense is None else [dense]) + ([] if numbers is None else [embedding(numbers, IDENTITY)])
    first = None if state is None else (state[0][None], state[1][None])
    outputs, (last, cell) = lstm(torch.cat(given, dim=-1), first)
    ours = run(torch.float32, IDENTITY, numbers, dense, state, list(lstm.all_weights[0]), True)
    learnt = [*lstm.parameters(), *([] if dense is None else [dense])]
    gradient = torch.randn(outputs.shape)
    expected = [outputs, last[0], cell[0], *torch.autograd.grad(outputs, learnt, gradient)]
    found: list[Tensor] = [*ours, *torch.autograd.grad(ours[0], learnt, gradient)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_lie_in_one_block_in_cudnns_order_and_gradients_are_float32() -> None:
    lstm = nn.LSTM(20, 13)
    packed = PackedWeights.apply(torch.bfloat16, *lstm.parameters())
    assert [tuple(part.shape) for part in packed] == [(64, 24), (64, 16), (64,), (64,)]
    place = packed[0].data_ptr()
    assert packed[0].storage_offset() == 0
    for part in packed:
        assert part.data_ptr() == place
        place += part.nbytes
    sum(part.float().sum() for part in packed).backward()
    for parameter in lstm.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.eq(1).all()


def test_the_type_is_the_one_that_was_asked_for() -> None:
    lstm = nn.LSTM(10, 12, batch_first=True)
    dense = torch.randn(2, 5, 10)
    outputs = run(torch.bfloat16, IDENTITY, None, dense, None, list(lstm.all_weights[0]), False)[0]
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), lstm(dense)[0], rtol=0.02, atol=0.02)
