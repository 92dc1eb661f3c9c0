"""Gradients of every term and of the gates, in two passes (``accumulate``) and without atomics.

Slices are cut by shape and device, so results repeat bit by bit. The scratch is written and read
once: for 64 channels, groups of 16 and 264 slices 10 MB each way, mostly through the second-level
cache, where the tensors (batch 128, 56×56) have 103."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry import Geometry
from ...series import Series
from . import tiles
from .accumulate import accumulate, distribute
from .geometry import Packs, axis, channels_last, flat
from .launch import Kernel, Plans, architecture, layout, on_device, precision_of, processors, tuned

#: Elements of the gradient that a program of the second pass adds up (a line of memory), and slices
#: that it loads at once: one after another, each of some 250 slices would wait for the memory,
#: longer than the first pass takes.
BLOCK, AT_ONCE = 32, 32
#: Programs of the first pass for each multiprocessor.
PROGRAMS_PER_PROCESSOR = 2


_plans = Plans()


class Call(NamedTuple):
    """Everything that a plan depends on."""

    input: tuple
    grad: tuple
    terms: tuple[tuple, ...]
    gates: tuple | None
    last: bool
    geometry: Geometry
    precision: str
    device: int | None


class Plan(NamedTuple):
    """Both passes, the scratch tensor's elements, and the second pass's programs."""

    accumulate: Kernel
    distribute: Kernel
    scratch: int
    programs: int


def weight_grad(
    grad: Tensor, input: Tensor, series: Series, geometry: Geometry
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients with respect to every term and to the gates (None without gates); zero beyond
    ``active``."""
    terms, active, gates = series
    # Contiguous whatever the terms are, as the operator promises.
    grad_terms = [torch.empty(term.shape, dtype=term.dtype, device=term.device) for term in terms]
    empty = grad.numel() == 0 or input.numel() == 0
    unused = grad_terms if empty else grad_terms[active:]
    if unused:
        torch._foreach_zero_(unused)
    grad_gates = (
        None if gates is None else torch.zeros_like(gates, memory_format=torch.contiguous_format)
    )
    if empty:
        return grad_terms, grad_gates
    if gates is not None:
        gates = gates.contiguous()
    used = tuple(series.leading)
    last = gates is not None and all(channels_last(term.shape, term.stride()) for term in used)
    if gates is not None and not last:
        used = tuple(term.contiguous() for term in used)
    call = Call(
        layout(input),
        layout(grad),
        tuple(map(layout, used)),
        None if gates is None else layout(gates),
        last,
        Geometry(*map(tuple, geometry)),
        precision_of(input.dtype, input.device.index),
        input.device.index,
    )
    with on_device(input.get_device()):
        plan = _plans.get(call) or _plans.put(call, choose(call, input, grad))
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
    scratch = torch.empty(
        largest if tiles.AUTOTUNE else 0, dtype=torch.float32, device=input.device
    )
    return plan_of(
        call, tuned(f"weight gradient {call!r}", candidates, first_pass, (input, grad, scratch))
    )


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
        call.geometry.stride != (1, 1),
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
    rows, columns = (axis(*each, False) for each in zip(kernel, *call.geometry, strict=True))
    taps = kernel[0] * kernel[1]
    tap_rows = kernel[0] if tile.all_rows else 1
    tap_columns = kernel[1] if tile.all_columns else 1
    tap_blocks = -(-kernel[0] // tap_rows) * -(-kernel[1] // tap_columns)
    packs = Packs.of(
        in_channels, out_channels, in_channels // sizes[-1], max(tile.input, tile.output)
    )
    input_parts, output_parts = -(-packs.source // tile.input), -(-packs.result // tile.output)
    parts = packs.number * input_parts * output_parts
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
    arguments = (
        in_channels,
        out_channels,
        slices,
        count,
        sizes,
        gated,
        taps,
        call.last,
        BLOCK,
        AT_ONCE,
    )
    return Plan(first, Kernel(distribute, programs, arguments, 4, 2), slices * count, programs)
