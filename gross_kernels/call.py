"""What a call of an operator looks like to those who serve it: its description, memory formats,
float32 precision. Below :mod:`~gross_kernels.dispatch`, so that no backend imports upwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import Geometry
from .series import Series


@dataclass(frozen=True)
class Call:
    """What a backend looks at to say whether it serves a call.

    Attributes:
        device, index: type of the device, and which one of it.
        dtype, terms_dtype: of the input and of the terms.
        in_channels, out_channels, group_sizes, kernel_size: of all terms.
        geometry: in tuples.
        active: how many leading terms are summed.
        operation: "forward", "input_grad", "weight_grad", "series_sum" or "grouped_pointwise".
        channels_last: whether the input is dense channels-last memory, and only that.
        float32: how float32 may be multiplied, see :func:`float32_precision`; "" for other dtypes.
    """

    device: str
    dtype: torch.dtype
    terms_dtype: torch.dtype
    in_channels: int
    out_channels: int
    group_sizes: tuple[int, ...]
    kernel_size: tuple[int, ...]
    geometry: Geometry
    active: int
    operation: str = "forward"
    channels_last: bool = False
    float32: str = ""
    index: int | None = None

    @classmethod
    def of(
        cls, input: Tensor, series: Series, geometry: Geometry, operation: str = "forward"
    ) -> Call:
        """Describe a call of the operator by its arguments."""
        first = series.terms[0]
        return cls(
            input.device.type,
            input.dtype,
            first.dtype,
            input.shape[1],
            first.shape[0],
            tuple(term.shape[1] for term in series.terms),
            tuple(first.shape[2:]),
            Geometry(*map(tuple, geometry)),
            series.active,
            operation,
            is_channels_last(input),
            float32_of(input.dtype),
            input.device.index,
        )


def is_channels_last(input: Tensor) -> bool:
    """Whether a tensor is dense channels-last memory, and not contiguous besides."""
    return input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()


def memory_format(input: Tensor) -> torch.memory_format:
    """Memory format of a convolution's output: the input's own, judged from its strides as ATen's
    operators do."""
    sizes, strides = input.shape, input.stride()
    least = 0
    if strides[1] == 0:
        return torch.contiguous_format
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[d] * sizes[d] if sizes[d] > 1 else strides[d]
    return torch.channels_last


def float32_of(dtype: torch.dtype) -> str:
    """:func:`float32_precision` where it matters, "" for other dtypes."""
    return float32_precision() if dtype is torch.float32 else ""


def float32_precision() -> str:
    """How float32 is multiplied on a GPU: "tf32", "tf32x3" (three passes) or "ieee" (strict).

    The setting of cuDNN's convolutions governs. Where it is strict,
    ``torch.set_float32_matmul_precision("high")`` still allows the three passes, whose products are
    good to 2⁻²² or so."""
    if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32x3"
