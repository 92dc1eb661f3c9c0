"""Forward pass and input gradient: one plan for both, see ``correlate``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...call import float32_precision, memory_format
from ...geometry import Geometry
from ...series import Series
from . import tiles
from .correlate import gather, march
from .geometry import Axis, Packs, axis, channels_last, flat
from .launch import (
    Kernel,
    Plans,
    architecture,
    dense,
    layout,
    on_device,
    precision_of,
    processors,
    tuned,
)

_plans = Plans()


class Call(NamedTuple):
    """Everything that a plan depends on. ``source`` and ``result`` are shapes with strides;
    ``terms`` those active."""

    transposed: bool
    source: tuple
    result_shape: tuple[int, ...]
    result_stride: tuple[int, ...]
    terms: tuple[tuple, ...]
    gates: tuple | None
    geometry: Geometry
    precision: str
    device: int | None


class Ready(NamedTuple):
    """What a kind of calls comes down to.

    Attributes:
        kernel: launched on source, result, terms and gates; None where there is nothing to compute.
        shape, stride: the result's.
        dense: whether terms and gates can be passed as they are, or have to be copied first.
        device: index, -1 on the CPU.
    """

    kernel: Kernel | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dense: bool
    device: int


def forward(input: Tensor, series: Series, geometry: Geometry) -> Tensor:
    """Grouped convolution of ``input`` with ``R_n = Σ gate_i Ψ(r_i)`` (equations 4 and 5), ``[N,
    C_out, H', W']``."""
    return run(None, input, series, geometry)


def run(grad: Tensor | None, input: Tensor, series: Series, geometry: Geometry) -> Tensor:
    """The output of ``input`` or, given the output's gradient, the input's."""
    source = input if grad is None else grad
    terms, gates = series.leading, series.gates
    key = (
        layout(source),
        grad is None or (input.shape, input.stride()),
        tuple([layout(term) for term in terms]),
        gates is None or layout(gates),
        geometry.numbers,
        source.get_device(),
        source.dtype is not torch.float32 or float32_precision(),
    )
    ready = _plans.get(key)
    if ready is None:
        ready = _plans.put(key, prepare(grad, input, series, geometry))
    result = torch.empty_strided(
        ready.shape, ready.stride, dtype=source.dtype, device=source.device
    )
    if ready.kernel is None:
        return result.zero_()
    if not ready.dense:
        terms, gates = dense(terms), None if gates is None else gates.contiguous()
    with on_device(ready.device):
        ready.kernel(source, result, tuple(terms), gates)
    return result


def prepare(grad: Tensor | None, input: Tensor, series: Series, geometry: Geometry) -> Ready:
    """Work out a kind of calls from the first of them."""
    terms, gates = series.leading, series.gates
    shape = input.shape
    if grad is None:
        size = geometry.output_size(shape[2:], terms[0].shape[2:])
        shape = torch.Size((shape[0], terms[0].shape[0], *size))
    result = torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    )
    source = input if grad is None else grad
    device = source.get_device()
    if source.numel() == 0 or result.numel() == 0:
        return Ready(None, shape, result.stride(), True, device)
    passed = all(term.is_contiguous() for term in terms) or all(
        channels_last(t.shape, t.stride()) for t in terms
    )
    passed = passed and (gates is None or gates.is_contiguous())
    if not passed:
        terms, gates = dense(terms), None if gates is None else gates.contiguous()
    call = Call(
        grad is not None,
        layout(source),
        result.shape,
        result.stride(),
        tuple(map(layout, terms)),
        None if gates is None else layout(gates),
        Geometry(*map(tuple, geometry)),
        precision_of(source.dtype, None if device < 0 else device),
        None if device < 0 else device,
    )
    with on_device(device):
        kernel = choose(call, (source, result, tuple(terms), gates))
    return Ready(kernel, shape, result.stride(), passed, device)


def choose(call: Call, tensors: tuple) -> Kernel:
    """The kernel of a kind of calls, by the table or by autotuning."""
    tile = tuned(
        f"correlation {call!r}",
        tiles.correlation(shape_of(call)),
        lambda tile: plan(call, tile),
        tensors,
    )
    return plan(call, tile)


def axes(call: Call) -> tuple[Axis, Axis]:
    """Rows and columns."""
    kernel = call.terms[0][0][2:]
    rows, columns = (
        axis(*each, call.transposed) for each in zip(kernel, *call.geometry, strict=True)
    )
    return rows, columns


def shape_of(call: Call) -> tiles.Shape:
    """What the tile table asks."""
    rows, columns = axes(call)
    (_, source_channels, *_), (_, result_channels, *_) = call.source[0], call.result_shape
    in_channels = result_channels if call.transposed else source_channels
    groups = in_channels // call.terms[-1][0][1]
    return tiles.Shape(
        source_channels // groups,
        result_channels // groups,
        groups,
        len(call.terms),
        rows.taps * columns.taps,
        (rows.taps - 1) // rows.advance + 1,
        call.geometry.stride != (1, 1),
        source_channels * call.source[2].itemsize % 16 == 0,
        call.source[2].itemsize,
        call.precision,
        architecture(call.device),
    )


def run_length(rows: int, programs: int, places: int, again: int) -> int:
    """Rows of a program of ``march`` so that the launch takes the fewest steps: each of its runs
    assembles the weights anew and reads ``again`` rows more, and ``places`` programs run at a
    time."""

    def steps(length: int) -> int:
        waves = -(-programs * -(-rows // length) // places)
        return waves * (length + again + tiles.ASSEMBLY)

    return min((-(-rows // runs) for runs in range(1, rows + 1)), key=steps)


def plan(call: Call, tile: tiles.Tile) -> Kernel:
    """The launch of one tile for one kind of calls."""
    rows, columns = axes(call)
    shape = shape_of(call)
    source_shape, source_stride, *_ = call.source
    batch, result_channels, height, width = call.result_shape
    packs = Packs.of(source_shape[1], result_channels, shape.groups, tile.source)
    parts_per_pack = -(-packs.result // tile.result)
    parts = packs.number * parts_per_pack
    blocks = -(-parts // tile.parts)
    row_count, lane_width = rows.steps(height), columns.steps(width)
    lanes = batch * lane_width * (1 if tile.march else row_count)
    column_tiles = -(-lanes // tile.lanes)
    programs = blocks * column_tiles * len(columns.phases) * len(rows.phases)
    rows_per_program = row_count
    if tile.march:
        places = tiles.WARPS_PER_PROCESSOR // tile.warps * processors(call.device)
        rows_per_program = run_length(row_count, programs, places, shape.history - 1)
        programs *= -(-row_count // rows_per_program)
    source_channels = source_shape[1]
    in_channels, out_channels = (
        (result_channels, source_channels)
        if call.transposed
        else (source_channels, result_channels)
    )
    sizes = tuple(term[0][1] for term in call.terms)
    kernel_h, kernel_w = call.terms[0][0][2:]
    arguments = (
        in_channels,
        out_channels,
        *source_stride,
        *source_shape[2:],
        *call.result_stride,
        height,
        width,
        parts,
        lanes,
        lane_width,
        column_tiles,
        row_count,
        rows_per_program,
        sizes,
        call.gates is not None,
        all(channels_last(*term[:2]) for term in call.terms),
        kernel_w,
        kernel_h * kernel_w,
        *flat(rows, columns),
        call.transposed,
        packs.source,
        packs.result,
        parts_per_pack,
        tile.lanes,
        tile.parts,
        tile.source,
        tile.result,
        source_stride[1] <= source_stride[3],
        call.result_stride[1] <= call.result_stride[3],
        call.precision,
    )
    return Kernel(march if tile.march else gather, programs, arguments, tile.warps, tile.stages)
