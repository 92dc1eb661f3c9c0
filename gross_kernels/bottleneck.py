"""The operators ``gross::bottleneck``, ``gross::bottleneck_backward``, ``gross::bottleneck_pack``
and ``gross::bottleneck_packed``: a whole layer, pointwise → grouped → pointwise, in one pass.

``y = relu(Q_n · conv(P_n · x, R_n) + bias)`` with ``P_n = Σ gate_i p_i``, ``R_n = Σ gate_i
Ψ(r_i)``, ``Q_n = Σ gate_i q_i`` over the first n = ``active`` terms (GroSS, Table 1 and equation
5). On the CPU it is one C++ kernel whose inner tensors never leave the second-level cache, and so
are all its gradients; elsewhere it is :func:`parts`. What a backward pass needs of the inner
tensors it computes again, so that training keeps the input alone, or the input and the first
pointwise's output where ``keep_inner`` says so. For inference the weights may be summed and put
into the kernel's order beforehand, by ``bottleneck_pack``; what it returns serves
``bottleneck_packed``, which has no gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import functional, ops
from .call import memory_format
from .geometry import Geometry
from .library import register_autocast, register_gradient, register_vmap, transformed
from .series import convolution_macs

_WEIGHTS = (
    "Tensor[] pointwise_in, Tensor[] grouped, Tensor[] pointwise_out, Tensor? bias, "
    "Tensor active, Tensor? gates"
)
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, bool relu"

_library = torch.library.Library("gross", "FRAGMENT")
for _schema in (
    f"bottleneck(Tensor input, {_WEIGHTS}, {_GEOMETRY}, bool keep_inner) "
    "-> (Tensor output, Tensor inner)",
    f"bottleneck_backward(Tensor grad, Tensor input, Tensor inner, Tensor? output, {_WEIGHTS}, "
    f"{_GEOMETRY}, bool[6] needs) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[], Tensor, Tensor)",
    "bottleneck_packed(Tensor input, Tensor packed, int[] shape, bool relu) -> Tensor",
    f"bottleneck_pack(Tensor like, {_WEIGHTS}) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides))

Terms = Sequence[Tensor]


class Weights(NamedTuple):
    """A whole layer's three series, how many terms of each are summed, and their gates; the bias.
    The operators take it flat, as ``*weights``.

    Attributes:
        pointwise_in, grouped, pointwise_out: terms as in :class:`GroSSConv2d`.
        bias: ``[C_out]`` or None.
        active: n, a 0-dimensional int64 tensor on the host.
        gates: ``[N]``, one scale for the i-th terms of all three series, or None for ones.
    """

    pointwise_in: Terms
    grouped: Terms
    pointwise_out: Terms
    bias: Tensor | None
    active: Tensor
    gates: Tensor | None

    @property
    def series(self) -> tuple[Terms, Terms, Terms]:
        """The terms alone."""
        return self.pointwise_in, self.grouped, self.pointwise_out


def _read(arguments: Sequence[Any]) -> tuple[Weights, Geometry, Sequence[Any]]:
    """An operator's arguments from the weights on: weights, geometry, and the others."""
    return Weights(*arguments[:6]), Geometry(*arguments[6:9]), arguments[9:]


def parts(
    input: Tensor,
    weights: Weights,
    geometry: Geometry,
    relu: bool,
    pad: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The layer as three convolutions, differentiable: the operator's definition, and what runs
    where it has no kernel.

    Args:
        pad: applied to the first pointwise's output; the geometry's padding comes on top of it.

    Returns:
        output ``[N, C_out, H', W']`` of ``input`` ``[N, C_in, H, W]``, and the first pointwise's
        output ``[N, width_in, H, W]``.
    """
    active, gates = weights.active, weights.gates
    first = functional.series_sum(weights.pointwise_in, active, gates)
    inner = F.conv2d(input, first.to(input.dtype))
    if pad is not None:
        # Padding in a mode other than zeros loses the memory format.
        inner = pad(inner).contiguous(memory_format=memory_format(input))
    middle = functional.apply(inner, weights.grouped, active, gates, geometry)
    last = functional.series_sum(weights.pointwise_out, active, gates)
    bias = None if weights.bias is None else weights.bias.to(middle.dtype)
    output = F.conv2d(middle, last.to(middle.dtype), bias)
    return output.relu() if relu else output, inner


def merged_kernel(weights: Weights) -> Tensor:
    """The dense kernel ``[C_out, C_in, kh, kw]`` that the layer amounts to, ``Q_n · R_n · P_n``
    tap by tap: exact, for P has no bias that padding would cut off. Differentiable."""
    pointwise_in, grouped, pointwise_out, _, active, gates = weights
    kernel_size = grouped[0].shape[2:]
    wide = torch.promote_types(pointwise_in[0].dtype, torch.float32)
    with torch.autocast(pointwise_in[0].device.type, enabled=False):
        first = functional.series_sum(pointwise_in, active, gates).to(wide)
        last = functional.series_sum(pointwise_out, active, gates).to(wide)
        # A convolution of single pixels is its kernel, turned: pixel c is P's column c.
        around = Geometry((1, 1), (kernel_size[0] - 1, kernel_size[1] - 1), (1, 1))
        columns = first.transpose(0, 1).contiguous()
        terms = [term.to(wide) for term in grouped]
        scales = None if gates is None else gates.to(wide)
        inner = functional.apply(columns, terms, active, scales, around).flip(2, 3)
        return torch.einsum("om,cmyx->ocyx", last.flatten(1), inner)


def merged(input: Tensor, weights: Weights, geometry: Geometry, relu: bool) -> Tensor:
    """The layer as the dense convolution that it amounts to, ``[N, C_out, H', W']``;
    differentiable: the gradient of the kernel goes back through the products that make it."""
    kernel = merged_kernel(weights).to(input.dtype, memory_format=memory_format(input))
    bias = None if weights.bias is None else weights.bias.to(input.dtype)
    output = F.conv2d(input, kernel, bias, *geometry)
    return output.relu() if relu else output


# Shapes -----------------------------------------------------------------------------------------


def _image(input: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    shape = (input.shape[0], channels, *size)
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    )


@torch.library.register_fake("gross::bottleneck", lib=_library)
def _bottleneck_shape(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weights, geometry, (_, keep_inner) = _read(arguments)
    size = geometry.output_size(input.shape[2:], weights.grouped[0].shape[2:])
    inner = (
        _image(input, weights.pointwise_in[0].shape[0], input.shape[2:])
        if keep_inner
        else input.new_empty(0)
    )
    return _image(input, weights.pointwise_out[0].shape[0], size), inner


@torch.library.register_fake("gross::bottleneck_backward", lib=_library)
def _bottleneck_backward_shape(
    grad: Tensor, input: Tensor, inner: Tensor, output: Tensor | None, *arguments: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    weights, _, (_, needs) = _read(arguments)
    bias, gates = weights.bias, weights.gates

    def like(terms: Terms, needed: bool) -> list[Tensor]:
        return (
            [torch.empty_like(t, memory_format=torch.contiguous_format) for t in terms]
            if needed
            else []
        )

    return (
        _image(input, input.shape[1], input.shape[2:]) if needs[0] else input.new_empty(0),
        like(weights.pointwise_in, needs[1]),
        like(weights.grouped, needs[2]),
        like(weights.pointwise_out, needs[3]),
        torch.empty_like(bias) if needs[4] and bias is not None else input.new_empty(0),
        torch.empty_like(gates) if needs[5] and gates is not None else input.new_empty(0),
    )


def _pairs(shape: Sequence[int]) -> list[Sequence[int]]:
    """``shape`` of ``gross::bottleneck_packed`` in pairs: width; group size and C_out; kernel size,
    stride, padding and dilation."""
    return [shape[i : i + 2] for i in range(0, 12, 2)]


@torch.library.register_fake("gross::bottleneck_packed", lib=_library)
def _bottleneck_packed_shape(
    input: Tensor, packed: Tensor, shape: Sequence[int], relu: bool
) -> Tensor:
    _, (_, out_channels), kernel_size, *geometry = _pairs(shape)
    size = Geometry(*geometry).output_size(input.shape[2:], kernel_size)
    return _image(input, out_channels, size)


@torch.library.register_fake("gross::bottleneck_pack", lib=_library)
def _bottleneck_pack_shape(like: Tensor, *weights: Any) -> Tensor:
    # How many numbers depends on the processor's vectors.
    size = torch.library.get_ctx().new_dynamic_size()
    return like.new_empty(size, dtype=torch.promote_types(like.dtype, torch.float32))


# Gradients --------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    input, first, grouped, last, bias, active, gates, *ctx.geometry, ctx.relu, _ = inputs
    ctx.count = len(grouped)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    kept = output[0] if ctx.relu else None
    ctx.save_for_backward(input, output[1], kept, bias, active, gates, *first, *grouped, *last)


def _bottleneck_grad(
    ctx: Any, needs: Sequence[Any], grad: Tensor | None, _: Tensor | None
) -> tuple:
    if grad is None:
        return (None,) * len(needs)
    n = ctx.count
    input, inner, output, bias, active, gates, *terms = ctx.saved_tensors
    weights = (terms[:n], terms[n : 2 * n], terms[2 * n :], bias, active, gates)
    need_input, *need_series, need_bias, _, need_gates = needs
    wanted = [need_input, *(any(need) for need in need_series), need_bias, need_gates]
    if torch.is_grad_enabled() or transformed():
        geometry = Geometry(*ctx.geometry)
        results = _differentiable(grad, input, Weights(*weights), geometry, ctx.relu, wanted)
    else:
        results = torch.ops.gross.bottleneck_backward.default(
            grad, input, inner, output, *weights, *ctx.geometry, ctx.relu, wanted
        )
    *grads, grad_gates = [
        result if need else None for result, need in zip(results, wanted, strict=True)
    ]
    return (*grads, None, grad_gates)


def _definition(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weights, geometry, (relu, keep_inner) = _read(arguments)
    output, inner = parts(input, weights, geometry, relu)
    return output, inner.detach() if keep_inner else input.new_empty(0)


register_gradient(
    _library, torch.ops.gross.bottleneck.default, _definition, _save, _bottleneck_grad
)


def _differentiable(
    grad: Tensor,
    input: Tensor,
    weights: Weights,
    geometry: Geometry,
    relu: bool,
    needs: Sequence[bool],
) -> list[Any]:
    """The gradients with a graph of their own, for second derivatives: those of :func:`parts`."""
    bias, gates = ([] if leaf is None else [leaf] for leaf in (weights.bias, weights.gates))
    leaves = [[input], *weights.series, bias, gates]
    wanted = [
        leaf
        for group, need in zip(leaves, needs, strict=True)
        if need
        for leaf in group
        if leaf.requires_grad
    ]
    with torch.enable_grad():
        output, _ = parts(input, weights, geometry, relu)
    found = iter(
        torch.autograd.grad(output, wanted, grad, create_graph=True, materialize_grads=True)
    )
    results: list[Any] = []
    for i, (group, need) in enumerate(zip(leaves, needs, strict=True)):
        got = [next(found) if leaf.requires_grad else None for leaf in group if need]
        results.append(got if i in (1, 2, 3) else got[0] if got else None)
    return results


def _backward(
    grad: Tensor, input: Tensor, inner: Tensor, output: Tensor | None, *arguments: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """By parts: with dr = Qᵀdy, dp = Rᵀdr: dx = Pᵀdp, dP = dp xᵀ, dR = corr(p, dr), dQ = dy rᵀ, and
    every gate's share of the three; p (unless kept) and r are computed again. On the CPU one C++
    kernel does it all."""
    weights, geometry, (relu, needs) = _read(arguments)
    pointwise_in, grouped, pointwise_out, bias, active, gates = weights
    need_input, need_first, need_grouped, need_last, need_bias, need_gates = needs
    need_gates = need_gates and gates is not None
    count = int(active)
    grad = grad.contiguous(memory_format=memory_format(input))
    if relu and output is not None:
        grad = grad.masked_fill(output <= 0, 0)
    first = torch.ops.gross.series_sum(pointwise_in, active, gates).to(input.dtype)
    last = torch.ops.gross.series_sum(pointwise_out, active, gates).to(input.dtype)
    size = geometry.output_size(input.shape[2:], grouped[0].shape[2:])
    grad_input, grad_bias, grad_gates = (input.new_empty(0) for _ in range(3))
    grads_first: list[Tensor] = []
    grads_grouped: list[Tensor] = []
    grads_last: list[Tensor] = []
    shares: list[Tensor] = []

    if need_bias and bias is not None:
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_bias = grad.sum((0, 2, 3), dtype=wide).to(bias.dtype)
    if not inner.numel() and (need_grouped or need_last or need_gates):
        inner = _pointwise(input, first)
    need_inner = need_input or need_first or need_gates
    need_middle = need_inner or need_grouped
    # Where a tensor is not computed, only its shape is looked at.
    middle = _image(input, grouped[0].shape[0], size)
    if need_last or need_gates:
        middle = torch.ops.gross.series_conv2d(inner, grouped, active, gates, *geometry)
    of_middle, of_last = _pointwise_backward(
        grad, middle, last, need_middle, need_last or need_gates
    )
    if need_last or need_gates:
        shares.append(_gate_shares(of_last, pointwise_out, count))
        grads_last = _term_grads(of_last, pointwise_out, count, gates) if need_last else []
    if need_middle:
        if not inner.numel():
            inner = _image(input, first.shape[0], input.shape[2:])
        of_inner, grads_grouped, of_gates = torch.ops.gross.series_conv2d_backward(
            of_middle,
            inner,
            grouped,
            active,
            gates,
            *geometry,
            [need_inner, need_grouped, need_gates],
        )
        if need_inner:
            grad_input, of_first = _pointwise_backward(
                of_inner, input, first, need_input, need_first or need_gates
            )
        if need_first or need_gates:
            shares += [_gate_shares(of_first, pointwise_in, count), of_gates]
            grads_first = _term_grads(of_first, pointwise_in, count, gates) if need_first else []
    if need_gates and gates is not None:
        grad_gates = (
            torch.stack([share.to(torch.float64) for share in shares]).sum(0).to(gates.dtype)
        )
    return grad_input, grads_first, grads_grouped, grads_last, grad_bias, grad_gates


def _pointwise(input: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(input, weight).contiguous(memory_format=memory_format(input))


def _pointwise_backward(
    grad: Tensor, input: Tensor, weight: Tensor, need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of a pointwise convolution's input and weight, empty where not needed."""
    empty = input.new_empty(0)
    if grad.numel() == 0:
        return torch.zeros_like(input) if need_input else empty, torch.zeros_like(
            weight
        ) if need_weight else empty
    of_input, of_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        None,
        (1, 1),
        (0, 0),
        (1, 1),
        False,
        (0, 0),
        1,
        (need_input, need_weight, False),
    )
    if need_input:
        of_input = of_input.contiguous(memory_format=memory_format(input))
    return of_input if need_input else empty, of_weight if need_weight else empty


def _term_grads(total: Tensor, terms: Terms, active: int, gates: Tensor | None) -> list[Tensor]:
    """The gradients of a plain sum's terms, from the sum's: copies, scaled by the gates; zeros
    beyond ``active``."""
    grads = [torch.empty_like(term, memory_format=torch.contiguous_format) for term in terms]
    for i, grad in enumerate(grads[:active]):
        grad.copy_(total if gates is None else total * gates[i].to(total.dtype))
    if grads[active:]:
        torch._foreach_zero_(grads[active:])
    return grads


def _gate_shares(total: Tensor, terms: Terms, active: int) -> Tensor:
    """⟨gradient of the sum, term⟩ for every term, zero beyond ``active``: a gate's gradient from
    one series."""
    shares = [(total.double() * term.double()).sum() for term in terms[:active]]
    return torch.stack(shares + [shares[0].new_zeros(())] * (len(terms) - active))


# Autocast, vmap, implementations, FLOP counts ----------------------------------------------------


# The input alone is cast: the weights are summed in float32 and cast once.
for _name in ("bottleneck", "bottleneck_packed"):
    register_autocast(_library, _name)
    register_vmap(_library, getattr(torch.ops.gross, _name).default, folds=True)
register_vmap(_library, torch.ops.gross.bottleneck_backward.default, folds=False)


def _by_parts(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The operator where it has no kernel of its own."""
    weights, geometry, (relu, keep_inner) = _read(arguments)
    output, inner = parts(input, weights, geometry, relu)
    layout = memory_format(input)
    return (
        output.contiguous(memory_format=layout),
        inner.contiguous(memory_format=layout) if keep_inner else input.new_empty(0),
    )


_library.impl("bottleneck", _by_parts, "CUDA")
_library.impl("bottleneck_backward", _backward, "CUDA")
if ops.load_error is not None:
    _library.impl("bottleneck", ops.missing, "CPU")
    _library.impl("bottleneck_backward", ops.missing, "CPU")
    _library.impl("bottleneck_pack", ops.missing, "CPU")
    _library.impl("bottleneck_packed", ops.missing, "CPU")


def _flops(
    input: Tensor,
    width: Sequence[int],
    out_channels: int,
    group_size: int,
    kernel_size: Sequence[int],
    geometry: Geometry,
) -> tuple[int, int, int]:
    """FLOP of the three convolutions, two per multiply–accumulate."""
    size = geometry.output_size(input.shape[2:], kernel_size)
    images = 2 * input.shape[0]
    return (
        images * convolution_macs(width[0], input.shape[1], (1, 1), input.shape[2:]),
        images * convolution_macs(width[1], group_size, kernel_size, size),
        images * convolution_macs(out_channels, width[1], (1, 1), size),
    )


def _series_flops(input: Tensor, weights: Weights, geometry: Geometry) -> tuple[int, int, int]:
    """The same at the active group size."""
    first, grouped, last = weights.series
    width_out, group_size, *kernel_size = grouped[int(weights.active) - 1].shape
    width = (first[0].shape[0], width_out)
    return _flops(input, width, last[0].shape[0], group_size, kernel_size, geometry)


@register_flop_formula(torch.ops.gross.bottleneck, get_raw=True)
def _bottleneck_flops(input: Tensor, *arguments: Any, **_: Any) -> int:
    """The three convolutions'."""
    weights, geometry, _rest = _read(arguments)
    return sum(_series_flops(input, weights, geometry))


@register_flop_formula(torch.ops.gross.bottleneck_packed, get_raw=True)
def _bottleneck_packed_flops(
    input: Tensor, packed: Tensor, shape: Sequence[int], relu: bool, **_: Any
) -> int:
    """The same."""
    width, (group_size, out_channels), kernel_size, *geometry = _pairs(shape)
    return sum(_flops(input, width, out_channels, group_size, kernel_size, Geometry(*geometry)))


@register_flop_formula(torch.ops.gross.bottleneck_backward, get_raw=True)
def _bottleneck_backward_flops(
    grad: Tensor, input: Tensor, inner: Tensor, output: Tensor | None, *arguments: Any, **_: Any
) -> int:
    """The forward's count for the gradient of each input and of each weight, as far as needed, and
    for what is computed again of the inner tensors."""
    weights, geometry, (_relu, needs) = _read(arguments)
    need_input, need_first, need_grouped, need_last, _bias, need_gates = needs
    flops = _series_flops(input, weights, geometry)
    need_inner = need_input or need_first or need_gates
    again = not inner.numel() and (need_grouped or need_last or need_gates)
    return (
        (again + need_input + (need_first or need_gates)) * flops[0]
        + ((need_last or need_gates) + need_inner + (need_grouped or need_gates)) * flops[1]
        + ((need_last or need_gates) + (need_inner or need_grouped)) * flops[2]
    )
