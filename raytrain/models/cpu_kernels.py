"""CPU kernels compiled by Numba; all None where it is not installed, and PyTorch's operations are used instead."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

if find_spec("numba"):
    from raytrain.models import batch_norm_kernels, cpu_lstm, cross_entropy, noise_kernels

    lstm: Any = cpu_lstm
    loss: Any = cross_entropy
    noise: Any = noise_kernels
    norm: Any = batch_norm_kernels
else:
    lstm = loss = noise = norm = None
