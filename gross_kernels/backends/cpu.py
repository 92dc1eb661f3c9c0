"""The C++ kernels for CPUs (``csrc/cpu``).

The library registers itself for the public operators' CPU key through LibTorch's stable ABI; the
functions here call those."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..call import Call
from ..geometry import Geometry
from ..series import MAX_TERMS, Series

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


def forward(input: Tensor, series: Series, geometry: Geometry) -> Tensor:
    """``gross::series_conv2d`` on the CPU."""
    return torch.ops.gross.series_conv2d(input, *_flat(series), *geometry)


def input_grad(grad: Tensor, input: Tensor, series: Series, geometry: Geometry) -> Tensor:
    """``gross::series_conv2d_backward`` on the CPU, for the input alone."""
    needs = [True, False, False]
    return torch.ops.gross.series_conv2d_backward(grad, input, *_flat(series), *geometry, needs)[0]


def weight_grad(
    grad: Tensor, input: Tensor, series: Series, geometry: Geometry
) -> tuple[list[Tensor], Tensor | None]:
    """``gross::series_conv2d_backward`` on the CPU, for the terms and the gates."""
    needs = [False, True, series.gates is not None]
    _, grad_terms, grad_gates = torch.ops.gross.series_conv2d_backward(
        grad, input, *_flat(series), *geometry, needs
    )
    return grad_terms, None if series.gates is None else grad_gates


def series_sum(series: Series) -> Tensor:
    """``gross::series_sum`` on the CPU."""
    return torch.ops.gross.series_sum(*_flat(series))


def _flat(series: Series) -> tuple:
    return series.terms, torch.tensor(series.active, device="cpu"), series.gates
