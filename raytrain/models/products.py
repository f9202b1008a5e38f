"""Matrix products on CPUs, by oneDNN where PyTorch would use a slower library."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write ``left`` [m, k] x ``right`` [k, n] to ``out`` [m, n], on the CPU and without gradients; return ``out``."""
    if not _by_onednn(left):
        return torch.mm(left, right, out=out)
    return out.copy_(torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], ""))


def affine(inputs: Tensor, weight: Tensor, added: Tensor) -> Tensor:
    """Return ``inputs`` [batch, m] x ``weight`` [n, m] transposed + ``added`` [n] or [batch, n], without gradients."""
    if not _by_onednn(inputs):
        return torch.addmm(added, inputs, weight.t())
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
    return product.add_(added)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``F.linear`` of ``inputs`` [..., m] on the CPU, ``weight`` [n, m] and ``bias`` [n] or None."""
    # with more dimensions, PyTorch makes one small product per sample if they are not contiguous and need no gradient
    rows = inputs.reshape(-1, inputs.shape[-1])
    if _by_onednn(rows) and not torch.is_autocast_enabled("cpu"):
        products: Tensor = _Linear.apply(rows, weight, bias)
    else:
        products = F.linear(rows, weight, bias)
    return products.view(*inputs.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """``F.linear`` of a matrix: forward by oneDNN, backward by PyTorch's library, which is faster there."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_rows = gradient @ weight if wanted[0] else None
        return of_rows, gradient.t() @ rows if wanted[1] else None, gradient.sum(0) if wanted[2] else None


def _by_onednn(left: Tensor) -> bool:
    """Return whether oneDNN computes the product: on the CPU in float32; in bfloat16 PyTorch uses it by itself.

    PyTorch's choice for float32, MKL, is slow on AMD's CPUs.
    """
    return left.device.type == "cpu" and left.dtype == torch.float32 and torch.backends.mkldnn.is_available()
