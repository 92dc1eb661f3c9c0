"""The operators ``gross::sum_pool`` and ``gross::sum_pool_backward``: sums over windows of
channels, rows and columns, the first half of a structured convolution.

On the CPU that is ``csrc/cpu/sum_pool.h``, on a GPU a Triton kernel; :func:`define` says the same
in PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import dispatch, ops
from .call import memory_format
from .composite import window_sums
from .geometry import Pair
from .library import call, register_autocast, register_gradient, register_vmap

_library = torch.library.Library("gross", "FRAGMENT")
for _schema in (
    "sum_pool(Tensor input, int[3] window, int groups, int[2] stride, int[2] padding, "
    "int[2] dilation) -> Tensor",
    "sum_pool_backward(Tensor grad, SymInt[3] size, int[3] window, int groups, int[2] stride, "
    "int[2] padding, int[2] dilation) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.needs_exact_strides,))


class Windows(NamedTuple):
    """Which sums are taken of an image: of windows of channels, rows and columns. The operators
    take it flat.

    Attributes:
        window: channels, rows, columns.
        groups: into which the channels fall; no window reaches across.
        stride, padding, dilation: of rows and columns.
    """

    window: tuple[int, int, int]
    groups: int = 1
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Channels, rows and columns of the sums, from the input's."""
        channels, *image = size
        reach = [(k - 1) * d for k, d in zip(self.window[1:], self.dilation, strict=True)]
        rows_columns = zip(image, reach, self.stride, self.padding, strict=True)
        return (
            channels - self.groups * (self.window[0] - 1),
            *[(i + 2 * p - r - 1) // s + 1 for i, r, s, p in rows_columns],
        )


def sum_pool(input: Tensor, windows: Windows) -> Tensor:
    """Sums over windows of ``[N, C, H, W]``, in its memory format; differentiable (twice)."""
    if dispatch.forced_backend() == "reference":
        return define(input, *windows)
    return call(torch.ops.gross.sum_pool.default, input, *windows)


class SumPool2d(nn.Module):
    """:func:`sum_pool` as a module, what :meth:`StructuredConv2d.fold` begins with.

    Args:
        windows: which sums.
        kernels: run on this package's kernels; otherwise in PyTorch's own operators.
    """

    def __init__(self, windows: Windows, kernels: bool = True) -> None:
        super().__init__()
        self.windows = windows
        self.kernels = kernels

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` → ``[N, C', H', W']``."""
        if isinstance(input, fx.Proxy):
            path = input.tracer.path_of_module(self)
            return input.tracer.create_proxy("call_module", path, (input,), {})
        return sum_pool(input, self.windows) if self.kernels else define(input, *self.windows)

    def extra_repr(self) -> str:
        """The windows, and what of the rest is not as usual."""
        usual = Windows(self.windows.window)._asdict()
        shown = {k: v for k, v in self.windows._asdict().items() if v != usual.get(k)}
        return ", ".join([f"{self.windows.window}", *[f"{k}={v}" for k, v in shown.items()]])


# The definition ----------------------------------------------------------------------------------


def define(
    input: Tensor,
    window: Sequence[int],
    groups: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """What ``gross::sum_pool`` computes, in PyTorch's own operators; sums in float32 at least."""
    (top, left), (rows, columns) = padding, dilation
    sums = input.to(torch.promote_types(input.dtype, torch.float32))
    if window[0] > 1:
        sums = window_sums(sums.unflatten(1, (groups, -1)), 2, window[0]).flatten(1, 2)
    if top or left:
        sums = F.pad(sums, (left, left, top, top))
    sums = window_sums(window_sums(sums, 2, window[1], rows), 3, window[2], columns)
    if tuple(stride) != (1, 1):
        sums = sums[:, :, :: stride[0], :: stride[1]]
    return sums.to(input.dtype)


def define_backward(
    grad: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    groups: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """What ``gross::sum_pool_backward`` computes, in PyTorch's own operators."""
    sums = grad.to(torch.promote_types(grad.dtype, torch.float32))
    for dim, axis in ((3, 1), (2, 0)):
        reach = (window[axis + 1] - 1) * dilation[axis]
        if stride[axis] > 1:
            between = [torch.zeros_like(sums)] * (stride[axis] - 1)
            sums = torch.stack([sums, *between], dim + 1).flatten(dim, dim + 1)
        before = reach - padding[axis]
        after = size[axis + 1] + reach - before - sums.shape[dim]
        sums = F.pad(sums, (*[0, 0] * (3 - dim), before, after))
        sums = window_sums(sums, dim, window[axis + 1], dilation[axis])
    if window[0] > 1:
        beyond = window[0] - 1
        sums = F.pad(sums.unflatten(1, (groups, -1)), (0, 0, 0, 0, beyond, beyond))
        sums = window_sums(sums, 2, window[0]).flatten(1, 2)
    return sums.to(grad.dtype)


# Shapes, gradients, autocast, vmap ---------------------------------------------------------------


@torch.library.register_fake("gross::sum_pool", lib=_library)
def _sum_pool_shape(input: Tensor, *windows: Any) -> Tensor:
    shape = (input.shape[0], *Windows(*windows).output_size(input.shape[1:]))
    return input.new_empty(shape).contiguous(memory_format=memory_format(input))


@torch.library.register_fake("gross::sum_pool_backward", lib=_library)
def _sum_pool_backward_shape(grad: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    shape = (grad.shape[0], *size)
    return grad.new_empty(shape).contiguous(memory_format=memory_format(grad))


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    input, *ctx.windows = inputs
    ctx.size = input.shape[1:]


def _sum_pool_grad(ctx: Any, needs: Sequence[Any], grad: Tensor) -> tuple:
    return (call(torch.ops.gross.sum_pool_backward.default, grad, ctx.size, *ctx.windows),)


def _save_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    _, _, *ctx.windows = inputs


def _sum_pool_backward_grad(ctx: Any, needs: Sequence[Any], grad: Tensor) -> tuple:
    return (call(torch.ops.gross.sum_pool.default, grad, *ctx.windows),)


register_gradient(_library, torch.ops.gross.sum_pool.default, define, _save, _sum_pool_grad)
register_gradient(
    _library,
    torch.ops.gross.sum_pool_backward.default,
    define_backward,
    _save_backward,
    _sum_pool_backward_grad,
)
register_autocast(_library, "sum_pool")
register_vmap(_library, torch.ops.gross.sum_pool.default, folds=True)
register_vmap(_library, torch.ops.gross.sum_pool_backward.default, folds=True)


# Implementations ---------------------------------------------------------------------------------


def _cuda_forward(input: Tensor, *windows: Any) -> Tensor:
    triton = _triton(input)
    if triton is not None:
        return triton.sum_pool(input, *windows)
    return define(input, *windows).contiguous(memory_format=memory_format(input))


def _cuda_backward(grad: Tensor, size: Sequence[int], *windows: Any) -> Tensor:
    triton = _triton(grad)
    if triton is not None:
        return triton.sum_pool_backward(grad, size, *windows)
    return define_backward(grad, size, *windows).contiguous(memory_format=memory_format(grad))


def _triton(tensor: Tensor) -> Any:
    """The backend that serves a tensor on a GPU; None where only the definition does."""
    backend: Any = dispatch.BACKENDS.get("triton")
    forced = dispatch.forced_backend()
    serves = backend is not None and forced != "reference" and backend.pools(tensor)
    return backend if serves else None


_library.impl("sum_pool", _cuda_forward, "CUDA")
_library.impl("sum_pool_backward", _cuda_backward, "CUDA")

if ops.load_error is not None:
    _library.impl("sum_pool", ops.missing, "CPU")
    _library.impl("sum_pool_backward", ops.missing, "CPU")
