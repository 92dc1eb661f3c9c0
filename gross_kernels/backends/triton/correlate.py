"""The two kernels behind the forward pass and the input gradient: a sum of shifted products,
weights made on the fly.

Both read a *source* (input, or output gradient) and write a *result* (output, or input gradient). A
program holds a few *packs*: a pack is as many neighbouring groups as fit the matrix unit's tile of
source channels, so its weight is a small dense block with the groups on its diagonal. That is Ψ,
applied on chip: 16 groups of 1 and one group of 16 cost the same, and nothing expanded is written
to memory. A pack whose result is wider than the tile becomes several *parts*.

``march`` keeps the weights of all taps of its parts on the chip and walks down the rows of the
source: a row is loaded once for every column of the kernel, and feeds one accumulator for each row
of the kernel. For a 3×3 kernel that is 3 reads of each source element through the caches instead of
9, which matters: the second-level cache of an H200 gives little more than its memory. Groups of up
to 64 and kernels of up to 5×5 are served so.

``gather`` serves everything else: a tile of result pixels by a tile of channels, over all taps and
blocks of source channels, the weight assembled anew for each.

Values that are not finite spread to the groups that share a pack with theirs, and in the input
gradient of a strided convolution to neighbouring rows, since zero times infinity is not zero."""

# mypy: ignore-errors
# Triton reads these functions, not Python.

from __future__ import annotations

import triton
import triton.language as tl

#: Sizes that Triton would otherwise compile anew for each divisibility by 16; only channels and
#: strides gain from it.
SIZES_ALONE = [
    *(
        "source_height",
        "source_width",
        "result_height",
        "result_width",
        "parts",
        "lanes",
        "lane_width",
    ),
    *("column_tiles", "row_count", "rows_per_program"),
]


@triton.jit
def phase_of(TABLE: tl.constexpr, phase):
    """One of :class:`geometry.Axis` ``phases``, which stand in the table one after another: first
    result, its source, its tap."""
    result = 0
    source = 0
    tap = 0
    for i in tl.static_range(len(TABLE) // 3):
        result = tl.where(phase == i, TABLE[3 * i], result)
        source = tl.where(phase == i, TABLE[3 * i + 1], source)
        tap = tl.where(phase == i, TABLE[3 * i + 2], tap)
    return result, source, tap


@triton.jit
def block_start(o, in_channels, out_channels, S: tl.constexpr):
    """Ψ: first input channel of output channel ``o`` at group size ``S``, as in
    ``series.block_starts``."""
    return o // (out_channels * S // in_channels) * S


@triton.jit
def to_tf32(value):
    """float32 rounded to the nearest number that TF32 has, ties away from zero: the matrix unit
    alone would cut it off, always towards zero."""
    rounded = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)


@triton.jit
def assemble(
    terms, gates, o, c, tap, inside, in_channels, out_channels, dtype: tl.constexpr,
    SIZES: tl.constexpr, GATED: tl.constexpr, TAPS: tl.constexpr, TERMS_LAST: tl.constexpr,
    PRECISION: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """``Σ gate_i Ψ(r_i)`` as the matrix unit takes it, summed in float32, at output channels ``o``,
    input channels ``c`` and one tap; zero where not ``inside``. ``o`` and ``c`` broadcast to the
    shape of ``inside``. Neighbours along its dimension ``NEAREST`` are read side by side (-1: as
    the compiler likes)."""
    weight = tl.zeros(inside.shape, tl.float32)
    for i in tl.static_range(len(SIZES)):
        k = c - block_start(o, in_channels, out_channels, SIZES[i])
        if TERMS_LAST:
            offset = (o * TAPS + tap) * SIZES[i] + k
        else:
            offset = (o * SIZES[i] + k) * TAPS + tap
        pointer = terms[i] + offset
        # Taps lie between neighbours, so that no dimension is contiguous, and the compiler would
        # take the order in which the weights are read, and kept in shared memory, from the first:
        # with conflicts in every row of the march. The second hint names an order, untruly; the
        # first, true and less than is known, keeps the compiler from reading several at once.
        if NEAREST == 1:
            pointer = tl.max_contiguous(tl.multiple_of(pointer, [2, 2, 2]), [1, 4, 2])
        if NEAREST == 2:
            pointer = tl.max_contiguous(tl.multiple_of(pointer, [2, 2, 2]), [1, 2, 4])
        part = tl.load(pointer, inside & (k >= 0) & (k < SIZES[i]), 0.0).to(tl.float32)
        if GATED:
            part *= tl.load(gates + i).to(tl.float32)
        weight += part
    if PRECISION == "tf32":
        weight = to_tf32(weight)
    return weight.to(dtype)


@triton.jit(do_not_specialize=SIZES_ALONE)
def march(
    source, result, terms, gates, in_channels, out_channels,
    source_n, source_c, source_h, source_w, source_height, source_width,
    result_n, result_c, result_h, result_w, result_height, result_width,
    parts, lanes, lane_width, column_tiles, row_count, rows_per_program,
    SIZES: tl.constexpr, GATED: tl.constexpr, TERMS_LAST: tl.constexpr, KERNEL_W: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_PHASES: tl.constexpr,
    COLUMN_PHASES: tl.constexpr, TRANSPOSED: tl.constexpr,
    PACK_SOURCE: tl.constexpr, PACK_RESULT: tl.constexpr, PARTS_PER_PACK: tl.constexpr,
    BLOCK_LANES: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_SOURCE: tl.constexpr,
    BLOCK_RESULT: tl.constexpr,
    SOURCE_LAST: tl.constexpr, RESULT_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_PARTS`` parts, ``BLOCK_LANES`` columns (of all images, side by side), a
    run of rows."""
    # See geometry.Axis.
    ROW_TAPS: tl.constexpr = ROWS[0]
    ROW_ADVANCE: tl.constexpr = ROWS[1]
    ROW_SOURCE_STEP: tl.constexpr = ROWS[2]
    ROW_RESULT_STEP: tl.constexpr = ROWS[3]
    ROW_TAP_STEP: tl.constexpr = ROWS[4]
    COLUMN_TAPS: tl.constexpr = COLUMNS[0]
    COLUMN_ADVANCE: tl.constexpr = COLUMNS[1]
    COLUMN_SOURCE_STEP: tl.constexpr = COLUMNS[2]
    COLUMN_RESULT_STEP: tl.constexpr = COLUMNS[3]
    COLUMN_TAP_STEP: tl.constexpr = COLUMNS[4]
    HISTORY: tl.constexpr = (ROW_TAPS - 1) // ROW_ADVANCE + 1
    WIDE: tl.constexpr = BLOCK_PARTS > 1
    dtype = source.dtype.element_ty
    # Of the input gradient's weights the input channels are next to each other in memory. 32-bit
    # numbers the matrix unit's loads cannot transpose.
    ALONG: tl.constexpr = (
        1 if TRANSPOSED and source.dtype.element_ty.primitive_bitwidth == 16 else 2
    )

    # Neighbouring programs work on neighbouring channels of the same pixels: together they use
    # whole lines of memory.
    program = tl.program_id(0)
    blocks = tl.cdiv(parts, BLOCK_PARTS)
    part = program % blocks * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS)
    program = program // blocks
    tile = program % column_tiles
    program = program // column_tiles
    column_phase = program % (len(COLUMN_PHASES) // 3)
    program = program // (len(COLUMN_PHASES) // 3)
    row_phase = program % (len(ROW_PHASES) // 3)
    first = program // (len(ROW_PHASES) // 3) * rows_per_program
    last = tl.minimum(first + rows_per_program, row_count)
    result_row, source_row, row_tap = phase_of(ROW_PHASES, row_phase)
    result_column, source_column, column_tap = phase_of(COLUMN_PHASES, column_phase)

    # Channels of the source and of the result: which a lane of the tile stands for, and whether it
    # exists.
    pack = part // PARTS_PER_PACK
    inner = tl.arange(0, BLOCK_SOURCE)
    outer = part % PARTS_PER_PACK * BLOCK_RESULT
    r = tl.arange(0, BLOCK_RESULT)
    source_channels = out_channels if TRANSPOSED else in_channels
    result_channels = in_channels if TRANSPOSED else out_channels

    # Weights of every tap, in the order that the loop meets them. Loaded along the terms' rows,
    # [part, result, source].
    to = (pack * PACK_RESULT + outer)[:, None, None] + r[None, :, None]
    of = (pack * PACK_SOURCE)[:, None, None] + inner[None, None, :]
    real = (outer[:, None, None] + r[None, :, None] < PACK_RESULT) & (to < result_channels)
    real = real & (inner[None, None, :] < PACK_SOURCE) & (of < source_channels)
    weights = ()
    for i in tl.static_range(ROW_TAPS):
        for j in tl.static_range(COLUMN_TAPS):
            tap_i = row_tap + i * ROW_TAP_STEP
            tap_j = column_tap + j * COLUMN_TAP_STEP
            exists = (tap_i >= 0) & (tap_i * KERNEL_W < TAPS) & (tap_j >= 0) & (tap_j < KERNEL_W)
            weight = assemble(
                terms, gates, of if TRANSPOSED else to, to if TRANSPOSED else of,
                tap_i * KERNEL_W + tap_j, real & exists, in_channels, out_channels, dtype,
                SIZES, GATED, TAPS, TERMS_LAST, PRECISION, -1 if TERMS_LAST else ALONG,
            )  # fmt: skip
            weight = tl.permute(weight, (0, 2, 1))
            if not WIDE:
                weight = tl.reshape(weight, (BLOCK_SOURCE, BLOCK_RESULT))
            weights = weights + (weight,)

    # Lanes: columns of the result, image after image, so that small maps fill the tile too.
    lane = tile.to(tl.int64) * BLOCK_LANES + tl.arange(0, BLOCK_LANES)
    image = lane // lane_width
    step = lane % lane_width
    column = result_column + step * COLUMN_RESULT_STEP
    written = (lane < lanes) & (column < result_width)
    origin = source_column + step * (COLUMN_ADVANCE * COLUMN_SOURCE_STEP)
    from_channel = (pack * PACK_SOURCE)[:, None] + inner[None, :]
    from_channel_real = (inner[None, :] < PACK_SOURCE) & (from_channel < source_channels)
    to_channel = (pack * PACK_RESULT + outer)[:, None] + r[None, :]
    to_channel_real = (outer[:, None] + r[None, :] < PACK_RESULT) & (to_channel < result_channels)
    from_channel = from_channel.to(tl.int64) * source_c
    to_channel = to_channel.to(tl.int64) * result_c

    sums = ()
    for _ in tl.static_range(HISTORY):
        if WIDE:
            sums = sums + (tl.zeros((BLOCK_PARTS, BLOCK_LANES, BLOCK_RESULT), tl.float32),)
        else:
            sums = sums + (tl.zeros((BLOCK_LANES, BLOCK_RESULT), tl.float32),)

    for t in range(first, last + HISTORY - 1):
        for advance in tl.static_range(ROW_ADVANCE):
            row = source_row + (t * ROW_ADVANCE + advance) * ROW_SOURCE_STEP
            row_real = (row >= 0) & (row < source_height)
            for j in tl.static_range(COLUMN_TAPS):
                at = origin + j * COLUMN_SOURCE_STEP
                tap_j = column_tap + j * COLUMN_TAP_STEP
                pixel_real = (
                    written
                    & (at >= 0)
                    & (at < source_width)
                    & row_real
                    & (tap_j >= 0)
                    & (tap_j < KERNEL_W)
                )
                pixel = image * source_n + at * source_w + row.to(tl.int64) * source_h
                values = load_tile(
                    source, pixel, pixel_real, from_channel, from_channel_real, SOURCE_LAST, WIDE,
                    BLOCK_PARTS, BLOCK_LANES, BLOCK_SOURCE,
                )  # fmt: skip
                updated = ()
                for q in tl.static_range(HISTORY):
                    if q * ROW_ADVANCE + advance < ROW_TAPS:
                        weight = weights[(q * ROW_ADVANCE + advance) * COLUMN_TAPS + j]
                        updated = updated + (
                            tl.dot(values, weight, sums[q], input_precision=PRECISION),
                        )
                    else:
                        updated = updated + (sums[q],)
                sums = updated
        done = t - (HISTORY - 1)
        if done >= first:
            row = result_row + done * ROW_RESULT_STEP
            pixel = image * result_n + column * result_w + row.to(tl.int64) * result_h
            store_tile(
                result, sums[HISTORY - 1].to(dtype), pixel, written & (row < result_height),
                to_channel,
                to_channel_real, RESULT_LAST, WIDE, BLOCK_PARTS, BLOCK_LANES, BLOCK_RESULT,
            )  # fmt: skip
        shifted = (tl.zeros_like(sums[0]),)
        for q in tl.static_range(HISTORY - 1):
            shifted = shifted + (sums[q],)
        sums = shifted


@triton.jit
def load_tile(
    source, pixel, pixel_real, channel, channel_real, LAST: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``[parts, lanes, channels]`` (``[lanes, channels]`` of one part), zero where not real.
    Whichever of channels and columns lies densely in memory is the last dimension of the load: its
    neighbours go to neighbouring threads."""
    if LAST:
        offset = pixel[:, None, None] + channel[None, :, :]
        values = tl.load(source + offset, pixel_real[:, None, None] & channel_real[None, :, :], 0.0)
        if WIDE:
            values = tl.permute(values, (1, 0, 2))
        else:
            values = tl.reshape(values, (LANES, CHANNELS))
    else:
        offset = pixel[None, None, :] + channel[:, :, None]
        values = tl.load(source + offset, pixel_real[None, None, :] & channel_real[:, :, None], 0.0)
        if WIDE:
            values = tl.permute(values, (0, 2, 1))
        else:
            values = tl.trans(tl.reshape(values, (CHANNELS, LANES)))
    return values


@triton.jit
def store_tile(
    result, values, pixel, pixel_real, channel, channel_real, LAST: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The reverse of :func:`load_tile`."""
    if LAST:
        if WIDE:
            values = tl.permute(values, (1, 0, 2))
        else:
            values = tl.reshape(values, (LANES, 1, CHANNELS))
        offset = pixel[:, None, None] + channel[None, :, :]
        tl.store(result + offset, values, pixel_real[:, None, None] & channel_real[None, :, :])
    else:
        if WIDE:
            values = tl.permute(values, (0, 2, 1))
        else:
            values = tl.reshape(tl.trans(values), (1, CHANNELS, LANES))
        offset = pixel[None, None, :] + channel[:, :, None]
        tl.store(result + offset, values, pixel_real[None, None, :] & channel_real[:, :, None])


@triton.jit(do_not_specialize=SIZES_ALONE)
def gather(
    source, result, terms, gates, in_channels, out_channels,
    source_n, source_c, source_h, source_w, source_height, source_width,
    result_n, result_c, result_h, result_w, result_height, result_width,
    parts, lanes, lane_width, column_tiles, row_count, rows_per_program,
    SIZES: tl.constexpr, GATED: tl.constexpr, TERMS_LAST: tl.constexpr, KERNEL_W: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_PHASES: tl.constexpr,
    COLUMN_PHASES: tl.constexpr, TRANSPOSED: tl.constexpr,
    PACK_SOURCE: tl.constexpr, PACK_RESULT: tl.constexpr, PARTS_PER_PACK: tl.constexpr,
    BLOCK_LANES: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_SOURCE: tl.constexpr,
    BLOCK_RESULT: tl.constexpr,
    SOURCE_LAST: tl.constexpr, RESULT_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one part, ``BLOCK_LANES`` pixels (of all images and rows, side by side).
    ``BLOCK_PARTS`` is 1."""
    ROW_TAPS: tl.constexpr = ROWS[0]
    ROW_ADVANCE: tl.constexpr = ROWS[1]
    ROW_SOURCE_STEP: tl.constexpr = ROWS[2]
    ROW_RESULT_STEP: tl.constexpr = ROWS[3]
    ROW_TAP_STEP: tl.constexpr = ROWS[4]
    COLUMN_TAPS: tl.constexpr = COLUMNS[0]
    COLUMN_ADVANCE: tl.constexpr = COLUMNS[1]
    COLUMN_SOURCE_STEP: tl.constexpr = COLUMNS[2]
    COLUMN_RESULT_STEP: tl.constexpr = COLUMNS[3]
    COLUMN_TAP_STEP: tl.constexpr = COLUMNS[4]
    dtype = source.dtype.element_ty
    program = tl.program_id(0)
    part = program % parts
    program = program // parts
    tile = program % column_tiles
    program = program // column_tiles
    column_phase = program % (len(COLUMN_PHASES) // 3)
    row_phase = program // (len(COLUMN_PHASES) // 3)
    result_row, source_row, row_tap = phase_of(ROW_PHASES, row_phase)
    result_column, source_column, column_tap = phase_of(COLUMN_PHASES, column_phase)

    pack = part // PARTS_PER_PACK
    outer = part % PARTS_PER_PACK * BLOCK_RESULT + tl.arange(0, BLOCK_RESULT)
    source_channels = out_channels if TRANSPOSED else in_channels
    result_channels = in_channels if TRANSPOSED else out_channels
    to = pack * PACK_RESULT + outer
    to_real = (outer < PACK_RESULT) & (to < result_channels)

    lane = tile.to(tl.int64) * BLOCK_LANES + tl.arange(0, BLOCK_LANES)
    step = lane % lane_width
    row_step = lane // lane_width % row_count
    image = lane // lane_width // row_count
    row = result_row + row_step * ROW_RESULT_STEP
    column = result_column + step * COLUMN_RESULT_STEP
    written = (lane < lanes) & (column < result_width) & (row < result_height)
    row_origin = source_row + row_step * (ROW_ADVANCE * ROW_SOURCE_STEP)
    origin = source_column + step * (COLUMN_ADVANCE * COLUMN_SOURCE_STEP)

    total = tl.zeros((BLOCK_LANES, BLOCK_RESULT), tl.float32)
    for tap in range(ROW_TAPS * COLUMN_TAPS):
        i = tap // COLUMN_TAPS
        j = tap % COLUMN_TAPS
        tap_i = row_tap + i * ROW_TAP_STEP
        tap_j = column_tap + j * COLUMN_TAP_STEP
        exists = (tap_i >= 0) & (tap_i * KERNEL_W < TAPS) & (tap_j >= 0) & (tap_j < KERNEL_W)
        from_row = row_origin + i * ROW_SOURCE_STEP
        at = origin + j * COLUMN_SOURCE_STEP
        pixel_real = (
            written
            & exists
            & (at >= 0)
            & (at < source_width)
            & (from_row >= 0)
            & (from_row < source_height)
        )
        pixel = image * source_n + at * source_w + from_row * source_h
        for block in range(0, PACK_SOURCE, BLOCK_SOURCE):
            inner = block + tl.arange(0, BLOCK_SOURCE)
            of = pack * PACK_SOURCE + inner
            of_real = (inner < PACK_SOURCE) & (of < source_channels)
            values = load_tile(
                source, pixel, pixel_real, of.to(tl.int64)[None, :] * source_c, of_real[None, :],
                SOURCE_LAST, False, 1, BLOCK_LANES, BLOCK_SOURCE,
            )  # fmt: skip
            o = of[None, :] if TRANSPOSED else to[:, None]
            c = to[:, None] if TRANSPOSED else of[None, :]
            weight = assemble(
                terms, gates, o, c, tap_i * KERNEL_W + tap_j,
                to_real[:, None] & of_real[None, :] & exists, in_channels, out_channels, dtype,
                SIZES, GATED, TAPS, TERMS_LAST, PRECISION, -1,
            )  # fmt: skip
            total = tl.dot(values, tl.trans(weight), total, input_precision=PRECISION)

    pixel = image * result_n + column * result_w + row * result_h
    store_tile(
        result, total.to(dtype), pixel, written, to.to(tl.int64)[None, :] * result_c,
        to_real[None, :],
        RESULT_LAST, False, 1, BLOCK_LANES, BLOCK_RESULT,
    )  # fmt: skip
