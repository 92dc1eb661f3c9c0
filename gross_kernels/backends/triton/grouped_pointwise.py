"""Grouped convolution and last pointwise in one kernel, with all that follows the sum:
``act(Q_n · conv(p, R_n) + bias + residual)``, or ``act(…) + residual``. What lies between the two
never leaves the chip.

A program holds the sums of a tile of pixels (of a few rows, so that little of the halo is read
twice through the second-level cache) and of up to 256 output channels. For one part of 16 channels
of the inner width after another it forms the grouped product from shifted loads of ``p``, rounds
it, and multiplies it with the part's block of Q. Weights are summed once per call, into a scratch
tensor in the order in which the products want them: in every program it would take longer than the
products."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...epilogue import Epilogue
from ...geometry import Geometry
from ...series import Series
from . import tiles
from .correlate import assemble, load_tile, store_tile, to_tf32
from .geometry import Packs
from .launch import Kernel, Plans, architecture, layout, on_device, precision_of

#: Channels of a part; rows and columns that a program of ``arrange_last`` transposes.
PART, BLOCK = 16, 32

_plans = Plans()


@triton.jit
def arrange_grouped(
    result, terms, gates, in_channels, out_channels,
    SIZES: tl.constexpr, GATED: tl.constexpr, TAPS: tl.constexpr, PACK_SOURCE: tl.constexpr,
    PACK_RESULT: tl.constexpr, PARTS_PER_PACK: tl.constexpr, DEPTH: tl.constexpr,
    PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ``R_n`` of one part and tap, as ``[part, tap, DEPTH source channels, PART]``,
    zero between the groups of a pack."""
    program = tl.program_id(0)
    part = program // TAPS
    pack = part // PARTS_PER_PACK
    outer = part % PARTS_PER_PACK * PART + tl.arange(0, PART)
    inner = tl.arange(0, DEPTH)
    o = (pack * PACK_RESULT + outer)[None, :]
    c = (pack * PACK_SOURCE + inner)[:, None]
    real = (outer < PACK_RESULT)[None, :] & (o < out_channels)
    real = real & (inner < PACK_SOURCE)[:, None] & (c < in_channels)
    weight = assemble(
        terms, gates, o, c, program % TAPS, real, in_channels, out_channels,
        result.dtype.element_ty, SIZES, GATED, TAPS, False, PRECISION, -1,
    )  # fmt: skip
    offset = inner[:, None] * PART + tl.arange(0, PART)[None, :]
    tl.store(result + program.to(tl.int64) * (DEPTH * PART) + offset, weight)


@triton.jit
def arrange_last(
    result, terms, gates, width, out_channels,
    COUNT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a block of ``Q_n``, transposed to ``[width, C_out]``."""
    blocks = tl.cdiv(width, BLOCK)
    r = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    o = tl.program_id(0) // blocks * BLOCK + tl.arange(0, BLOCK)
    real = (o < out_channels)[:, None] & (r < width)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in tl.static_range(COUNT):
        part = tl.load(terms[i] + o[:, None] * width + r[None, :], real, 0.0).to(tl.float32)
        if GATED:
            part *= tl.load(gates + i).to(tl.float32)
        total += part
    if PRECISION == "tf32":
        total = to_tf32(total)
    offset = r[None, :] * out_channels + o[:, None]
    tl.store(result + offset, total.to(result.dtype.element_ty), real)


@triton.jit
def activated(value, slopes, o, o_real, ACTIVATION: tl.constexpr):
    """One of ``epilogue.ACTIVATIONS``."""
    if ACTIVATION == "relu":
        value = tl.where(value < 0, 0.0, value)
    if ACTIVATION == "prelu":
        slope = tl.load(slopes + o, o_real, 0.0).to(tl.float32)
        value = tl.where(value < 0, value * slope[None, :], value)
    if ACTIVATION == "relu6":
        value = tl.where(value < 0, 0.0, tl.where(value > 6, 6.0, value))
    if ACTIVATION == "silu":
        value = value / (1 + tl.exp(-value))
    return value


@triton.jit(
    do_not_specialize=[
        "images",
        "parts",
        "tile_rows",
        "tile_columns",
        "source_height",
        "source_width",
        "result_height",
        "result_width",
    ]
)
def grouped_pointwise(
    source, result, middle, last, bias, slopes, residual,
    in_channels, width, out_channels, images, parts, tile_rows, tile_columns,
    source_n, source_c, source_h, source_w, source_height, source_width,
    result_n, result_c, result_h, result_w, result_height, result_width,
    residual_n, residual_c, residual_h, residual_w,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, GEOMETRY: tl.constexpr,
    PACK_SOURCE: tl.constexpr, PACK_RESULT: tl.constexpr, PARTS_PER_PACK: tl.constexpr,
    DEPTH: tl.constexpr, PART: tl.constexpr, BLOCK_SOURCE: tl.constexpr, IMAGES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr,
    SOURCE_LAST: tl.constexpr, RESULT_LAST: tl.constexpr, RESIDUAL_CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ``IMAGES × ROWS × COLUMNS`` pixels, ``BLOCK_OUT`` output channels."""
    STRIDE_H: tl.constexpr = GEOMETRY[0]
    STRIDE_W: tl.constexpr = GEOMETRY[1]
    PADDING_H: tl.constexpr = GEOMETRY[2]
    PADDING_W: tl.constexpr = GEOMETRY[3]
    DILATION_H: tl.constexpr = GEOMETRY[4]
    DILATION_W: tl.constexpr = GEOMETRY[5]
    PIXELS: tl.constexpr = IMAGES * ROWS * COLUMNS
    dtype = source.dtype.element_ty

    # Neighbouring programs work on the same pixels, then on neighbouring ones.
    program = tl.program_id(0)
    blocks = tl.cdiv(out_channels, BLOCK_OUT)
    o = program % blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    o_real = o < out_channels
    program = program // blocks
    lane = tl.arange(0, PIXELS)
    column = program % tile_columns * COLUMNS + lane % COLUMNS
    program = program // tile_columns
    row = program % tile_rows * ROWS + lane // COLUMNS % ROWS
    image = program // tile_rows * IMAGES + lane // (COLUMNS * ROWS)
    written = (image < images) & (row < result_height) & (column < result_width)
    image = image.to(tl.int64)
    origin_row = row * STRIDE_H - PADDING_H
    origin_column = column * STRIDE_W - PADDING_W

    other = image * residual_n + row.to(tl.int64) * residual_h + column.to(tl.int64) * residual_w
    if residual is None or RESIDUAL_LAST:
        total = tl.zeros((PIXELS, BLOCK_OUT), tl.float32)
    else:
        total = load_tile(
            residual, other, written, o.to(tl.int64)[None, :] * residual_c, o_real[None, :],
            RESIDUAL_CHANNELS_LAST, False, 1, PIXELS, BLOCK_OUT,
        ).to(tl.float32)  # fmt: skip
    for part in range(parts):
        pack = part // PARTS_PER_PACK
        outer = part % PARTS_PER_PACK * PART + tl.arange(0, PART)
        between = tl.zeros((PIXELS, PART), tl.float32)
        for block in tl.static_range(DEPTH // BLOCK_SOURCE):
            inner = block * BLOCK_SOURCE + tl.arange(0, BLOCK_SOURCE)
            of = pack * PACK_SOURCE + inner
            of_real = (inner < PACK_SOURCE) & (of < in_channels)
            channel = of.to(tl.int64)[None, :] * source_c
            for tap in tl.static_range(TAPS):
                from_row = origin_row + tap // KERNEL_W * DILATION_H
                from_column = origin_column + tap % KERNEL_W * DILATION_W
                real = (
                    written
                    & (from_row >= 0)
                    & (from_row < source_height)
                    & (from_column >= 0)
                    & (from_column < source_width)
                )
                pixel = image * source_n + from_row.to(tl.int64) * source_h + from_column * source_w
                values = load_tile(
                    source, pixel, real, channel, of_real[None, :], SOURCE_LAST, False, 1, PIXELS,
                    BLOCK_SOURCE,
                )  # fmt: skip
                at = ((part * TAPS + tap) * DEPTH + inner)[:, None] * PART
                weight = tl.load(middle + at + tl.arange(0, PART)[None, :])
                between = tl.dot(values, weight, between, input_precision=PRECISION)
        r = pack * PACK_RESULT + outer
        r_real = (outer < PACK_RESULT) & (r < width)
        weight = tl.load(
            last + r[:, None] * out_channels + o[None, :], r_real[:, None] & o_real[None, :], 0.0
        )
        total = tl.dot(between.to(dtype), weight, total, input_precision=PRECISION)

    if bias is not None:
        total += tl.load(bias + o, o_real, 0.0).to(tl.float32)[None, :]
    total = activated(total, slopes, o, o_real, ACTIVATION)
    if RESIDUAL_LAST:
        total += load_tile(
            residual, other, written, o.to(tl.int64)[None, :] * residual_c, o_real[None, :],
            RESIDUAL_CHANNELS_LAST, False, 1, PIXELS, BLOCK_OUT,
        )  # fmt: skip
    pixel = image * result_n + row.to(tl.int64) * result_h + column.to(tl.int64) * result_w
    store_tile(
        result, total.to(dtype), pixel, written, o.to(tl.int64)[None, :] * result_c,
        o_real[None, :], RESULT_LAST, False, 1, PIXELS, BLOCK_OUT,
    )  # fmt: skip


class Layout(NamedTuple):
    """Everything that a plan depends on: shapes with strides, dtypes and alignment of all tensors,
    and the rest of the call."""

    input: tuple
    grouped: tuple[tuple, ...]
    last: tuple[tuple, ...]
    gates: tuple | None
    bias: tuple | None
    residual: tuple | None
    slopes: tuple | None
    activation: str
    residual_last: bool
    geometry: Geometry
    precision: str
    device: int | None


class Plan(NamedTuple):
    """The three launches, the elements of both scratch tensors, and the output.

    Attributes:
        arrange_grouped, arrange_last, product: launched in this order.
        grouped, last: elements of the first two's results.
        shape, stride: the output's.
    """

    arrange_grouped: Kernel
    arrange_last: Kernel
    product: Kernel
    grouped: int
    last: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def run(
    input: Tensor, grouped: Series, last: Series, geometry: Geometry, epilogue: Epilogue
) -> Tensor:
    """``epilogue(Q_n · conv(input, R_n))``, ``[N, C_out, H', W']`` of the input's dtype and memory
    format; ``grouped`` and ``last`` have the same gates."""
    terms, pointwise = _dense(grouped.leading), _dense(last.leading)
    bias, residual, activation, slopes, residual_last = epilogue
    gates = None if grouped.gates is None else grouped.gates.contiguous()
    if slopes is not None and slopes.numel() == 1:
        slopes = slopes.expand(pointwise[0].shape[0])
    bias, slopes = (None if each is None else each.contiguous() for each in (bias, slopes))
    key = Layout(
        layout(input),
        tuple(map(layout, terms)),
        tuple(map(layout, pointwise)),
        _layout(gates),
        _layout(bias),
        _layout(residual),
        _layout(slopes),
        activation,
        residual_last,
        Geometry(*map(tuple, geometry)),
        precision_of(input.dtype, input.device.index),
        input.device.index,
    )
    with on_device(input.get_device()):
        ready = _plans.get(key) or _plans.put(key, plan(key))
        result = torch.empty_strided(
            ready.shape, ready.stride, dtype=input.dtype, device=input.device
        )
        if result.numel() == 0:
            return result
        middle, wide = (input.new_empty(count) for count in (ready.grouped, ready.last))
        ready.arrange_grouped(middle, terms, gates)
        ready.arrange_last(wide, pointwise, gates)
        ready.product(input, result, middle, wide, bias, slopes, residual)
    return result


def _layout(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else layout(tensor)


def _dense(terms: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple([term.contiguous() for term in terms])


def tile_shape(
    pixels: int, size: Sequence[int], reach: Sequence[tuple[int, int]]
) -> tuple[int, int, int]:
    """Images, rows and columns of a program, powers of two whose product is ``pixels``: those that
    compute and read the fewest pixels.

    Args:
        size: rows and columns of the result.
        reach: of rows and columns the stride, and how far the kernel's last tap is from its
            first.
    """

    def cost(shape: tuple[int, int, int]) -> float:
        images, *sides = shape
        tiles = read = 1.0
        for whole, side, (stride, beyond) in zip(size, sides, reach, strict=True):
            tiles *= -(-whole // side)
            read *= (side - 1) * stride + beyond + 1
        return tiles / images * (pixels + images * read)

    powers = [2**n for n in range(pixels.bit_length())]
    return min(
        (
            (pixels // (rows * columns), rows, columns)
            for rows in powers
            for columns in powers
            if rows * columns <= pixels
        ),
        key=cost,
    )


def shape_of(call: Layout) -> tiles.Shape:
    """What the tile table asks."""
    in_channels, (width, group_size, *kernel) = call.input[0][1], call.grouped[-1][0]
    groups = in_channels // group_size
    itemsize = call.input[2].itemsize
    return tiles.Shape(
        group_size,
        width // groups,
        groups,
        len(call.grouped),
        kernel[0] * kernel[1],
        1,
        call.geometry.stride != (1, 1),
        in_channels * itemsize % 16 == 0,
        itemsize,
        call.precision,
        architecture(call.device),
    )


def plan(call: Layout, tile: tiles.PairTile | None = None) -> Plan:
    """The launches for one kind of calls, by the table's tile or another."""
    (images, in_channels, *input_size), input_stride, dtype, _ = call.input
    width, group_size, *kernel = call.grouped[-1][0]
    out_channels = call.last[0][0][0]
    groups = in_channels // group_size
    if tile is None:
        tile = tiles.pair(shape_of(call), out_channels)
    packs = Packs.of(in_channels, width, groups, tile.source)
    parts_per_pack = -(-packs.result // PART)
    parts = packs.number * parts_per_pack
    depth = -(-packs.source // tile.source) * tile.source
    taps = kernel[0] * kernel[1]
    geometry = call.geometry
    size = geometry.output_size(input_size, kernel)
    reach = [
        (stride, (taps_along - 1) * dilation)
        for stride, taps_along, dilation in zip(
            geometry.stride, kernel, geometry.dilation, strict=True
        )
    ]
    at_once = tile_shape(tile.pixels, size, reach)
    tile_images, tile_rows, tile_columns = (
        -(-whole // side) for whole, side in zip((images, *size), at_once, strict=True)
    )
    shape = (images, out_channels, *size)
    dense_last = input_stride[1] <= input_stride[3]
    stride = torch.empty(
        shape, device="meta",
        memory_format=torch.channels_last if dense_last else torch.contiguous_format,
    ).stride()  # fmt: skip
    residual_stride = (0, 0, 0, 0) if call.residual is None else call.residual[1]
    gated = call.gates is not None
    sizes = tuple(term[0][1] for term in call.grouped)
    packed = (packs.source, packs.result, parts_per_pack, depth, PART)
    first = (in_channels, width, sizes, gated, taps, *packed, call.precision)
    second = (width, out_channels, len(call.last), gated, BLOCK, call.precision)
    blocks = -(-out_channels // tile.out)
    third = (
        in_channels,
        width,
        out_channels,
        images,
        parts,
        tile_rows,
        tile_columns,
        *input_stride,
        *input_size,
        *stride,
        *size,
        *residual_stride,
        kernel[1],
        taps,
        geometry.numbers,
        *packed,
        tile.source,
        *at_once,
        tile.out,
        call.activation,
        call.residual_last and call.residual is not None,
        dense_last,
        stride[1] <= stride[3],
        residual_stride[1] <= residual_stride[3],
        call.precision,
    )
    corners = -(-width // BLOCK) * -(-out_channels // BLOCK)
    programs = tile_images * tile_rows * tile_columns * blocks
    return Plan(
        Kernel(arrange_grouped, parts * taps, first, 4, 1),
        Kernel(arrange_last, corners, second, 4, 1),
        Kernel(grouped_pointwise, programs, third, tile.warps, tile.stages),
        parts * taps * depth * PART,
        width * out_channels,
        shape,
        stride,
    )
