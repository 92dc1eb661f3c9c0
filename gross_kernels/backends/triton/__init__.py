"""Triton kernels: NVIDIA from compute capability 8.0, and AMD. Imported where Triton is
installed."""

from __future__ import annotations

from functools import cache

import torch

from ...call import Call
from ...series import MAX_TERMS
from .forward import forward as forward
from .input_grad import input_grad as input_grad
from .launch import INTERPRETED
from .series_sum import series_sum as series_sum
from .weight_grad import weight_grad as weight_grad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(call: Call) -> bool:
    """Every geometry in float32, bfloat16 and float16, up to 16 terms, on a GPU that Triton serves;
    in Triton's interpreter (``TRITON_INTERPRET=1``) on the CPU instead."""
    if (
        call.dtype not in DTYPES
        or call.terms_dtype not in DTYPES
        or len(call.group_sizes) > MAX_TERMS
    ):
        return False
    return call.device == "cpu" if INTERPRETED else call.device == "cuda" and _served(call.index)


@cache
def _served(index: int | None) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)
