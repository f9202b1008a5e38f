"""Floating-point operations of a training step's matrix products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from raytrain.bench.baseline import build_plain, has_plain
from raytrain.config.models import ByteLstmConfig, HybridConfig, LstmVaeConfig
from raytrain.config.schema import RunConfig
from raytrain.data.vocabulary import NUM_OUTPUTS, SIZE


@dataclass(frozen=True)
class Operations:
    """Additions and multiplications of a step's matrix products, forward and backward."""

    all: int
    """All operations in the equations: products with one-hot vectors count like any other."""
    necessary: int
    """Without the products with one-hot vectors, which could be look-ups."""


def count_operations(config: RunConfig[Any], batch_size: int, length: int) -> Operations:
    """Count the operations of a step on tokens [batch_size, length], whatever the step's implementation does.

    The operations are those of the plain model, counted by PyTorch's own counter. On the CPU that counter does not know
    LSTMs. So the model runs on the meta device, where an LSTM consists of its matrix products.

    Args:
        config: of a model that ``has_plain``.
    """
    # every product is linear in the batch and, apart from convolutions of the padded length, in the length: two short
    # lengths are enough, whereas a long LSTM would have thousands of small products to count
    short, longer = (_counted(replace(config, batch_size=config.group_size), size) for size in (2, 3))
    total = (short + (longer - short) * (length - 2)) * batch_size // 2
    return Operations(total, total - _look_ups(config, batch_size, length))


@cache
def _counted(config: RunConfig[Any], length: int) -> int:
    """Return the operations of a step on two samples."""
    with torch.device("meta"):
        model = build_plain(config)
        tokens = torch.zeros(2, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, 1.0, 1.0, 0.0).backward()
    return counter.get_total_flops()


def _look_ups(config: RunConfig[Any], batch_size: int, length: int) -> int:
    """Return the operations of the products with one-hot vectors."""
    model, symbols = config.model, batch_size * length
    once = 2 * SIZE * symbols  # with one column of a weight matrix
    if isinstance(model, ByteLstmConfig):
        return 2 * once * 4 * model.hidden  # forward, and the weights' gradient
    if isinstance(model, LstmVaeConfig):
        return 2 * 2 * once * 4 * model.hidden
    halves = 2 ** len(model.feature_maps)
    positions = batch_size * -(-config.length // halves) * halves // 2
    encoder = 2 * (2 * SIZE * positions) * 3 * model.feature_maps[0]
    # joined with features that need a gradient, so that the one-hot vectors get one too
    return encoder + 3 * once * (4 if model.decoder == "lstm" else 2) * model.hidden


def model_products(config: RunConfig[Any], batch_size: int) -> dict[str, tuple[int, int, int]]:
    """Return the shapes (m, k, n) of the model's largest products [m, k] x [k, n], by their purpose.

    Empty for a model without a plain version.
    """
    if not has_plain(config):
        return {}
    model, symbols = config.model, batch_size * config.length
    products = {"output": (symbols, model.hidden, NUM_OUTPUTS)}
    if isinstance(model, HybridConfig):
        widths = (SIZE, *model.feature_maps)
        before, after = max(pairwise(widths), key=lambda pair: pair[0] * pair[1])
        level = widths.index(before) + 1
        products["convolution"] = (batch_size * max(1, config.length >> level), 3 * before, after)
    if not isinstance(model, HybridConfig) or model.decoder == "lstm":
        inputs = model.decoder_maps[-1] + SIZE if isinstance(model, HybridConfig) else SIZE
        if isinstance(model, ByteLstmConfig) and model.layers > 1:
            inputs = model.hidden
        products["LSTM, inputs"] = (symbols, inputs, 4 * model.hidden)
        products["LSTM, one step"] = (batch_size, model.hidden, 4 * model.hidden)
    return products
