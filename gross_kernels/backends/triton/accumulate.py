"""The two kernels of the weight gradient: sums over slices of the pixels, and what they come to in
every term.

``accumulate``: a program holds the gradient of a few packs' weight, all taps or some, in registers,
and marches down its slice of the pixels like ``correlate.march``: a row of the input is loaded once
for every column of the kernel and meets as many rows of the output's gradient as the kernel has
rows, those kept from the steps before. The slice's sum goes to a scratch tensor in the compact
shape of the largest active term: what lies outside the groups is not written.

``distribute``: adds the slices in order, and writes the sum where each active term has an element,
scaled by its gate."""

# mypy: ignore-errors
# Triton reads these functions, not Python.

from __future__ import annotations

import triton
import triton.language as tl

from .correlate import block_start, load_tile, phase_of

#: As in ``correlate``.
SIZES_ALONE = [
    *(
        "input_height",
        "input_width",
        "grad_height",
        "grad_width",
        "parts",
        "lanes",
        "lane_width",
        "column_tiles",
    ),
    *("row_count", "rows_per_tile", "tap_blocks", "slices", "tile_count"),
]


@triton.jit(do_not_specialize=SIZES_ALONE)
def accumulate(
    input, grad, partial, in_channels, out_channels,
    input_n, input_c, input_h, input_w, input_height, input_width,
    grad_n, grad_c, grad_h, grad_w, grad_height, grad_width,
    parts, lanes, lane_width, column_tiles, row_count, rows_per_tile, tap_blocks, slices,
    tile_count,
    SIZE: tl.constexpr, KERNEL_W: tl.constexpr, TAPS: tl.constexpr, TAP_ROWS: tl.constexpr,
    TAP_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_PHASES: tl.constexpr,
    COLUMN_PHASES: tl.constexpr,
    PACK_INPUT: tl.constexpr, PACK_OUTPUT: tl.constexpr, INPUT_PARTS: tl.constexpr,
    OUTPUT_PARTS: tl.constexpr,
    BLOCK_LANES: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_INPUT: tl.constexpr,
    BLOCK_OUTPUT: tl.constexpr,
    INPUT_LAST: tl.constexpr, GRAD_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_PARTS`` parts of packs, ``TAP_ROWS × TAP_COLUMNS`` taps, one slice of
    the pixels' tiles."""
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
        origin = (
            source_column
            + tap_column * COLUMN_SOURCE_STEP
            + step * (COLUMN_ADVANCE * COLUMN_SOURCE_STEP)
        )
        row_origin = source_row + tap_row * ROW_SOURCE_STEP

        # Rows of the output's gradient that later rows of the input still meet, as [part, output
        # channel, pixel].
        kept = ()
        for older in tl.static_range(HISTORY - 1):
            if WIDE:
                kept = kept + (
                    tl.zeros((BLOCK_PARTS, BLOCK_OUTPUT, BLOCK_LANES), grad.dtype.element_ty),
                )
            else:
                kept = kept + (tl.zeros((BLOCK_OUTPUT, BLOCK_LANES), grad.dtype.element_ty),)
        for t in range(first, last + HISTORY - 1):
            row = result_row + t * ROW_RESULT_STEP
            pixel = image * grad_n + column * grad_w + row.to(tl.int64) * grad_h
            pixel_real = column_real & (t < last) & (row < grad_height)
            newest = load_tile(
                grad,
                pixel,
                pixel_real,
                from_o,
                o_real,
                GRAD_LAST,
                WIDE,
                BLOCK_PARTS,
                BLOCK_LANES,
                BLOCK_OUTPUT,
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
                        input, pixel, pixel_real, from_c, c_real, INPUT_LAST, WIDE, BLOCK_PARTS,
                        BLOCK_LANES, BLOCK_INPUT,
                    )  # fmt: skip
                    updated = ()
                    for n in tl.static_range(TAP_ROWS * TAP_COLUMNS):
                        # Tap row i = q·advance + …: row t·advance + i of the input meets row t of
                        # the gradient.
                        if n % TAP_COLUMNS == j and n // TAP_COLUMNS % ROW_ADVANCE == advance:
                            met = kept[n // TAP_COLUMNS // ROW_ADVANCE]
                            updated = updated + (
                                tl.dot(met, values, sums[n], input_precision=PRECISION),
                            )
                        else:
                            updated = updated + (sums[n],)
                    sums = updated
            shorter = ()
            for q in tl.static_range(HISTORY - 1):
                # Always chosen. Triton overlaps the loads with the products only in loops that
                # carry no value on unchanged.
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
    """One program: ``BLOCK`` elements of the scratch tensor; ``grad_gates`` is ``[programs,
    active]``, summed later."""
    LARGEST: tl.constexpr = SIZES[len(SIZES) - 1]
    program = tl.program_id(0)
    element = program * BLOCK + tl.arange(0, BLOCK)
    real = element < count
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, slices, AT_ONCE):
        slice = block + tl.arange(0, AT_ONCE)
        offset = slice.to(tl.int64)[:, None] * count + element[None, :]
        total += tl.sum(
            tl.load(partial + offset, (slice < slices)[:, None] & real[None, :], 0.0), 0
        )
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
                term = tl.load(terms[i] + (o * TAPS + tap) * SIZES[i] + k, inside, 0.0).to(
                    tl.float32
                )
            else:
                term = tl.load(terms[i] + offset, inside, 0.0).to(tl.float32)
            tl.store(
                grad_gates + program * len(SIZES) + i, tl.sum(tl.where(inside, total * term, 0.0))
            )
        tl.store(grad_terms[i] + offset, value.to(grad_terms[i].dtype.element_ty), inside)
