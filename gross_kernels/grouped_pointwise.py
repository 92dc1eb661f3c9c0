"""The operator ``gross::grouped_pointwise``: grouped convolution and last pointwise of a layer in
one kernel, and what follows the sum: ``act(Q_n · conv(p, R_n) + bias + residual)``.

It is for inference on a GPU, where Triton has a kernel for it; elsewhere it is :func:`define`. It
has no gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dispatch, functional
from .bottleneck import Weights
from .call import Call, memory_format
from .epilogue import Epilogue
from .geometry import Geometry
from .library import call, register_autocast, register_vmap
from .series import Series, convolution_macs

_library = torch.library.Library("gross", "FRAGMENT")
_library.define(
    "grouped_pointwise(Tensor input, Tensor[] grouped, Tensor[] pointwise_out, Tensor active, "
    "Tensor? gates, int[2] stride, int[2] padding, int[2] dilation, Tensor? bias, "
    "Tensor? residual, str activation, Tensor? slopes, bool residual_last) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides),
)

Terms = Sequence[Tensor]


def grouped_pointwise(
    input: Tensor,
    grouped: Terms,
    pointwise_out: Terms,
    active: Tensor,
    gates: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
) -> Tensor:
    """``epilogue(Q_n · conv(input, R_n))``, ``[N, C_out, H', W']`` of ``input`` ``[N, width_in, H,
    W]``, the first pointwise's output; without gradients.

    Args:
        grouped, pointwise_out: terms as in :class:`GroSSConv2d`.
        active, gates: as in :class:`bottleneck.Weights`.
        epilogue: its residual is of the output's shape and dtype.
    """
    return call(
        torch.ops.gross.grouped_pointwise.default,
        input, grouped, pointwise_out, active, gates, *geometry, *epilogue,
    )  # fmt: skip


def layer(input: Tensor, weights: Weights, geometry: Geometry, relu: bool) -> Tensor:
    """A whole layer in two kernels: the first pointwise by the library, then this operator."""
    pointwise_in, grouped, pointwise_out, bias, active, gates = weights
    first = functional.series_sum(pointwise_in, active, gates)
    inner = F.conv2d(input, first.to(input.dtype))
    epilogue = Epilogue(bias, activation="relu" if relu else "none")
    return grouped_pointwise(inner, grouped, pointwise_out, active, gates, geometry, epilogue)


def define(
    input: Tensor,
    grouped: Terms,
    pointwise_out: Terms,
    active: Tensor,
    gates: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
) -> Tensor:
    """The same as two convolutions and what PyTorch has for the rest."""
    middle = functional.apply(input, grouped, active, gates, geometry)
    last = functional.series_sum(pointwise_out, active, gates)
    return epilogue.of(F.conv2d(middle, last.to(middle.dtype)))


def served(input: Tensor, grouped: Series, geometry: Geometry) -> bool:
    """Whether there is a kernel for this call."""
    backend = dispatch.BACKENDS.get("triton")
    if backend is None or dispatch.forced_backend() not in (None, "triton"):
        return False
    return backend.supports(Call.of(input, grouped, geometry, "grouped_pointwise"))


def _run(
    input: Tensor,
    grouped: Terms,
    pointwise_out: Terms,
    active: Tensor,
    gates: Tensor | None,
    *rest: Any,
) -> Tensor:
    geometry, epilogue = Geometry(*rest[:3]), Epilogue(*rest[3:])
    count = int(active)
    series = Series(grouped, count, gates)
    size = geometry.output_size(input.shape[2:], grouped[0].shape[2:])
    epilogue.check((input.shape[0], pointwise_out[0].shape[0], *size), input.dtype)
    if served(input, series, geometry):
        last = Series(pointwise_out, count, gates)
        return dispatch.BACKENDS["triton"].grouped_pointwise(
            input, series, last, geometry, epilogue
        )
    output = define(input, grouped, pointwise_out, active, gates, geometry, epilogue)
    return output.contiguous(memory_format=memory_format(input))


@torch.library.register_fake("gross::grouped_pointwise", lib=_library)
def _shape(input: Tensor, grouped: Terms, pointwise_out: Terms, *rest: Any) -> Tensor:
    size = Geometry(*rest[2:5]).output_size(input.shape[2:], grouped[0].shape[2:])
    shape = (input.shape[0], pointwise_out[0].shape[0], *size)
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    )


register_autocast(_library, "grouped_pointwise")
register_vmap(_library, torch.ops.gross.grouped_pointwise.default, folds=True)
for _device in ("CPU", "CUDA"):
    _library.impl("grouped_pointwise", _run, _device)


@register_flop_formula(torch.ops.gross.grouped_pointwise, get_raw=True)
def _flops(
    input: Tensor, grouped: Terms, pointwise_out: Terms, active: Tensor, *rest: Any, **_: Any
) -> int:
    """Both convolutions', two per multiply–accumulate."""
    width, group_size, *kernel_size = grouped[int(active) - 1].shape
    size = Geometry(*rest[1:4]).output_size(input.shape[2:], kernel_size)
    macs = convolution_macs(width, group_size, kernel_size, size)
    macs += convolution_macs(pointwise_out[0].shape[0], width, (1, 1), size)
    return 2 * input.shape[0] * macs
