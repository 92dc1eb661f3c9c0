"""Gradients of every term and of the gates, in two passes and without atomics.

``accumulate``: a program holds the gradient of a few packs' weight, all taps or some, in registers, and marches down its
slice of the pixels like ``correlate.march``: a row of the input is loaded once for every column of the kernel and meets
as many rows of the output's gradient as the kernel has rows, those kept from the steps before. The slice's sum goes to a
scratch tensor in the compact shape of the largest active term: what lies outside the groups is not written.

``distribute``: adds the slices in order, and writes the sum where each active term has an element, scaled by its gate.

Slices are cut by shape and device, so results repeat bit by bit. The scratch is written and read once: for 64 channels,
groups of 16 and 264 slices 10 MB each way, through the second-level cache, where the tensors (batch 128, 56×56) have 103.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .correlate import block_start, load_tile, phase_of
from .geometry import Packs, axis, channels_last, flat
from .launch import Kernel, Plans, architecture, float32_precision, layout, on_device, processors, tuned

#: Elements of the gradient that a program of the second pass adds up (a line of memory), and slices that it loads at
#: once: one after another, each of some 250 slices would wait for the memory, longer than the first pass takes.
BLOCK, AT_ONCE = 32, 32
#: Programs of the first pass for each multiprocessor.
PROGRAMS_PER_PROCESSOR = 2


#: As in ``correlate``.
SIZES_ALONE = [
    *("input_height", "input_width", "grad_height", "grad_width", "parts", "lanes", "lane_width", "column_tiles"),
    *("row_count", "rows_per_tile", "tap_blocks", "slices", "tile_count"),
]

_plans = Plans()


@triton.jit(do_not_specialize=SIZES_ALONE)
def accumulate(
    input, grad, partial, in_channels, out_channels,
    input_n, input_c, input_h, input_w, input_height, input_width,
    grad_n, grad_c, grad_h, grad_w, grad_height, grad_width,
    parts, lanes, lane_width, column_tiles, row_count, rows_per_tile, tap_blocks, slices, tile_count,
    SIZE: tl.constexpr, KERNEL_W: tl.constexpr, TAPS: tl.constexpr, TAP_ROWS: tl.constexpr, TAP_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_PHASES: tl.constexpr, COLUMN_PHASES: tl.constexpr,
    PACK_INPUT: tl.constexpr, PACK_OUTPUT: tl.constexpr, INPUT_PARTS: tl.constexpr, OUTPUT_PARTS: tl.constexpr,
    BLOCK_LANES: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_INPUT: tl.constexpr, BLOCK_OUTPUT: tl.constexpr,
    INPUT_LAST: tl.constexpr, GRAD_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_PARTS`` parts of packs, ``TAP_ROWS × TAP_COLUMNS`` taps, one slice of the tiles of pixels."""
    # See geometry.Axis.
    ROW_ADVANCE: tl.constexpr = ROWS[1]
    ROW_SOURCE_STEP: tl.constexpr = ROWS[2]
    ROW_RESULT_STEP: tl.constexpr = ROWS[3]
    COLUMN_ADVANCE: tl.constexpr = COLUMNS[1]
    COLUMN_SOURCE_STEP: tl.constexpr = COLUMNS[2]
    COLUMN_RESULT_STEP: tl.constexpr = COLUMNS[3]
    HISTORY: tl.constexpr = (TAP_ROWS - 1) // ROW_ADVANCE + 1
    WIDE: tl.constexpr = BLOCK_PARTS > 1

    program = tl.program_id(0)
    blocks = tl.cdiv(parts, BLOCK_PARTS)
    part = program % blocks * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS)
    program = program // blocks
    tap_block = program % tap_blocks
    slice = program // tap_blocks
    tap_row = tap_block // tl.cdiv(KERNEL_W, TAP_COLUMNS) * TAP_ROWS
    tap_column = tap_block % tl.cdiv(KERNEL_W, TAP_COLUMNS) * TAP_COLUMNS

    pack = part // (INPUT_PARTS * OUTPUT_PARTS)
    inner = part % INPUT_PARTS * BLOCK_INPUT
    outer = part // INPUT_PARTS % OUTPUT_PARTS * BLOCK_OUTPUT
    k = inner[:, None] + tl.arange(0, BLOCK_INPUT)[None, :]
    r = outer[:, None] + tl.arange(0, BLOCK_OUTPUT)[None, :]
    c = pack[:, None] * PACK_INPUT + k
    o = pack[:, None] * PACK_OUTPUT + r
    c_real = (k < PACK_INPUT) & (c < in_channels)
    o_real = (r < PACK_OUTPUT) & (o < out_channels)
    from_c = c.to(tl.int64) * input_c
    from_o = o.to(tl.int64) * grad_c

    sums = ()
    for tap in tl.static_range(TAP_ROWS * TAP_COLUMNS):
        if WIDE:
            sums = sums + (tl.zeros((BLOCK_PARTS, BLOCK_OUTPUT, BLOCK_INPUT), tl.float32),)
        else:
            sums = sums + (tl.zeros((BLOCK_OUTPUT, BLOCK_INPUT), tl.float32),)

    for tile in range(slice, tile_count, slices):
        column_tile = tile % column_tiles
        phase = tile // column_tiles
        result_column, source_column, _ = phase_of(COLUMN_PHASES, phase % (len(COLUMN_PHASES) // 3))
        phase = phase // (len(COLUMN_PHASES) // 3)
        result_row, source_row, _ = phase_of(ROW_PHASES, phase % (len(ROW_PHASES) // 3))
        first = phase // (len(ROW_PHASES) // 3) * rows_per_tile
        last = tl.minimum(first + rows_per_tile, row_count)

        lane = column_tile.to(tl.int64) * BLOCK_LANES + tl.arange(0, BLOCK_LANES)
        image = lane // lane_width
        step = lane % lane_width
        column = result_column + step * COLUMN_RESULT_STEP
        column_real = (lane < lanes) & (column < grad_width)
        origin = source_column + tap_column * COLUMN_SOURCE_STEP + step * (COLUMN_ADVANCE * COLUMN_SOURCE_STEP)
        row_origin = source_row + tap_row * ROW_SOURCE_STEP

        # Rows of the output's gradient that later rows of the input still meet, as [part, output channel, pixel].
        kept = ()
        for older in tl.static_range(HISTORY - 1):
            if WIDE:
                kept = kept + (tl.zeros((BLOCK_PARTS, BLOCK_OUTPUT, BLOCK_LANES), grad.dtype.element_ty),)
            else:
                kept = kept + (tl.zeros((BLOCK_OUTPUT, BLOCK_LANES), grad.dtype.element_ty),)
        for t in range(first, last + HISTORY - 1):
            row = result_row + t * ROW_RESULT_STEP
            pixel = image * grad_n + column * grad_w + row.to(tl.int64) * grad_h
            pixel_real = column_real & (t < last) & (row < grad_height)
            newest = load_tile(
                grad, pixel, pixel_real, from_o, o_real, GRAD_LAST, WIDE, BLOCK_PARTS, BLOCK_LANES, BLOCK_OUTPUT
            )
            if WIDE:
                newest = tl.permute(newest, (0, 2, 1))
            else:
                newest = tl.trans(newest)
            kept = (newest,) + kept
            for advance in tl.static_range(ROW_ADVANCE):
                row = row_origin + (t * ROW_ADVANCE + advance) * ROW_SOURCE_STEP
                row_real = (row >= 0) & (row < input_height)
                for j in tl.static_range(TAP_COLUMNS):
                    at = origin + j * COLUMN_SOURCE_STEP
                    pixel = image * input_n + at * input_w + row.to(tl.int64) * input_h
                    pixel_real = column_real & (at >= 0) & (at < input_width) & row_real
                    values = load_tile(
                        input, pixel, pixel_real, from_c, c_real, INPUT_LAST, WIDE, BLOCK_PARTS, BLOCK_LANES,
                        BLOCK_INPUT,
                    )  # fmt: skip
                    updated = ()
                    for n in tl.static_range(TAP_ROWS * TAP_COLUMNS):
                        # Tap row i = q·advance + …: row t·advance + i of the input meets row t of the gradient.
                        if n % TAP_COLUMNS == j and n // TAP_COLUMNS % ROW_ADVANCE == advance:
                            met = kept[n // TAP_COLUMNS // ROW_ADVANCE]
                            updated = updated + (tl.dot(met, values, sums[n], input_precision=PRECISION),)
                        else:
                            updated = updated + (sums[n],)
                    sums = updated
            shorter = ()
            for q in tl.static_range(HISTORY - 1):
                # Always chosen. Triton overlaps the loads with the products only in loops that carry no value on
                # unchanged.
                shorter = shorter + (tl.where(t < last + HISTORY, kept[q], tl.zeros_like(kept[q])),)
            kept = shorter

    # [slice, tap, output channel, channel within its group]
    c = c[:, None, :]
    o = o[:, :, None]
    within = c - block_start(o, in_channels, out_channels, SIZE)
    real = c_real[:, None, :] & o_real[:, :, None] & (within >= 0) & (within < SIZE)
    for n in tl.static_range(TAP_ROWS * TAP_COLUMNS):
        i = tap_row + n // TAP_COLUMNS
        j = tap_column + n % TAP_COLUMNS
        exists = (i * KERNEL_W < TAPS) & (j < KERNEL_W)
        offset = ((slice * TAPS + i * KERNEL_W + j).to(tl.int64) * out_channels + o) * SIZE + within
        if WIDE:
            total = sums[n]
        else:
            total = tl.reshape(sums[n], (1, BLOCK_OUTPUT, BLOCK_INPUT))
        tl.store(partial + offset, total, real & exists)


@triton.jit
def distribute(
    partial, terms, gates, grad_terms, grad_gates, in_channels, out_channels, slices, count,
    SIZES: tl.constexpr, GATED: tl.constexpr, TAPS: tl.constexpr, TERMS_LAST: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK`` elements of the scratch tensor; ``grad_gates`` is ``[programs, active]``, summed later."""
    LARGEST: tl.constexpr = SIZES[len(SIZES) - 1]
    program = tl.program_id(0)
    element = program * BLOCK + tl.arange(0, BLOCK)
    real = element < count
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, slices, AT_ONCE):
        slice = block + tl.arange(0, AT_ONCE)
        offset = slice.to(tl.int64)[:, None] * count + element[None, :]
        total += tl.sum(tl.load(partial + offset, (slice < slices)[:, None] & real[None, :], 0.0), 0)
    tap = element // (out_channels * LARGEST)
    o = element // LARGEST % out_channels
    c = block_start(o, in_channels, out_channels, LARGEST) + element % LARGEST
    for i in tl.static_range(len(SIZES)):
        k = c - block_start(o, in_channels, out_channels, SIZES[i])
        inside = real & (k >= 0) & (k < SIZES[i])
        offset = (o * SIZES[i] + k) * TAPS + tap
        value = total
        if GATED:
            value = total * tl.load(gates + i).to(tl.float32)
            if TERMS_LAST:
                term = tl.load(terms[i] + (o * TAPS + tap) * SIZES[i] + k, inside, 0.0).to(tl.float32)
            else:
                term = tl.load(terms[i] + offset, inside, 0.0).to(tl.float32)
            tl.store(grad_gates + program * len(SIZES) + i, tl.sum(tl.where(inside, total * term, 0.0)))
        tl.store(grad_terms[i] + offset, value.to(grad_terms[i].dtype.element_ty), inside)


class Call(NamedTuple):
    """Everything that a plan depends on."""

    input: tuple
    grad: tuple
    terms: tuple[tuple, ...]
    gates: tuple | None
    last: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    precision: str
    device: int | None


class Plan(NamedTuple):
    """Both passes, the scratch tensor's elements, and the second pass's programs."""

    accumulate: Kernel
    distribute: Kernel
    scratch: int
    programs: int


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
    """Gradients with respect to every term and to the gates (None without gates); zero beyond ``active``."""
    # Contiguous whatever the terms are, as the operator promises.
    grad_terms = [torch.empty(term.shape, dtype=term.dtype, device=term.device) for term in terms]
    for unused in grad_terms[active:]:
        unused.zero_()
    grad_gates = None if gates is None else torch.zeros_like(gates, memory_format=torch.contiguous_format)
    if grad.numel() == 0 or input.numel() == 0:
        for unused in grad_terms[:active]:
            unused.zero_()
        return grad_terms, grad_gates
    if gates is not None:
        gates = gates.contiguous()
    used = tuple(terms[:active])
    last = gates is not None and all(channels_last(term.shape, term.stride()) for term in used)
    if gates is not None and not last:
        used = tuple(term.contiguous() for term in used)
    call = Call(
        layout(input),
        layout(grad),
        tuple(map(layout, used)),
        None if gates is None else layout(gates),
        last,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        float32_precision() if input.dtype == torch.float32 else "tf32",
        input.device.index,
    )
    with on_device(input):
        plan = _plans.get(call, choose, call, input, grad)
        partial = torch.empty(plan.scratch, dtype=torch.float32, device=input.device)
        plan.accumulate(input, grad, partial)
        parts = None
        if grad_gates is not None:
            parts = torch.empty((plan.programs, active), dtype=torch.float32, device=input.device)
        # Without gates the terms are not read: their gradients stand in for them.
        results = tuple(grad_terms[:active])
        plan.distribute(partial, results if gates is None else used, gates, results, parts)
        if grad_gates is not None and parts is not None:
            grad_gates[:active] = parts.sum(0)
    return grad_terms, grad_gates


def choose(call: Call, input: Tensor, grad: Tensor) -> Plan:
    """The plan of a kind of calls, by the table or by autotuning of the first pass."""

    def first_pass(tile: tiles.WeightTile) -> Kernel:
        return plan_of(call, tile).accumulate

    candidates = tiles.weight_gradient(shape_of(call))
    largest = max(plan_of(call, tile).scratch for tile in candidates)
    scratch = torch.empty(largest if tiles.AUTOTUNE else 0, dtype=torch.float32, device=input.device)
    return plan_of(call, tuned(f"weight gradient {call!r}", candidates, first_pass, (input, grad, scratch)))


def shape_of(call: Call) -> tiles.Shape:
    """What the tile table asks."""
    in_channels, (out_channels, size, *kernel) = call.input[0][1], call.terms[-1][0]
    groups = in_channels // size
    itemsize = call.input[2].itemsize
    return tiles.Shape(
        size,
        out_channels // groups,
        groups,
        len(call.terms),
        kernel[0] * kernel[1],
        kernel[0],
        call.stride != (1, 1),
        in_channels * itemsize % 16 == 0 and out_channels * itemsize % 16 == 0,
        itemsize,
        call.precision,
        architecture(call.device),
    )


def plan_of(call: Call, tile: tiles.WeightTile) -> Plan:
    """Both launches of one tile for one kind of calls."""
    (batch, in_channels, *input_size), input_stride, *_ = call.input
    (_, out_channels, height, width), grad_stride, *_ = call.grad
    sizes = tuple(term[0][1] for term in call.terms)
    kernel = call.terms[0][0][2:]
    rows, columns = (
        axis(*each, False) for each in zip(kernel, call.stride, call.padding, call.dilation, strict=True)
    )
    taps = kernel[0] * kernel[1]
    tap_rows = kernel[0] if tile.all_rows else 1
    tap_columns = kernel[1] if tile.all_columns else 1
    tap_blocks = -(-kernel[0] // tap_rows) * -(-kernel[1] // tap_columns)
    packs = Packs.of(in_channels, out_channels, in_channels // sizes[-1], max(tile.input, tile.output))
    input_parts, output_parts = -(-packs.source // tile.input), -(-packs.result // tile.output)
    parts = packs.count * input_parts * output_parts
    base = -(-parts // tile.parts) * tap_blocks
    row_count, lane_width = rows.steps(height), columns.steps(width)
    lanes = batch * lane_width
    column_tiles = -(-lanes // tile.lanes)
    slabs = column_tiles * len(columns.phases) * len(rows.phases)
    wanted = max(1, PROGRAMS_PER_PROCESSOR * processors(call.device) // base)
    # Rows are split where the columns make too few slices; a run reads a few rows more than it has.
    runs = max(1, min(-(-wanted // slabs), row_count // (2 * kernel[0] + 2)))
    rows_per_tile = -(-row_count // runs)
    tile_count = slabs * -(-row_count // rows_per_tile)
    slices = min(wanted, tile_count)
    count = taps * out_channels * sizes[-1]
    first = Kernel(
        accumulate,
        base * slices,
        (
            in_channels,
            out_channels,
            *input_stride,
            *input_size,
            *grad_stride,
            height,
            width,
            parts,
            lanes,
            lane_width,
            column_tiles,
            row_count,
            rows_per_tile,
            tap_blocks,
            slices,
            tile_count,
            sizes[-1],
            kernel[1],
            taps,
            tap_rows,
            tap_columns,
            *flat(rows, columns),
            packs.source,
            packs.result,
            input_parts,
            output_parts,
            tile.lanes,
            tile.parts,
            tile.input,
            tile.output,
            input_stride[1] <= input_stride[3],
            grad_stride[1] <= grad_stride[3],
            call.precision,
        ),
        tile.warps,
        tile.stages,
    )
    programs = -(-count // BLOCK)
    gated = call.gates is not None
    arguments = (in_channels, out_channels, slices, count, sizes, gated, taps, call.last, BLOCK, AT_ONCE)
    return Plan(first, Kernel(distribute, programs, arguments, 4, 2), slices * count, programs)
