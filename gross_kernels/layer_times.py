"""Predicted times of the ways to run a layer on a GPU: a closed form, by which
:func:`dispatch.choose_layer` chooses among them.

A kernel takes as long as the slower of memory and arithmetic, and a launch. The figures are those
of an H200, **none of them measured with this package**: what it copies and multiplies was measured
elsewhere, the rest is assumed. The choice depends on their ratios, which are much the same on other
GPUs with matrix units."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .call import float32_of
from .library import constant

#: Bytes that a copy moves in a microsecond, read and written.
COPY = 4.3e6
#: Floating-point operations of a microsecond: of 16 bits, TF32, float32 as three TF32 products, and
#: as itself.
PRODUCTS = {"16": 780e6, "tf32": 390e6, "tf32x3": 130e6, "ieee": 67e6}
#: How much of that the products of the grouped kernels reach, which use no warp groups.
GROUPED_PRODUCTS = 0.8
#: Microseconds of a launch.
LAUNCH = 2.0
#: Which part of a copy's bytes a grouped kernel moves in its time, by group size up to which, and
#: beyond (``benchmarks/gpu.py`` aims at them); the kernel of grouped and last convolution.
GROUPED_COPY, LARGE_COPY, PAIR_COPY = {16: 0.9, 32: 0.8, 64: 0.6}, 0.35, 0.8
#: Output channels of a program of that kernel: beyond them what it reads is read again.
PAIR_CHANNELS = 256


class LayerCall(NamedTuple):
    """What the times depend on.

    Attributes:
        pixels_in, pixels_out: of the input and of the output, all images together.
        in_channels, width_in, width_out, out_channels, group_size, taps: of the layer.
        itemsize, precision: bytes of a number, and how it is multiplied: a key of
            :data:`PRODUCTS`.
        training: whether a backward pass follows.
    """

    pixels_in: int
    pixels_out: int
    in_channels: int
    width_in: int
    width_out: int
    out_channels: int
    group_size: int
    taps: int
    itemsize: int
    precision: str
    training: bool


@constant
def multiplied(dtype: torch.dtype) -> str:
    """How numbers of a dtype are multiplied: a key of :data:`PRODUCTS`."""
    return "16" if dtype.itemsize == 2 else float32_of(dtype) or "ieee"


def _kernel(bytes_moved: float, flops: float, copy: float = 1.0, products: float = 1.0) -> float:
    return LAUNCH + max(bytes_moved / (COPY * copy), flops / products)


def times(call: LayerCall) -> dict[str, float]:
    """Microseconds of every way to run the layer, by its name: "parts", three convolutions;
    "merged", the dense convolution that is their product, with the products that make it; and,
    without a backward pass, "grouped_pointwise", the last two of the three in one kernel."""
    n, rate = call.itemsize, PRODUCTS[call.precision]
    read, written = call.pixels_in * call.in_channels, call.pixels_out * call.out_channels
    first = _kernel(
        n * (read + call.pixels_in * call.width_in), 2 * read * call.width_in, products=rate
    )
    last = _kernel(
        n * (call.pixels_out * call.width_out + written),
        2 * written * call.width_out,
        products=rate,
    )
    fits = [share for size, share in GROUPED_COPY.items() if call.group_size <= size]
    # A tile has 16 channels at least, whatever the group size.
    grouped = _kernel(
        n * (call.pixels_in * call.width_in + call.pixels_out * call.width_out),
        2 * call.pixels_out * call.width_out * call.taps * max(16, call.group_size),
        (fits or [LARGE_COPY])[0],
        rate * GROUPED_PRODUCTS,
    )
    dense = _kernel(n * (read + written), 2 * written * call.in_channels * call.taps, products=rate)
    weights = call.taps * call.width_out * call.in_channels
    # In float32; three sums of terms, two products.
    merging = 5 * LAUNCH + 2 * weights * (call.group_size + call.out_channels) / PRODUCTS["ieee"]
    # A backward pass takes two products of the same size for every product.
    passes = 3 if call.training else 1
    summing = 2 * LAUNCH
    found = {
        "parts": passes * (summing + first + grouped + last),
        "merged": passes * (merging + dense),
    }
    if not call.training and call.group_size <= 64 and call.precision in ("16", "tf32"):
        reads = -(-call.out_channels // PAIR_CHANNELS)
        products = call.taps * max(16, call.group_size) / GROUPED_PRODUCTS
        pair = _kernel(
            n * (reads * call.pixels_in * call.width_in + written),
            2 * call.pixels_out * call.width_out * (reads * products + call.out_channels),
            PAIR_COPY,
            rate,
        )
        found["grouped_pointwise"] = summing + LAUNCH + first + pair
    return found
