"""Triton kernels: NVIDIA from compute capability 8.0, and AMD. Imported where Triton is
installed."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ...call import Call
from ...series import MAX_TERMS
from .forward import forward as forward
from .grouped_pointwise import run as grouped_pointwise
from .input_grad import input_grad as input_grad
from .launch import INTERPRETED
from .series_sum import series_sum as series_sum
from .sum_pool import sum_pool as sum_pool
from .sum_pool import sum_pool_backward as sum_pool_backward
from .weight_grad import weight_grad as weight_grad

__all__ = [
    "forward",
    "grouped_pointwise",
    "input_grad",
    "pools",
    "series_sum",
    "sum_pool",
    "sum_pool_backward",
    "supports",
    "weight_grad",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Largest group size and most taps of the kernel of grouped and last convolution, which unrolls
#: both.
MOST_OF_GROUP, MOST_TAPS = 64, 25


def supports(call: Call) -> bool:
    """Every geometry in float32, bfloat16 and float16, up to 16 terms, on a GPU that Triton serves;
    in Triton's interpreter (``TRITON_INTERPRET=1``) on the CPU instead. "grouped_pointwise", with
    every epilogue, up to groups of 64 and kernels of 5×5."""
    if (
        call.dtype not in DTYPES
        or call.terms_dtype not in DTYPES
        or len(call.group_sizes) > MAX_TERMS
    ):
        return False
    if call.operation == "grouped_pointwise" and (
        call.group_sizes[call.active - 1] > MOST_OF_GROUP or math.prod(call.kernel_size) > MOST_TAPS
    ):
        return False
    return _runs_on(call.device, call.index)


def pools(input: Tensor) -> bool:
    """Whether :func:`sum_pool` and its gradient serve a tensor."""
    return input.dtype in DTYPES and _runs_on(input.device.type, input.device.index)


def _runs_on(device: str, index: int | None) -> bool:
    return device == "cpu" if INTERPRETED else device == "cuda" and _served(index)


@cache
def _served(index: int | None) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)
