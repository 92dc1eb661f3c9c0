"""From a trained network to one with structured layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gross_kernels import StructuredLinear
from gross_kernels.composite import Operations

from ..arguments import check_flag, check_module
from ..copying import check_open, copy_attributes, copy_model, unwrapped
from ..decomposition.plan import call_order, calls_of_originals
from ..example import Call, Example, check_call, run_copy
from ..macs import macs
from ..report import error_console
from .plan import KINDS, Plan, Structures, make_plans, structured_layers
from .report import StructuredDecomposition, StructuredLayer


def decompose(
    model: nn.Module,
    structures: Structures,
    *,
    skip: Collection[str] | None = None,
    input_size: Sequence[int] | None = None,
    example: Example | None = None,
    quiet: bool = False,
) -> nn.Module:
    """Turn layers of a network into structured ones: the nearest, ``α = A⁺W``.

    Of a network that was trained with :func:`gross.structured.regularizer` little is lost; of any
    other, fine-tune the result as an ordinary network.

    Args:
        model: the network; left as it is.
        structures: one ``(c, n)`` for all convolutions whose kernels have it: n along each axis (or
            one number per axis), c channels of a group, None for all of them, a float for a share
            of them. Or a mapping from qualified names of convolutions and linear layers to
            structures, of linear layers c alone; all of these must fit.
        skip: names of layers, or of modules around them, to leave alone; ``()`` skips none. By
            default the first convolution larger than 1×1 is, unless ``structures`` is a mapping.
        input_size: shape of one input without the batch dimension, for a network that takes one
            tensor; with it the report counts operations.
        example: in its place, what the network is called with, as in :func:`gross.macs`.
        quiet: print no report. It is the returned model's attribute ``structured_report`` in any
            case, a :class:`StructuredDecomposition`.

    Returns:
        A new model on the devices and in the dtypes of ``model``. Left alone, with the reason in
        the report, are layers with hooks, of a subclass with a forward of its own, held inside
        functions, or which share their weight. Of a model inside ``torch.compile`` or
        ``DataParallel``, the model alone.

    Raises:
        TypeError: before any work, for an argument of another type.
        ValueError: before any work, if no layer can be structured, a named one cannot as asked,
            with what fits, or the model cannot be copied. What the model itself raises on the input
            is passed on with a note.
        ImportError: if rich is missing and ``quiet`` is False.
    """
    check_flag("quiet", quiet)
    model = unwrapped(check_module("model", model))
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError(
            "model: got parameters that are not initialised yet, accepted is a model that has run "
            "once"
        )
    check_open(model)
    call = check_call(model, input_size, example)
    order = macs_before = None
    called: Collection[nn.Module] = ()
    if call is not None:
        with calls_of_originals(model, KINDS) as called:
            report = macs(model, input_size, example=example)
        order, macs_before = call_order(report), report.total
    plans, left_alone = make_plans(model, structures, skip, order)
    for plan in plans:
        if plan.module in called:
            raise ValueError(
                f"model: got {plan.name!r} called through a function that no copy of the model can "
                "change, accepted is a model without, or its name in skip"
            )
    for plan in plans:
        weight = plan.module.weight
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(
                f"model: got a weight of {plan.name!r} that is not finite, accepted are finite "
                "weights"
            )
    sizes = {} if call is None else _input_sizes(model, plans, call)
    with torch.inference_mode(False):
        layers = [_layer(plan) for plan in plans]
    replaced = {id(plan.module): layer for plan, layer in zip(plans, layers, strict=True)}
    converted = copy_model(model, replaced)
    described = tuple(
        _describe(plan, layer, sizes.get(plan.name))
        for plan, layer in zip(plans, layers, strict=True)
    )
    made = StructuredDecomposition(
        described,
        left_alone,
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in converted.parameters()),
        macs_before,
        None if call is None else macs(converted, input_size, example=example).total,
    )
    earlier = vars(model).get("structured_report")
    if isinstance(earlier, StructuredDecomposition):
        # A network that is structured in two turns.
        by_name = {layer.name: layer for layer in (*earlier.layers, *made.layers)}
        made = replace(
            made,
            layers=tuple(by_name[n] for n in structured_layers(converted) if n in by_name),
            parameters_before=earlier.parameters_before,
            macs_before=earlier.macs_before or made.macs_before,
        )
    vars(converted)["structured_report"] = made
    if not quiet:
        error_console().print(made)
    return converted


def _layer(plan: Plan) -> Any:
    """The structured layer in the place of a dense one, which may have numpy's numbers and
    attributes of its user."""
    given: Any = plan.module
    c, *n = plan.basis.coefficients
    layer = plan.kind.from_dense(given, (c, n) if n else c)
    for parameter, of in ((layer.weight, given.weight), (layer.bias, given.bias)):
        if parameter is not None:
            parameter.requires_grad_(of.requires_grad)
            copy_attributes(of, parameter)
    return layer


def _input_sizes(model: nn.Module, plans: Sequence[Plan], call: Call) -> dict[str, list[Any]]:
    """Shapes of the inputs of each layer, of all its calls."""

    def note(sizes: list[Any], layer: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        sizes.append((args[0] if args else kwargs["input"]).shape)

    def watch(copied: nn.Module) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {plan.name: [] for plan in plans}
        names = {id(plan.module): plan.name for plan in plans}
        originals = dict(model.named_modules())
        for path, module in copied.named_modules():
            name = names.get(id(originals.get(path)))
            if name is not None:
                module.register_forward_pre_hook(partial(note, found[name]), with_kwargs=True)
        return found

    return run_copy(model, call, watch)


def _describe(plan: Plan, layer: Any, sizes: Sequence[Any] | None) -> StructuredLayer:
    given: Any = plan.module
    linear = isinstance(layer, StructuredLinear)
    counts: tuple[int | None, ...] = (None,) * 4
    if sizes is not None:
        small, dense = Operations(0, 0), Operations(0, 0)
        axes = len(plan.basis.size) - 1
        for shape in sizes:
            each = layer.operations() if linear else layer.operations(tuple(shape[-axes:]))
            times = math.prod(shape[:-1]) if linear else math.prod(shape[: -axes - 1])
            small, dense = (
                Operations(*(a + times * b for a, b in zip(so_far, one, strict=True)))
                for so_far, one in zip((small, dense), each, strict=True)
            )
        counts = (
            dense.multiplications,
            small.multiplications,
            dense.additions,
            small.additions,
        )
    return StructuredLayer(
        plan.name,
        type(given).__name__,
        int(given.in_features if linear else given.in_channels),
        int(given.out_features if linear else given.out_channels),
        1 if linear else int(given.groups),
        plan.basis.size,
        plan.basis.coefficients,
        layer.residual,
        sum(p.numel() for p in given.parameters()),
        sum(p.numel() for p in layer.parameters()),
        *counts,
    )
