"""The operators ``gross::series_conv2d``, ``gross::series_conv2d_backward`` and
``gross::series_sum``: schemas, shapes, gradients, autocast, FLOP counts. Implementations live in
the backends; the C++ library registers those for the CPU.

``active`` is a zero-dimensional int64 tensor on the host: as an int, every configuration of a
network would be a graph of its own under ``torch.compile``. The operators are tagged
``cudagraph_unsafe`` so that a captured graph never replays a stale ``active``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .backends import cpu
from .series import convolution_macs, output_size

_library = torch.library.Library("gross", "DEF")
for _schema in (
    "series_conv2d(Tensor input, Tensor[] terms, Tensor active, Tensor? gates, "
    "int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    "series_conv2d_backward(Tensor grad, Tensor input, Tensor[] terms, Tensor active, Tensor? gates, "
    "int[2] stride, int[2] padding, int[2] dilation, bool[3] needs) -> (Tensor, Tensor[], Tensor)",
    "series_sum(Tensor[] terms, Tensor active, Tensor? gates) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides))

#: Why the CPU kernels cannot be loaded; None when they are.
load_error = cpu.load()


def memory_format(input: Tensor) -> torch.memory_format:
    """Memory format of a convolution's output: the input's own, judged from its strides as ATen's
    operators do."""
    sizes, strides = input.shape, input.stride()
    least = 0
    if strides[1] == 0:
        return torch.contiguous_format
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[d] * sizes[d] if sizes[d] > 1 else strides[d]
    return torch.channels_last


# Shapes -----------------------------------------------------------------------------------------


@torch.library.register_fake("gross::series_conv2d", lib=_library)
def _series_conv2d_shape(
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    size = output_size(input.shape[2:], terms[0].shape[2:], stride, padding, dilation)
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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    return (
        torch.empty_like(input, memory_format=memory_format(input))
        if needs[0]
        else input.new_empty(0),
        [torch.empty_like(term, memory_format=torch.contiguous_format) for term in terms]
        if needs[1]
        else [],
        torch.empty_like(gates) if needs[2] and gates is not None else terms[0].new_empty(0),
    )


@torch.library.register_fake("gross::series_sum", lib=_library)
def _series_sum_shape(terms: Sequence[Tensor], active: Tensor, gates: Tensor | None) -> Tensor:
    return torch.empty_like(terms[0], memory_format=torch.contiguous_format)


# Gradients --------------------------------------------------------------------------------------


def call(operator: Callable[..., Any], *args: Any) -> Any:
    """``operator(*args)``; where gradients are off, past the Python code of
    :func:`register_gradient`: that it is entered at all takes 5 µs."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def register_gradient(
    library: torch.library.Library,
    operator: torch._ops.OpOverload,
    save: Callable[[Any, tuple, Any], None],
    gradient: Callable[..., Sequence[Any]],
) -> None:
    """Make ``operator`` differentiable, as ``torch.library.register_autograd`` does, whose lists of
    tensors go through torch.utils._pytree: 100 µs for a layer's forward and backward.

    Args:
        library: what registers the implementation.
        operator: its arguments are positional and without defaults, those that are tensors or lists
            of tensors first.
        save: ``save(ctx, args, output)`` keeps what the backward pass wants.
        gradient: ``gradient(ctx, needs, *grads)`` returns the gradients of those first arguments.
            What is a list of tensors is a list in ``needs`` and ``grads``, and a list or None among
            the returned gradients.
    """
    schema = operator._schema
    inputs = [a.type.kind() == "ListType" for a in schema.arguments if "Tensor" in str(a.type)]
    outputs = [a.type.kind() == "ListType" for a in schema.returns]
    name = operator.name().replace("::", "_")

    def below(keyset: torch._C.DispatchKeySet, args: tuple) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    # `flat` are the tensors of `args` once more: a function's graph is made of the tensors among
    # its own arguments.
    def forward(
        ctx: Any, keyset: torch._C.DispatchKeySet, args: tuple, lengths: list, *flat: Any
    ) -> Any:
        output = below(keyset, args)
        save(ctx, args, output)
        ctx.inputs = lengths[0]
        if len(outputs) == 1:
            ctx.outputs = [None]
            return output
        ctx.outputs = _lengths(output, outputs)
        lengths.append(ctx.outputs)
        return tuple(_flat(output, ctx.outputs))

    def backward(ctx: Any, *grads: Any) -> tuple:
        needs = _nested(ctx.needs_input_grad[3:], ctx.inputs)
        return (
            None,
            None,
            None,
            *_flat(gradient(ctx, needs, *_nested(grads, ctx.outputs)), ctx.inputs),
        )

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled():
            lengths = _lengths(args, inputs)
            flat = _flat(args, lengths)
            if any(tensor is not None and tensor.requires_grad for tensor in flat):
                both = [lengths]
                output = function.apply(keyset, args, both, *flat)
                return tuple(_nested(output, both[1])) if len(both) == 2 else output
        return below(keyset, args)

    library.impl(operator, autograd, "Autograd", with_keyset=True)


#: How many tensors each of an operator's arguments or outputs is: None for one that is not a list.
Lengths = list[int | None]


def _lengths(values: Sequence[Any], lists: Sequence[bool]) -> Lengths:
    return [len(value) if is_list else None for value, is_list in zip(values, lists, strict=False)]


def _flat(values: Sequence[Any], lengths: Lengths) -> list[Any]:
    """The values, and what is in the lists among them, one by one; None stands for a list of
    Nones."""
    flat: list[Any] = []
    for value, length in zip(values, lengths, strict=False):
        if length is None:
            flat.append(value)
        else:
            flat += [None] * length if value is None else value
    return flat


def _nested(flat: Sequence[Any], lengths: Lengths) -> list[Any]:
    """The inverse of :func:`_flat`."""
    values: list[Any] = []
    at = 0
    for length in lengths:
        if length is None:
            values.append(flat[at])
            at += 1
        else:
            values.append(list(flat[at : at + length]))
            at += length
    return values


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    input, terms, active, gates, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(input, active, gates, *terms)


def _series_conv2d_grad(ctx: Any, needs: Sequence[Any], grad: Tensor) -> tuple:
    input, active, gates, *terms = ctx.saved_tensors
    need_input, need_terms, need_gates = needs[0], any(needs[1]), needs[3]
    grad_input, grad_terms, grad_gates = call(
        torch.ops.gross.series_conv2d_backward,
        grad,
        input,
        terms,
        active,
        gates,
        ctx.stride,
        ctx.padding,
        ctx.dilation,
        [need_input, need_terms, need_gates],
    )
    return (
        grad_input if need_input else None,
        grad_terms if need_terms else None,
        None,
        grad_gates if need_gates else None,
    )


register_gradient(_library, torch.ops.gross.series_conv2d.default, _save, _series_conv2d_grad)


def _save_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    grad, input, terms, active, gates, ctx.stride, ctx.padding, ctx.dilation, ctx.needs = inputs
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
    geometry = (ctx.stride, ctx.padding, ctx.dilation)
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


register_gradient(_library, torch.ops.gross.series_sum.default, _save_sum, _series_sum_grad)


# Autocast ---------------------------------------------------------------------------------------


def register_autocast(library: torch.library.Library, name: str) -> None:
    """Autocast casts the input alone: the kernel sums float32 terms in float32 and casts the sum
    once, where casting every term first would cost N launches and four times the weight error."""
    operator = getattr(torch.ops.gross, name)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        library.impl(name, partial(_cast_input, device, operator), key)


def _cast_input(device: str, operator: Callable[..., Any], input: Tensor, *rest: Any) -> Any:
    if input.device.type == device and input.is_floating_point() and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device))
    with torch.amp.autocast(device, enabled=False):
        return operator(input, *rest)


register_autocast(_library, "series_conv2d")


# Implementations --------------------------------------------------------------------------------


def _cuda_forward(
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    geometry = (stride, padding, dilation)
    count = _host_int(active, terms)
    backend = dispatch.serving("forward", input, terms, count, *geometry)
    return backend.forward(input, terms, count, gates, *geometry)


def _cuda_backward(
    grad: Tensor,
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    geometry = (stride, padding, dilation)
    count = _host_int(active, terms)
    args = (grad, input, terms, count, gates, *geometry)
    grad_input, grad_terms, grad_gates = input.new_empty(0), [], None
    if needs[0]:
        grad_input = dispatch.serving("input_grad", input, terms, count, *geometry).input_grad(
            *args
        )
    if needs[1] or needs[2]:
        backend = dispatch.serving("weight_grad", input, terms, count, *geometry)
        grad_terms, grad_gates = backend.weight_grad(*args)
    return (
        grad_input,
        grad_terms if needs[1] else [],
        grad_gates if needs[2] and grad_gates is not None else terms[0].new_empty(0),
    )


def _cuda_sum(terms: Sequence[Tensor], active: Tensor, gates: Tensor | None) -> Tensor:
    # Described as a pointwise convolution of the first term with all of them.
    count = _host_int(active, terms)
    backend = dispatch.serving("series_sum", terms[0], terms, count, (1, 1), (0, 0), (1, 1))
    return backend.series_sum(terms, count, gates)


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
        f"gross_kernels: the compiled CPU kernels could not be loaded from {cpu.LIBRARY}: {load_error}\n"
        "Build them with `pip install -e .` (a C++ compiler is needed), or use the slow definition: "
        "GROSS_KERNELS_BACKEND=reference. `python -m gross_kernels.environment` says what is installed."
    )


if load_error is not None:
    for _name in ("series_conv2d", "series_conv2d_backward", "series_sum"):
        _library.impl(_name, missing, "CPU")


# FLOP counts ------------------------------------------------------------------------------------


def _flops(
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> int:
    kernel = terms[0].shape[2:]
    size = output_size(input.shape[2:], kernel, stride, padding, dilation)
    group_size = terms[int(active) - 1].shape[1]
    return 2 * input.shape[0] * convolution_macs(terms[0].shape[0], group_size, kernel, size)


@register_flop_formula(torch.ops.gross.series_conv2d, get_raw=True)
def _series_conv2d_flops(
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    **_: Any,
) -> int:
    """Two FLOP per multiply–accumulate at the active group size, as torch counts a
    convolution's."""
    return _flops(input, terms, active, stride, padding, dilation)


@register_flop_formula(torch.ops.gross.series_conv2d_backward, get_raw=True)
def _series_conv2d_backward_flops(
    grad: Tensor,
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs: Sequence[bool],
    **_: Any,
) -> int:
    """The forward's count for the gradient of the input and for that of the weight, as far as
    needed."""
    return (bool(needs[0]) + bool(needs[1] or needs[2])) * _flops(
        input, terms, active, stride, padding, dilation
    )


@register_flop_formula(torch.ops.gross.series_sum)
def _series_sum_flops(*args: Any, **_: Any) -> int:
    """Nothing: a convolution's count has no additions of weights either."""
    return 0
