"""The operators ``gross::series_conv2d``, ``gross::series_conv2d_backward`` and
``gross::series_sum``: schemas, shapes, gradients, autocast, FLOP counts. Implementations live in
the backends; the C++ library registers those for the CPU.

``active`` is a zero-dimensional int64 tensor on the host: as an int, every configuration of a
network would be a graph of its own under ``torch.compile``. The operators are tagged
``cudagraph_unsafe`` so that a captured graph never replays a stale ``active``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .backends import cpu, reference
from .call import memory_format
from .geometry import Geometry, Pair
from .library import call, register_autocast, register_gradient, register_vmap
from .series import Series, convolution_macs

_library = torch.library.Library("gross", "DEF")
for _schema in (
    "series_conv2d(Tensor input, Tensor[] terms, Tensor active, Tensor? gates, "
    "int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    "series_conv2d_backward(Tensor grad, Tensor input, Tensor[] terms, Tensor active, "
    "Tensor? gates, int[2] stride, int[2] padding, int[2] dilation, bool[3] needs) "
    "-> (Tensor, Tensor[], Tensor)",
    "series_sum(Tensor[] terms, Tensor active, Tensor? gates) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides))

#: Why the CPU kernels cannot be loaded; None when they are.
load_error = cpu.load()


# Shapes -----------------------------------------------------------------------------------------


@torch.library.register_fake("gross::series_conv2d", lib=_library)
def _series_conv2d_shape(
    input: Tensor, terms: Sequence[Tensor], active: Tensor, gates: Tensor | None, *geometry: Pair
) -> Tensor:
    size = Geometry(*geometry).output_size(input.shape[2:], terms[0].shape[2:])
    shape = (input.shape[0], terms[0].shape[0], *size)
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    )


@torch.library.register_fake("gross::series_conv2d_backward", lib=_library)
def _series_conv2d_backward_shape(
    grad: Tensor,
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    gates: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    need_input, need_terms, need_gates = rest[-1]
    return (
        torch.empty_like(input, memory_format=memory_format(input))
        if need_input
        else input.new_empty(0),
        [torch.empty_like(term, memory_format=torch.contiguous_format) for term in terms]
        if need_terms
        else [],
        torch.empty_like(gates) if need_gates and gates is not None else terms[0].new_empty(0),
    )


@torch.library.register_fake("gross::series_sum", lib=_library)
def _series_sum_shape(terms: Sequence[Tensor], active: Tensor, gates: Tensor | None) -> Tensor:
    return torch.empty_like(terms[0], memory_format=torch.contiguous_format)


# Gradients --------------------------------------------------------------------------------------


# What each operator computes, in PyTorch's own: what runs where a transform looks inside.


def _convolution(
    input: Tensor, terms: Sequence[Tensor], active: Tensor, gates: Tensor | None, *geometry: Pair
) -> Tensor:
    return reference.forward(input, Series(terms, int(active), gates), Geometry(*geometry))


def _gradients(
    grad: Tensor,
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    gates: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    *geometry, needs = rest
    series = Series(terms, int(active), gates)
    return _by_backends(grad, input, series, Geometry(*geometry), needs, [reference] * 2)


def _sum(terms: Sequence[Tensor], active: Tensor, gates: Tensor | None) -> Tensor:
    return reference.series_sum(Series(terms, int(active), gates))


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    input, terms, active, gates, *ctx.geometry = inputs
    ctx.save_for_backward(input, active, gates, *terms)


def _series_conv2d_grad(ctx: Any, needs: Sequence[Any], grad: Tensor) -> tuple:
    input, active, gates, *terms = ctx.saved_tensors
    need_input, need_terms, need_gates = needs[0], any(needs[1]), needs[3]
    grad_input, grad_terms, grad_gates = call(
        torch.ops.gross.series_conv2d_backward.default,
        grad,
        input,
        terms,
        active,
        gates,
        *ctx.geometry,
        [need_input, need_terms, need_gates],
    )
    return (
        grad_input if need_input else None,
        grad_terms if need_terms else None,
        None,
        grad_gates if need_gates else None,
    )


register_gradient(
    _library, torch.ops.gross.series_conv2d.default, _convolution, _save, _series_conv2d_grad
)


def _save_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    grad, input, terms, active, gates, *ctx.geometry, ctx.needs = inputs
    ctx.count = len(terms)
    ctx.save_for_backward(grad, input, active, gates, *terms)


def _series_conv2d_backward_grad(
    ctx: Any, _: Sequence[Any], of_input: Tensor, of_terms: list[Tensor], of_gates: Tensor
) -> tuple:
    """Second derivatives.

    With W = Σ γ_i Ψ(r_i), the backward computes gI = convᵀ(g, W), γ_i S_i(D) and ⟨S_i(D), r_i⟩,
    where D is the weight gradient of (g, x) and S_i the adjoint of Ψ. Its cotangents a, b_i, c_i
    enter linearly, so everything is the operator and its backward again, with the terms r and with
    v_i = γ_i b_i + c_i r_i."""
    grad, input, active, gates, *terms = ctx.saved_tensors
    geometry = ctx.geometry
    op, backward = torch.ops.gross.series_conv2d, torch.ops.gross.series_conv2d_backward
    grad_grad: Tensor | None = None
    grad_input: Tensor | None = None
    grad_terms: list[Tensor] | None = None
    grad_gates: Tensor | None = None
    if ctx.needs[0]:
        grad_grad = op(of_input, terms, active, gates, *geometry)
        _, grad_terms, parts = backward(
            grad, of_input, terms, active, gates, *geometry, [False, True, gates is not None]
        )
        grad_gates = None if gates is None else parts
    if ctx.needs[1] or ctx.needs[2]:
        scales = (
            [None] * ctx.count
            if gates is None
            else [gate.to(terms[0].dtype) for gate in gates.unbind()]
        )
        shares = of_gates.to(terms[0].dtype).unbind() if ctx.needs[2] else [None] * ctx.count
        slopes = of_terms if ctx.needs[1] else [None] * ctx.count
        directions = []
        for term, scale, share, slope in zip(terms, scales, shares, slopes, strict=True):
            direction = torch.zeros_like(term)
            if slope is not None:
                direction = direction + (slope if scale is None else scale * slope)
            if share is not None:
                direction = direction + share * term
            directions.append(direction)
        through = op(input, directions, active, None, *geometry)
        grad_grad = through if grad_grad is None else grad_grad + through
        grad_input, unscaled, _ = backward(
            grad, input, directions, active, None, *geometry, [True, True, False]
        )
        if ctx.needs[2]:
            extra = [share * part for share, part in zip(shares, unscaled, strict=True)]
            grad_terms = (
                extra
                if grad_terms is None
                else [a + b for a, b in zip(grad_terms, extra, strict=True)]
            )
        if gates is not None and ctx.needs[1]:
            extra_gates = torch.stack(
                [(b * part).sum() for b, part in zip(slopes, unscaled, strict=True)]
            ).to(gates.dtype)
            grad_gates = extra_gates if grad_gates is None else grad_gates + extra_gates
    return grad_grad, grad_input, grad_terms, None, grad_gates


register_gradient(
    _library,
    torch.ops.gross.series_conv2d_backward.default,
    _gradients,
    _save_backward,
    _series_conv2d_backward_grad,
)


def _save_sum(ctx: Any, inputs: tuple, output: Any) -> None:
    terms, active, gates = inputs
    ctx.count = len(terms)
    ctx.save_for_backward(active, gates, *(terms if gates is not None else ()))


def _series_sum_grad(ctx: Any, needs: Sequence[Any], grad: Tensor) -> tuple:
    active, gates, *terms = ctx.saved_tensors
    scaled = (
        [grad] * ctx.count
        if gates is None
        else [grad * gate.to(grad.dtype) for gate in gates.unbind()]
    )
    counted = torch.arange(ctx.count) < active
    if type(active) is Tensor:
        # Eager code may read active: one tensor then serves all terms, where 4 terms would take 12
        # small operations.
        nothing = torch.zeros_like(grad)
        grad_terms = [
            g if here else nothing for here, g in zip(counted.tolist(), scaled, strict=True)
        ]
    else:
        zero = grad.new_zeros(())
        each = counted.to(grad.device).unbind()
        grad_terms = [torch.where(here, g, zero) for here, g in zip(each, scaled, strict=True)]
    grad_gates = None
    if gates is not None and needs[2]:
        products = torch.stack([(grad * term).sum() for term in terms])
        grad_gates = torch.where(counted.to(grad.device), products, grad.new_zeros(())).to(
            gates.dtype
        )
    return grad_terms, None, grad_gates


register_gradient(_library, torch.ops.gross.series_sum.default, _sum, _save_sum, _series_sum_grad)


# Autocast and vmap ------------------------------------------------------------------------------

register_autocast(_library, "series_conv2d")
register_vmap(_library, torch.ops.gross.series_conv2d.default, folds=True)
register_vmap(_library, torch.ops.gross.series_conv2d_backward.default, folds=False)
register_vmap(_library, torch.ops.gross.series_sum.default, folds=False)


# Implementations --------------------------------------------------------------------------------


def _cuda_forward(
    input: Tensor, terms: Sequence[Tensor], active: Tensor, gates: Tensor | None, *geometry: Pair
) -> Tensor:
    series, where = Series(terms, _host_int(active, terms), gates), Geometry(*geometry)
    return dispatch.serving("forward", input, series, where).forward(input, series, where)


def _cuda_backward(
    grad: Tensor,
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    gates: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    *geometry, needs = rest
    series, where = Series(terms, _host_int(active, terms), gates), Geometry(*geometry)
    operations = ("input_grad", needs[0]), ("weight_grad", needs[1] or needs[2])
    backends = [
        dispatch.serving(operation, input, series, where) if needed else None
        for operation, needed in operations
    ]
    return _by_backends(grad, input, series, where, needs, backends)


def _by_backends(
    grad: Tensor,
    input: Tensor,
    series: Series,
    geometry: Geometry,
    needs: Sequence[bool],
    backends: Sequence[Any],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The backward operator by two backends: of the input's gradient, and of the others'."""
    grad_input, grad_terms, grad_gates = input.new_empty(0), [], None
    if needs[0]:
        grad_input = backends[0].input_grad(grad, input, series, geometry)
    if needs[1] or needs[2]:
        grad_terms, grad_gates = backends[1].weight_grad(grad, input, series, geometry)
    return (
        grad_input,
        grad_terms if needs[1] else [],
        grad_gates if needs[2] and grad_gates is not None else series.terms[0].new_empty(0),
    )


def _cuda_sum(terms: Sequence[Tensor], active: Tensor, gates: Tensor | None) -> Tensor:
    # Described as a pointwise convolution of the first term with all of them.
    series = Series(terms, _host_int(active, terms), gates)
    return dispatch.serving("series_sum", terms[0], series, Geometry()).series_sum(series)


def _host_int(active: Tensor, terms: Sequence[Tensor]) -> int:
    """The value of ``active``; inside a compiled graph nobody has checked it before."""
    value = int(active)
    if not 1 <= value <= len(terms):
        raise RuntimeError(
            f"active: got {value}, accepted is 1 to {len(terms)}, the number of terms"
        )
    return value


_library.impl("series_conv2d", _cuda_forward, "CUDA")
_library.impl("series_conv2d_backward", _cuda_backward, "CUDA")
_library.impl("series_sum", _cuda_sum, "CUDA")


def missing(*args: Any) -> Any:
    """Raise RuntimeError: stands in for the compiled CPU kernels where they could not be loaded."""
    raise RuntimeError(
        f"gross_kernels: the compiled CPU kernels could not be loaded from {cpu.LIBRARY}: "
        f"{load_error}\nBuild them with `pip install -e .` (a C++ compiler is needed), or use the "
        "slow definition: GROSS_KERNELS_BACKEND=reference. `python -m gross_kernels.environment` "
        "says what is installed."
    )


if load_error is not None:
    for _name in ("series_conv2d", "series_conv2d_backward", "series_sum"):
        _library.impl(_name, missing, "CPU")


# FLOP counts ------------------------------------------------------------------------------------


def _flops(input: Tensor, terms: Sequence[Tensor], active: Tensor, geometry: Geometry) -> int:
    kernel = terms[0].shape[2:]
    size = geometry.output_size(input.shape[2:], kernel)
    group_size = terms[int(active) - 1].shape[1]
    return 2 * input.shape[0] * convolution_macs(terms[0].shape[0], group_size, kernel, size)


@register_flop_formula(torch.ops.gross.series_conv2d, get_raw=True)
def _series_conv2d_flops(
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    gates: Tensor | None,
    *geometry: Pair,
    **_: Any,
) -> int:
    """Two FLOP per multiply–accumulate at the active group size, as torch counts a
    convolution's."""
    return _flops(input, terms, active, Geometry(*geometry))


@register_flop_formula(torch.ops.gross.series_conv2d_backward, get_raw=True)
def _series_conv2d_backward_flops(
    grad: Tensor,
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    gates: Tensor | None,
    *rest: Any,
    **_: Any,
) -> int:
    """The forward's count for the gradient of the input and for that of the weight, as far as
    needed."""
    *geometry, needs = rest
    times = bool(needs[0]) + bool(needs[1] or needs[2])
    return times * _flops(input, terms, active, Geometry(*geometry))


@register_flop_formula(torch.ops.gross.series_sum)
def _series_sum_flops(*args: Any, **_: Any) -> int:
    """Nothing: a convolution's count has no additions of weights either."""
    return 0
