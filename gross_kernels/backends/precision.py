"""How float32 may be multiplied on a GPU."""

from __future__ import annotations

import torch


def float32_precision() -> str:
    """How float32 is multiplied: "tf32", "tf32x3" (three passes) or "ieee" (strict).

    The setting of cuDNN's convolutions governs. Where it is strict,
    ``torch.set_float32_matmul_precision("high")`` still allows the three passes, whose products are
    good to 2⁻²² or so."""
    if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32x3"
