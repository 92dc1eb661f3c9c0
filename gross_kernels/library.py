"""What rests on private torch API: gradients of operators with lists of tensors, autocast, which
transforms are active, and what the autograd engine is doing.

``torch.library.register_autograd`` sends lists of tensors through ``torch.utils._pytree``, which
takes 100 µs for a layer's forward and backward. :func:`register_gradient` does the same with flat
arguments. At import it is tried on an operator of its own; where torch lacks what it needs, or
answers otherwise, ``register_autograd`` takes its place (``PRIVATE`` is then False)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointFunction

Operator = Callable[..., Any]

#: How many tensors each of an operator's arguments or outputs is: None for one that is not a list.
Lengths = list[int | None]

#: Whether gradients are registered by :func:`_register_flat`; found out below.
PRIVATE = True
#: What operators compute, in PyTorch's own: what runs where a transform needs to look inside.
_definitions: dict[Operator, Operator] = {}


def call(operator: Operator, *args: Any) -> Any:
    """``operator(*args)``; where gradients are off, past the Python code of
    :func:`register_gradient`: that it is entered at all takes 5 µs."""
    if torch.compiler.is_compiling():
        return operator(*args)
    if transformed():
        # Torch's own registration knows of no definition.
        return (operator if PRIVATE else _definitions[operator])(*args)
    if torch.is_grad_enabled() or not PRIVATE:
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def constant(function: FunctionT) -> FunctionT:
    """Mark a function whose result a compiled graph may keep:
    ``torch.compiler.assume_constant_result``, which would import the compiler, for seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def transformed() -> bool:
    """Whether a derivative is being taken that only PyTorch's own operators can give: forward mode
    (``torch.autograd.forward_ad``), or ``torch.func``'s grad, vjp and jvp."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    innermost = torch._C._functorch.peek_interpreter_stack()
    return innermost is not None and innermost.key() in (
        torch._C._functorch.TransformType.Grad,
        torch._C._functorch.TransformType.Jvp,
    )


# Gradients --------------------------------------------------------------------------------------


def register_gradient(
    library: torch.library.Library,
    operator: torch._ops.OpOverload,
    definition: Operator,
    save: Callable[[Any, tuple, Any], None],
    gradient: Callable[..., Sequence[Any]],
) -> None:
    """Make ``operator`` differentiable, in reverse by its own gradient, otherwise by its
    definition.

    Args:
        library: what registers the implementation.
        operator: its arguments are positional and without defaults, those that are tensors or lists
            of tensors first.
        definition: computes the same by PyTorch's own operators.
        save: ``save(ctx, args, output)`` keeps what the backward pass wants.
        gradient: ``gradient(ctx, needs, *grads)`` returns the gradients of those first arguments.
            What is a list of tensors is a list in ``needs`` and ``grads``, and a list or None among
            the returned gradients.
    """
    _definitions[operator] = definition
    (_register_flat if PRIVATE else _register_public)(library, operator, save, gradient)


def _register_flat(
    library: torch.library.Library,
    operator: torch._ops.OpOverload,
    save: Callable[[Any, tuple, Any], None],
    gradient: Callable[..., Sequence[Any]],
) -> None:
    inputs = _tensor_arguments(operator)
    outputs = [a.type.kind() == "ListType" for a in operator._schema.returns]

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
    name = operator.name().replace("::", "_")
    function: Any = type(name, (torch.autograd.Function,), methods)

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if transformed():
            return _definitions[operator](*args)
        if torch.is_grad_enabled():
            lengths = _lengths(args, inputs)
            flat = _flat(args, lengths)
            if any(tensor is not None and tensor.requires_grad for tensor in flat):
                both = [lengths]
                output = function.apply(keyset, args, both, *flat)
                return tuple(_nested(output, both[1])) if len(both) == 2 else output
        return below(keyset, args)

    library.impl(operator, autograd, "Autograd", with_keyset=True)


def _register_public(
    library: torch.library.Library,
    operator: torch._ops.OpOverload,
    save: Callable[[Any, tuple, Any], None],
    gradient: Callable[..., Sequence[Any]],
) -> None:
    inputs = _tensor_arguments(operator)
    more = len(operator._schema.arguments) - len(inputs)

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        save(ctx, inputs, output)
        ctx.lengths = _lengths(inputs, lists)

    def backward(ctx: Any, *grads: Any) -> tuple:
        found = gradient(ctx, ctx.needs_input_grad[: len(lists)], *grads)
        whole = [
            [None] * length if grad is None and length is not None else grad
            for grad, length in zip(found, ctx.lengths, strict=True)
        ]
        return (*whole, *[None] * more)

    lists = inputs
    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=library)


def _tensor_arguments(operator: torch._ops.OpOverload) -> list[bool]:
    """Of each argument that is tensors: whether it is a list of them."""
    return [
        a.type.kind() == "ListType" for a in operator._schema.arguments if "Tensor" in str(a.type)
    ]


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


# vmap -------------------------------------------------------------------------------------------


def register_vmap(
    library: torch.library.Library, operator: torch._ops.OpOverload, folds: bool
) -> None:
    """Make ``operator`` work under ``torch.vmap``, and under the older one that
    ``torch.autograd.grad(is_grads_batched=True)`` is made of: one call where it ``folds``, that is,
    where its first argument alone is batched and begins with a batch dimension of its own;
    otherwise a call for each."""

    def run(size: int, dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
        first = dims[0]
        if folds and isinstance(first, int) and not _batched(dims[1:]):
            input = args[0].movedim(first, 0)
            output = operator(input.flatten(0, 1), *args[1:])
            return _map(lambda tensor: _unfolded(tensor, input), output)
        each = [
            operator(*[_slice(arg, dim, i) for arg, dim in zip(args, dims, strict=True)])
            for i in range(size)
        ]
        return _stacked(each)

    def rule(info: Any, dims: tuple, *args: Any) -> tuple[Any, Any]:
        return run(info.batch_size, dims, args)

    def older_rule(*args: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        sizes: list[int] = []
        plain, dims = zip(*[_unwrapped(arg, level, sizes) for arg in args], strict=True)
        return _wrapped(*run(sizes[0], dims, plain), level)

    torch.library.register_vmap(operator, rule, lib=library)
    library.impl(operator, older_rule, "Batched")


def _unwrapped(value: Any, level: int, sizes: list[int]) -> tuple[Any, Any]:
    """An argument of an older vmap without its wrapping, and its batched dimension; ``sizes`` gets
    how many it is."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        values, dims = zip(*[_unwrapped(each, level, sizes) for each in value], strict=True)
        return list(values), list(dims)
    if not isinstance(value, Tensor) or not torch._C._functorch.is_legacy_batchedtensor(value):
        return value, None
    plain = torch._remove_batch_dim(value, level, 0, 0)
    sizes.append(plain.shape[0])
    return plain, 0


def _wrapped(value: Any, dim: Any, level: int) -> Any:
    if isinstance(value, Tensor):
        return value if dim is None else torch._add_batch_dim(value, dim, level)
    return type(value)(_wrapped(each, d, level) for each, d in zip(value, dim, strict=True))


def _batched(dims: Any) -> bool:
    return any(_batched(dim) if isinstance(dim, (list, tuple)) else dim is not None for dim in dims)


def _slice(value: Any, dim: Any, i: int) -> Any:
    """The ``i``-th of a batched argument."""
    if isinstance(dim, (list, tuple)):
        return [_slice(each, d, i) for each, d in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, i)


def _unfolded(output: Tensor, input: Tensor) -> tuple[Tensor, int | None]:
    # What is not computed is an empty tensor of one dimension.
    return (output, None) if output.dim() == 1 else (output.unflatten(0, input.shape[:2]), 0)


def _map(function: Callable[[Tensor], tuple], output: Any) -> tuple[Any, Any]:
    """A tensor or a tuple of them with its dimensions."""
    if isinstance(output, Tensor):
        return function(output)
    values, dims = zip(*map(function, output), strict=True)
    return values, dims


def _stacked(each: Sequence[Any]) -> tuple[Any, Any]:
    """Outputs of one shape, all of them tensors, lists or tuples, as one with its dimensions."""
    if isinstance(each[0], Tensor):
        return torch.stack(list(each)), 0
    parts = [_stacked(part) for part in zip(*each, strict=True)]
    kind = type(each[0])
    return kind(value for value, _ in parts), kind(dim for _, dim in parts)


# Autocast ---------------------------------------------------------------------------------------


def register_autocast(library: torch.library.Library, name: str) -> None:
    """Autocast casts the input alone: the kernel sums float32 terms in float32 and casts the sum
    once, where casting every term first would cost N launches and four times the weight error."""
    operator = getattr(torch.ops.gross, name)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        library.impl(name, partial(_cast_input, device, operator), key)


def _cast_input(device: str, operator: Operator, input: Tensor, *rest: Any) -> Any:
    if input.device.type == device and input.is_floating_point() and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device))
    with torch.amp.autocast(device, enabled=False):
        return operator(input, *rest)


# The autograd engine ----------------------------------------------------------------------------


def clock() -> int:
    """The time by which autograd orders its nodes: all that are made later in this thread have
    greater numbers."""
    with torch.inference_mode(False), torch.enable_grad():
        node: Any = torch.empty((), device="cpu", requires_grad=True).view(()).grad_fn
    return int(node._sequence_nr())


def recomputed() -> int | None:
    """Where a call is made by a backward pass (of ``torch.utils.checkpoint``, which computes again
    what it did not keep): the :func:`clock` of what is differentiated; None elsewhere.

    That is a node of the forward pass, made while the checkpointed function ran or, in the
    reentrant variant, just before. Reentrant checkpoints in one another are differentiated within
    the outermost's backward pass, by nodes of the recomputation: the outermost is the one that
    counts."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return None
    node: Any = torch._C._current_autograd_node()
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            node = frame.f_locals["ctx"]
        frame = frame.f_back
    return None if node is None else int(node._sequence_nr())


# Start-up ---------------------------------------------------------------------------------------


def _try_flat() -> bool:
    """Whether :func:`_register_flat` works in this torch: a value, its gradients in a list and
    beside it, and a call below autograd."""
    library = torch.library.Library("gross_probe", "DEF")
    library.define("weighted(Tensor[] terms, Tensor scale, int power) -> Tensor")
    library.impl("weighted", _weighted, "CPU")
    operator = torch.ops.gross_probe.weighted.default

    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        ctx.power = args[2]
        ctx.save_for_backward(*args[0], args[1])

    def gradient(ctx: Any, needs: Sequence[Any], grad: Tensor) -> tuple:
        *terms, scale = ctx.saved_tensors
        total = sum(term**ctx.power for term in terms)
        slopes = [grad * scale * ctx.power * term ** (ctx.power - 1) for term in terms]
        return slopes, (grad * total).sum() if needs[1] else None

    terms = [torch.tensor([value, 1.0], device="cpu", requires_grad=True) for value in (2.0, 3.0)]
    scale = torch.tensor(5.0, device="cpu", requires_grad=True)
    try:
        _definitions[operator] = _weighted
        _register_flat(library, operator, save, gradient)
        with torch.inference_mode(False), torch.enable_grad():
            output = operator(terms, scale, 2)
            found = torch.autograd.grad(output.sum(), [*terms, scale])
        with torch.no_grad():
            below = call(operator, terms, scale, 2)
        expected = [[65.0, 10.0], [20.0, 10.0], [30.0, 10.0], 15.0]
        return [output.tolist(), *(grad.tolist() for grad in found)] == expected and bool(
            (below == output).all()
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    finally:
        _definitions.pop(operator, None)
        library._destroy()


def _weighted(terms: Sequence[Tensor], scale: Tensor, power: int) -> Tensor:
    return scale * torch.stack([term**power for term in terms]).sum(0)


# The variable is for the tests.
PRIVATE = not os.environ.get("_GROSS_KERNELS_REGISTER_AUTOGRAD") and _try_flat()
