"""Matrix products without gradients, on CPUs by oneDNN."""

from __future__ import annotations

import torch
from torch import Tensor


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


def _by_onednn(left: Tensor) -> bool:
    """Return whether oneDNN computes the product: on the CPU and in float32, as PyTorch lets it do in bfloat16 anyway.

    PyTorch's choice for float32, MKL, is slow on AMD's CPUs.
    """
    return left.device.type == "cpu" and left.dtype == torch.float32 and torch.backends.mkldnn.is_available()
