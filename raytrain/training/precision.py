"""Precision: the type in which a device computes matrix products."""

from __future__ import annotations

import torch

from raytrain.utils.errors import UserError

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precision -> type of matrix products, if it is not float32."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve ``auto``: bfloat16 if the hardware multiplies such matrices, float16 on GPUs that have only that.

    Raises:
        UserError: the device does not compute in ``precision``.
    """
    if device.type == "cuda":
        if precision != "auto":
            return precision
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float16" if torch.cuda.get_device_capability(device) >= (7, 0) else "float32"
    if precision in ("tf32", "float16"):
        raise UserError(f"precision is {precision!r}: only GPUs compute in it; give --precision auto")
    capabilities = torch.cpu.get_capabilities()
    fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return precision if precision != "auto" else "bfloat16" if fast else "float32"


def set_up_products(precision: str) -> None:
    """Set how this process computes float32 products on GPUs, and make equal steps give equal bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.deterministic = True
