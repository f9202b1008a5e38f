"""GPU kernels compiled by Triton, where it works."""

from __future__ import annotations

import subprocess
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

# PyTorch's GPU builds include Triton
if find_spec("triton"):
    from raytrain.models import noise_triton, norm_triton

    noise: Any = noise_triton
    norm: Any = norm_triton
else:
    noise = norm = None


@cache
def available(device: torch.device) -> bool:
    """Return whether the kernels run on ``device``: the first call tries one.

    Triton needs a C compiler and Python's headers, which not every machine has.
    """
    if norm is None or device.type != "cuda":
        return False
    try:
        noise.fill(torch.zeros(1, dtype=torch.int64, device=device), 0, torch.zeros(1, 1, dtype=torch.int64).to(device))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        warnings.warn(
            f"Triton cannot compile kernels ({error}): steps take more launches. It needs gcc or clang, and Python.h",
            stacklevel=2,
        )
        return False
    return True
