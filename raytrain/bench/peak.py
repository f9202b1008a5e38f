"""Peak rates of the machine: matrix products and copies."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from raytrain.bench.flops import model_products
from raytrain.bench.rounds import Contender, Measured, Series, repeat
from raytrain.config.schema import RunConfig

SQUARES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
"""Sides of the square matrices, by device; a quick run has only the smallest."""
COPIED = {"cpu": 128 * 2**20, "cuda": 2**30}
"""Bytes that a copy reads: more than fit in a cache."""


class Ceiling:
    """Rates of matrix products of several shapes in each compute type, and of a copy."""

    def __init__(
        self, config: RunConfig[Any], precisions: list[str], device: torch.device, seconds: float, quick: bool
    ) -> None:
        self.precisions = precisions
        self.device = device
        self.seconds = seconds
        self.shapes = model_products(config, config.batch_size)
        sides = SQUARES[device.type][: 1 if quick else None]
        self.shapes |= {f"square {side}": (side, side, side) for side in sides}
        self.copied = COPIED[device.type] // (16 if quick else 1)

    def contenders(self) -> list[Contender]:
        """Return a contender for each compute type, and one for the copy."""
        return [
            *(Contender(f"products {name}", partial(self._products, name)) for name in self.precisions),
            Contender("copy", lambda _: self._copy()),
        ]

    def _products(self, precision: str, number: int) -> dict[str, float]:
        """Return operations per second by shape."""
        rates = {}
        for name, (m, k, n) in self.shapes.items():
            kind = getattr(torch, precision)
            a, b = (torch.randn(shape, device=self.device).to(kind) for shape in ((m, k), (k, n)))
            out = torch.empty(m, n, dtype=kind, device=self.device)
            torch.mm(a, b, out=out)
            calls, seconds = repeat(partial(_multiply, a, b, out), self.seconds / len(self.shapes), self.device)
            rates[name] = 2 * m * k * n * calls / seconds
        return rates

    def _copy(self) -> dict[str, float]:
        source = torch.ones(self.copied // 4, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        calls, seconds = repeat(lambda _: target.copy_(source), self.seconds / len(self.shapes), self.device)
        return {"bytes": 2 * self.copied * calls / seconds}

    def result(self, measured: Measured) -> dict[str, Any]:
        """Return operations per second for all shapes and the best, by compute type; and bytes per second of a copy."""
        best = ceilings(measured)
        ceiling = {
            "best": {name: series.json() for name, series in best.items()},
            "products": {
                name: {
                    shape: {"shape": self.shapes[shape], "operations_per_second": series.json()}
                    for shape, series in measured[f"products {name}"].items()
                }
                for name in self.precisions
            },
            "copy": {"bytes": self.copied, "bytes_per_second": measured["copy"]["bytes"].json()},
        }
        return {"ceiling": ceiling}


def _multiply(a: Tensor, b: Tensor, out: Tensor, number: int) -> None:
    torch.mm(a, b, out=out)


def ceilings(measured: Measured) -> dict[str, Series]:
    """Return operations per second of the product with the best median, by compute type; empty if not measured."""
    return {
        name.removeprefix("products "): max(values.values(), key=lambda series: series.median)
        for name, values in measured.items()
        if name.startswith("products ")
    }
