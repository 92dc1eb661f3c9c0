"""Sums over windows of channels, rows and columns, and their gradient.

A program adds the windows of a block of pixels by channels, straight from memory: the first-level
cache serves what neighbouring windows share. Long windows of channels are cut: of d channels, with
w = ⌊√d⌋, first the sums of w, then those of every w-th of these, and of what is left: about 3·√d
loads for d. Speed is **unmeasured**."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import is_channels_last, memory_format
from .launch import Kernel, Plans, layout, on_device

#: Windows of more channels are cut in two steps.
DIRECT = 8
#: Elements of a program: 8 for each thread.
BLOCK = 1024

_plans = Plans()


@triton.jit
def add_windows(  # type: ignore[no-untyped-def]
    target,
    source,
    coarse,
    pixels,
    rows,
    columns,
    channels,
    group,
    source_rows,
    source_columns,
    source_group,
    coarse_group,
    target_strides,
    source_strides,
    coarse_strides,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COARSE: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: ``PIXELS`` pixels by ``WIDE`` channels of the target, summed in float32.

    ``CHANNELS``, ``ROWS`` and ``COLUMNS`` are the numbers of an :class:`Axis`. ``COARSE`` is (how
    many, how far apart) of the channels of ``coarse`` that are added to them."""
    blocks = tl.cdiv(channels, WIDE)
    pixel = (tl.program_id(0) // blocks).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(0) % blocks * WIDE + tl.arange(0, WIDE)
    image, row, column = pixel // (rows * columns), pixel // columns % rows, pixel % columns
    real = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    within = channel % group
    total = tl.zeros((PIXELS, WIDE), tl.float32)
    for k in range(CHANNELS[0]):
        c = within + (CHANNELS[3] + k)
        some = real & ((c >= 0) & (c < source_group))[None, :]
        at_channel = (channel // group * source_group + c) * source_strides[1]
        for i in range(ROWS[0]):
            y = row * ROWS[2] + (ROWS[3] + i * ROWS[1])
            some_rows = (y >= 0) & (y % ROWS[4] == 0) & (y // ROWS[4] < source_rows)
            for j in range(COLUMNS[0]):
                x = column * COLUMNS[2] + (COLUMNS[3] + j * COLUMNS[1])
                here = (x >= 0) & (x % COLUMNS[4] == 0) & (x // COLUMNS[4] < source_columns)
                at = (
                    image * source_strides[0]
                    + y // ROWS[4] * source_strides[2]
                    + x // COLUMNS[4] * source_strides[3]
                )
                mask = some & (some_rows & here)[:, None]
                value = tl.load(source + at[:, None] + at_channel[None, :], mask, 0.0)
                total += value.to(tl.float32)
    if COARSE[0] > 0:
        at = image * coarse_strides[0] + row * coarse_strides[2] + column * coarse_strides[3]
        first = channel // group * coarse_group + within
        for k in range(COARSE[0]):
            at_channel = (first + k * COARSE[1]) * coarse_strides[1]
            total += tl.load(coarse + at[:, None] + at_channel[None, :], real, 0.0)
    at = image * target_strides[0] + row * target_strides[2] + column * target_strides[3]
    to = target + at[:, None] + (channel * target_strides[1])[None, :]
    tl.store(to, total.to(target.dtype.element_ty), real)


class Axis(NamedTuple):
    """What position t of a target is the sum of along an axis: positions (t · stride + offset + k ·
    step) / spread of the source, for k < window, as far as there are such."""

    window: int = 1
    step: int = 1
    stride: int = 1
    offset: int = 0
    spread: int = 1


class Sums(NamedTuple):
    """One launch: channels are counted within each of ``groups``; ``coarse`` are (how many, how far
    apart) of another source's."""

    groups: int
    channels: Axis
    rows: Axis = Axis()
    columns: Axis = Axis()
    coarse: tuple[int, int] = (0, 1)


def sum_pool(
    input: Tensor,
    window: Sequence[int],
    groups: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``gross::sum_pool``, in the input's memory format."""
    deep, *image = window
    rows, columns = (
        Axis(k, d, s, -p) for k, d, s, p in zip(image, dilation, stride, padding, strict=True)
    )
    size = [
        (i + 2 * p - (k - 1) * d - 1) // s + 1
        for i, k, d, s, p in zip(input.shape[2:], image, dilation, stride, padding, strict=True)
    ]
    channels = input.shape[1] - groups * (deep - 1)
    return _summed(input, (channels, *size), Sums(groups, Axis(deep), rows, columns))


def sum_pool_backward(
    grad: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    groups: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``gross::sum_pool_backward``, in the gradient's memory format."""
    deep, *image = window
    rows, columns = (
        Axis(k, d, 1, p - (k - 1) * d, s)
        for k, d, s, p in zip(image, dilation, stride, padding, strict=True)
    )
    return _summed(grad, size, Sums(groups, Axis(deep, offset=1 - deep), rows, columns))


def _summed(source: Tensor, size: Sequence[int], sums: Sums) -> Tensor:
    """``[N, *size]`` of the source's dtype, in one launch, or in two or three."""
    deep, _, _, offset, _ = sums.channels
    if deep <= DIRECT:
        return _launch(source, None, size, sums, source.dtype)
    groups, channels = sums.groups, size[0] // sums.groups
    width = math.isqrt(deep)
    count, left = divmod(deep, width)
    image = source.shape[2:]
    flat = sums.rows == sums.columns == Axis()
    coarse = _launch(
        source,
        None,
        (groups * (channels + deep - width), *image),
        Sums(groups, Axis(width, offset=offset)),
        torch.float32,
    )
    rest = Axis(left, offset=offset + count * width)
    whole = _launch(
        source,
        coarse,
        (size[0], *image),
        Sums(groups, rest, coarse=(count, width)),
        source.dtype if flat else torch.float32,
    )
    if flat:
        return whole
    return _launch(whole, None, size, Sums(1, Axis(), sums.rows, sums.columns), source.dtype)


def _launch(
    source: Tensor, coarse: Tensor | None, size: Sequence[int], sums: Sums, dtype: torch.dtype
) -> Tensor:
    shape = (source.shape[0], *size)
    target = torch.empty(
        shape, dtype=dtype, device=source.device, memory_format=memory_format(source)
    )
    if target.numel() == 0:
        return target
    tensors = (target, source, source if coarse is None else coarse)
    key = (*map(layout, tensors), sums, source.device.index)
    with on_device(source.get_device()):
        kernel = _plans.get(key) or _plans.put(key, plan(tensors, sums))
        kernel(*tensors)
    return target


def plan(tensors: tuple[Tensor, Tensor, Tensor], sums: Sums) -> Kernel:
    """The launch for one kind of calls, of target, source and coarse."""
    target, source, coarse = tensors
    images, channels, rows, columns = target.shape
    pixels = images * rows * columns
    wide = triton.next_power_of_2(channels)
    # Neighbouring threads take neighbours in memory.
    wide = min(wide, 64 if is_channels_last(target) else 4)
    high = BLOCK // wide
    groups = sums.groups
    arguments = (
        pixels,
        rows,
        columns,
        channels,
        channels // groups,
        *source.shape[2:],
        source.shape[1] // groups,
        coarse.shape[1] // groups,
        *(tensor.stride() for tensor in tensors),
        tuple(sums.channels),
        tuple(sums.rows),
        tuple(sums.columns),
        sums.coarse,
        high,
        wide,
    )
    grid = -(-pixels // high) * -(-channels // wide)
    return Kernel(add_windows, grid, arguments, 4, 1)
