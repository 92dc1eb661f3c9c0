"""The CUDA C++ kernels (``csrc/cuda``) for the convolutions that matter most: 3×3, padding 1,
stride 1 or 2, channels-last, 16 bits or TF32. Triton serves everything else.

Contiguous tensors are among that: a copy to channels-last and one back would move three times the
bytes of the convolution, which Triton's kernels do in place. A gradient of another memory format
than its input's is copied: it is the exception, and only one of the two tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


# ---- For measurements ----


def plans(
    operation: str,
    input: Tensor,
    series: Series,
    geometry: Geometry,
    device: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """The plans among which a call chooses the one of the fewest estimated clocks, by their
    numbers; none where it is not served.

    Args:
        operation: "forward", "input_grad" or "weight_grad".
        input: of the convolution; its shape, dtype and device count.
        device: what ``torch.ops.gross_cuda.device`` says of a device, by default of the input's;
            with it tensors on "meta" serve.

    Returns:
        of each plan "kernel"; the numbers of its tile ("steps", "atoms", "tiles", "teams",
        "stages", "columns", "images"); "grid", "threads", "shared_bytes"; the model's "clocks" and,
        at 1.755 GHz, "microseconds" (not measured); "read_bytes" and "written_bytes" of global
        memory, by the plan, halos included and terms not; and whether it is "chosen".
    """
    terms = series.terms[: series.active]
    shape = (*input.shape, terms[0].shape[0])
    sizes = [term.shape[1] for term in terms]
    numbers = properties(input.device.index or 0) if device is None else list(device)
    text = _operators().plans(
        operation, input.dtype, terms[0].dtype, shape, sizes, geometry.stride[0], numbers
    )
    return json.loads(text)


@contextmanager
def forced(operation: str, plan: int) -> Iterator[None]:
    """Calls of an operation run the plan of this number of :func:`plans`; one that has no such plan
    raises."""
    _operators().set_plan(operation, plan)
    try:
        yield
    finally:
        _operators().set_plan(operation, -1)


def possible_share(
    operation: str,
    input: Tensor,
    series: Series,
    geometry: Geometry,
    device: Sequence[int] | None = None,
) -> float:
    """The largest fraction of a copy's speed that the chosen plan can reach: bytes of input and
    output over all that it moves, rows at the edges of shares, columns at those of tiles, partial
    sums (written, then read) and the active terms included. Neither launches nor the assembly of
    the weights are counted.

    ValueError where the call is not served."""
    chosen = [each for each in plans(operation, input, series, geometry, device) if each["chosen"]]
    if not chosen:
        raise ValueError(f"operation: got {operation}, and the CUDA kernels do not serve this call")
    terms = series.terms[: series.active]
    size = geometry.output_size(input.shape[2:], (3, 3))
    output = input.shape[0] * terms[0].shape[0] * size[0] * size[1]
    copied = (input.numel() + output) * input.element_size()
    moved = chosen[0]["read_bytes"] + chosen[0]["written_bytes"]
    if operation == "weight_grad":
        moved += chosen[0]["written_bytes"]
    moved += sum(term.numel() * term.element_size() for term in terms)
    return copied / moved


def _operators() -> Any:
    return torch.ops.gross_cuda
