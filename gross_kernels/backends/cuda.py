"""The CUDA C++ kernels (``csrc/cuda``) for the convolutions that matter most: 3×3, padding 1,
stride 1 or 2, channels-last, 16 bits or TF32. Triton serves everything else.

Contiguous tensors are among that: a copy to channels-last and one back would move three times the
bytes of the convolution, which Triton's kernels do in place. A gradient of another memory format
than its input's is copied: it is the exception, and only one of the two tensors."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..geometry import Geometry
from ..series import MAX_TERMS, Series

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY = Path(__file__).parent.parent / "gross_cuda.so"


def load() -> OSError | None:
    """Load the compiled library, if there is one and torch is a CUDA build, without which it cannot
    be. Returns why an existing library cannot be loaded."""
    try:
        if available():
            torch.ops.load_library(LIBRARY)
    except OSError as error:
        return error
    return None


def available() -> bool:
    """Whether the library was built, and torch is a CUDA build."""
    return torch.version.cuda is not None and LIBRARY.exists()


#: Why the library exists but cannot be loaded; None otherwise.
load_error = load()


def supports(call: Call) -> bool:
    """3×3 convolutions in dense channels-last memory whose group size the kernels know, on a GPU
    they were built for; sums of anything."""
    return refusal(call) is None


def refusal(call: Call) -> str | None:
    """Why ``call`` is not served, as a clause; None if it is."""
    if call.device != "cuda":
        return "serves CUDA tensors alone"
    if load_error is not None:
        raise RuntimeError(
            f"gross_kernels: the compiled CUDA kernels could not be loaded from {LIBRARY}: "
            f"{load_error}\nBuild them again with `pip install -e .`, leave them out with "
            "GROSS_KERNELS_CUDA=0, or use another backend: GROSS_KERNELS_BACKEND=triton. "
            "`python -m gross_kernels.environment` says what is installed."
        )
    if not available():
        return "was not built: no CUDA compiler was found, or GROSS_KERNELS_CUDA=0"
    if (
        call.dtype not in DTYPES
        or call.terms_dtype not in DTYPES
        or len(call.group_sizes) > MAX_TERMS
    ):
        return "serves float32, bfloat16 and float16"
    if call.operation != "series_sum":
        stride, padding, dilation = call.geometry
        if (call.kernel_size, padding, dilation) != ((3, 3), (1, 1), (1, 1)):
            return "serves 3×3 kernels with padding 1 and dilation 1"
        if stride not in ((1, 1), (2, 2)):
            return "serves strides 1 and 2"
        if not call.channels_last:
            return "serves dense channels-last memory"
        if call.dtype == torch.float32 and call.float32 != "tf32":
            return (
                "multiplies float32 as TF32, which torch.backends.cudnn.conv.fp32_precision does "
                "not allow"
            )
    architectures, device = _operators().build()[2], properties(call.index or 0)
    if not runs_on(device[0], architectures):
        return f"was built for {architectures}, not for compute capability {device[0] / 10}"
    if call.operation == "series_sum":
        return None
    size = call.group_sizes[call.active - 1]
    shape = (call.in_channels, call.out_channels, size, call.geometry.stride[0])
    if not _operators().supports(call.operation, call.dtype, call.terms_dtype, *shape, device):
        return (
            f"has no {call.operation} kernel for groups of {size} in {shape[0]} → {shape[1]} "
            "channels on this device"
        )
    return None


@cache
def properties(index: int) -> list[int]:
    """Compute capability (10 × major + minor), multiprocessors and shared memory per block of a
    device."""
    return list(_operators().device(index))


def runs_on(capability: int, architectures: str) -> bool:
    """Whether code built for ``architectures``, such as "8.0;9.0a;10.0+PTX", runs on a device: that
    of its generation from its own minor version on, "a" on exactly that, PTX on everything that is
    newer."""
    for major, minor, exact, ptx in re.findall(r"(\d+)\.(\d)(a?)(\+PTX)?", architectures):
        built = 10 * int(major) + int(minor)
        if capability == built or (
            capability > built and not exact and (ptx or capability // 10 == int(major))
        ):
            return True
    return False


def forward(input: Tensor, series: Series, geometry: Geometry) -> Tensor:
    """The output, channels-last."""
    return _operators().forward.default(input, *series, geometry.stride[0])


def input_grad(grad: Tensor, input: Tensor, series: Series, geometry: Geometry) -> Tensor:
    """Gradient with respect to the input, channels-last."""
    return _operators().input_grad.default(grad, input, *series, geometry.stride[0])


def weight_grad(
    grad: Tensor, input: Tensor, series: Series, geometry: Geometry
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients with respect to every term and to the gates (None without gates); zero beyond
    ``active``."""
    grad_terms, grad_gates = _operators().weight_grad.default(
        grad, input, *series, geometry.stride[0]
    )
    return grad_terms, None if series.gates is None else grad_gates.to(series.gates.dtype)


def series_sum(series: Series) -> Tensor:
    """``Σ_{i≤n} gate_i t_i``, contiguous, of the terms' shape and dtype."""
    return _operators().series_sum.default(*series)


def _operators() -> Any:
    return torch.ops.gross_cuda
