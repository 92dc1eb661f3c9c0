"""The C++ kernels for CPUs (``csrc/cpu``).

The library registers itself for the public operators' CPU key through LibTorch's stable ABI; the
functions here call those."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..series import MAX_TERMS

if TYPE_CHECKING:
    from ..dispatch import Call

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIBRARY = Path(__file__).parent.parent / "gross_cpu.so"


def load() -> OSError | None:
    """Load the compiled library. Returns why it cannot be loaded, None once it is."""
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return error
    return None


def supports(call: Call) -> bool:
    """Every geometry, in float32, float64, bfloat16 and float16, up to 16 terms."""
    return call.device == "cpu" and call.dtype in DTYPES and len(call.group_sizes) <= MAX_TERMS


def forward(
    input: Tensor,
    terms: Sequence[Tensor],
    active: int,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``gross::series_conv2d`` on the CPU."""
    return torch.ops.gross.series_conv2d(
        input, terms, torch.tensor(active), gates, stride, padding, dilation
    )


def input_grad(
    grad: Tensor,
    input: Tensor,
    terms: Sequence[Tensor],
    active: int,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``gross::series_conv2d_backward`` on the CPU, for the input alone."""
    return torch.ops.gross.series_conv2d_backward(
        grad,
        input,
        terms,
        torch.tensor(active),
        gates,
        stride,
        padding,
        dilation,
        [True, False, False],
    )[0]


def weight_grad(
    grad: Tensor,
    input: Tensor,
    terms: Sequence[Tensor],
    active: int,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[list[Tensor], Tensor | None]:
    """``gross::series_conv2d_backward`` on the CPU, for the terms and the gates."""
    needs = [False, True, gates is not None]
    _, grad_terms, grad_gates = torch.ops.gross.series_conv2d_backward(
        grad, input, terms, torch.tensor(active), gates, stride, padding, dilation, needs
    )
    return grad_terms, None if gates is None else grad_gates


def series_sum(terms: Sequence[Tensor], active: int, gates: Tensor | None) -> Tensor:
    """``gross::series_sum`` on the CPU."""
    return torch.ops.gross.series_sum(terms, torch.tensor(active), gates)
