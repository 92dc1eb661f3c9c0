"""The sum of pointwise weights, ``Σ gate_i t_i``, in one launch: every element is read once from
every active term."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...series import Series
from .launch import Kernel, Plans, layout, on_device

#: Elements of a program: 8 for each thread, two loads of 16 bytes from a float32 term.
BLOCK = 1024

_plans = Plans()


@triton.jit
def add(  # type: ignore[no-untyped-def]
    result, terms, gates, count, COUNT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: ``BLOCK`` elements, summed in float32."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = element < count
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(COUNT):
        part = tl.load(terms[i] + element, real, 0.0).to(tl.float32)
        if GATED:
            part *= tl.load(gates + i).to(tl.float32)
        total += part
    tl.store(result + element, total.to(result.dtype.element_ty), real)


class Call(NamedTuple):
    """Everything that a plan depends on."""

    terms: tuple[tuple, ...]
    gates: tuple | None
    device: int | None


def series_sum(series: Series) -> Tensor:
    """``Σ_{i≤n} gate_i t_i``, contiguous, of the terms' shape and dtype."""
    first, gates = series.terms[0], series.gates
    result = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    if result.numel() == 0:
        return result
    used = tuple(term.contiguous() for term in series.leading)
    if gates is not None:
        gates = gates.contiguous()
    call = Call(
        tuple(map(layout, used)), None if gates is None else layout(gates), result.device.index
    )
    with on_device(result.get_device()):
        kernel = _plans.get(call) or _plans.put(call, plan(call))
        kernel(result, used, gates)
    return result


def plan(call: Call) -> Kernel:
    """The launch for one kind of calls."""
    count = call.terms[0][0].numel()
    arguments = (count, len(call.terms), call.gates is not None, BLOCK)
    return Kernel(add, -(-count // BLOCK), arguments, 4, 1)
