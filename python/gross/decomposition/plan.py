"""Which convolutions of a network are decomposed, at which group sizes and widths, and why the
others are left alone."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gross_kernels import GroSSConv2d
from gross_kernels.series import check_group_sizes

from ..arguments import check_ints, check_pair, check_type
from ..copying import closed_parts, own_attributes, plain_name
from ..macs import MacsReport
from ..supernet import decomposed_layers
from .report import names_by_reason

Width = int | tuple[int, int]
GroupSizes = Sequence[int] | Mapping[str, Sequence[int]]
T = TypeVar("T")

#: The least share of a kernel's rank over either channel axis that a width of our own choice keeps.
#: Of a kernel without structure a quarter keeps so little that the relative error is √(3/4) = 0.87.
LEAST_SHARE = 1 / 4
#: How many names a message lists for a reason.
NAMES_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Plan:
    """One convolution to decompose.

    Attributes:
        name: qualified name, the first one of a convolution that is registered more than once.
        module: the convolution in the model, whose place the layer takes.
        weight: taken once: a parametrised convolution makes a new one each time.
        group_sizes, width: of the layer.
    """

    name: str
    module: nn.Conv2d
    weight: Tensor
    group_sizes: tuple[int, ...]
    width: tuple[int, int]

    @cached_property
    def conv(self) -> nn.Conv2d:
        """The convolution as a plain one: with Python's ints as its geometry, where it may have
        numpy's, and its weight as a parameter, where it may be parametrised."""
        given = self.module
        padding = given.padding
        made = nn.Conv2d(
            int(given.in_channels),
            int(given.out_channels),
            check_pair("kernel_size", given.kernel_size),
            check_pair("stride", given.stride),
            padding if isinstance(padding, str) else check_pair("padding", padding, least=0),
            check_pair("dilation", given.dilation),
            padding_mode=given.padding_mode,
            device="meta",
        ).train(given.training)
        made.weight = nn.Parameter(self.weight.detach(), self.weight.requires_grad)
        bias = given.bias
        made.bias = None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)
        return made


@dataclass(frozen=True)
class Request:
    """What is asked of :func:`gross.decompose`: its arguments of the same names, and what a forward
    pass of the model showed.

    Attributes:
        called: the convolutions that a forward pass was seen to call although they are not in the
            copy that it ran through; empty where no call is known.
        order: qualified names of the layers in the order in which a forward pass calls them; None
            where no call is known.
    """

    group_sizes: GroupSizes
    width: Width | Mapping[str, Width] | None = None
    skip: Collection[str] | None = None
    keep_costlier: bool = False
    called: Collection[nn.Module] = ()
    order: Sequence[str] | None = None

    @property
    def named(self) -> bool:
        """Whether the convolutions are named one by one: they are then decomposed as asked."""
        return isinstance(self.group_sizes, Mapping)


def check_request(model: nn.Module, request: Request) -> Request:
    """What was asked for with Python's numbers alone.

    Raises:
        TypeError: if something has another type, naming the argument.
        ValueError: if the group sizes do not nest, a width is not positive, or a name is not one of
            the model's.
    """
    names = [n for n, _ in _convolutions(model)]
    sizes, width, skip = request.group_sizes, request.width, request.skip
    if isinstance(sizes, Mapping):
        check_names("group_sizes", sizes, names)
        sizes = {n: check_ints(f"group_sizes[{n!r}]", s, least=1) for n, s in sizes.items()}
        if not sizes:
            raise ValueError("group_sizes: got no names, accepted is at least one")
    else:
        sizes = check_ints("group_sizes", sizes, least=1)
        check_group_sizes(sizes, *(math.prod(sizes),) * 2)
    if isinstance(width, Mapping):
        check_names("width", width, names)
        width = {name: check_pair(f"width[{name!r}]", each) for name, each in width.items()}
    elif width is not None:
        width = check_pair("width", width)
    if skip is not None:
        accepted = "a collection of names of convolutions, or of modules around them"
        if isinstance(skip, str):
            raise TypeError(f"skip: got the string {skip!r}, accepted is {accepted}")
        check_type("skip", skip, Collection, accepted)
        for name in skip:
            if not any(inside(n, name) for n in names):
                raise ValueError(f"skip: got {name!r}, accepted is {accepted}")
    return Request(sizes, width, skip, request.keep_costlier)


def make_plans(model: nn.Module, request: Request) -> tuple[list[Plan], dict[str, str]]:
    """The convolutions to decompose, in network order, and why the others are left alone.

    Raises:
        ValueError: if there are none, or one that is named in ``group_sizes`` cannot be decomposed
            as asked.
    """
    found = list(_convolutions(model))
    skipped = _skipped(found, request)
    held = captured(model)
    sizes_of, width_of = _by_module(request.group_sizes, found), _by_module(request.width, found)
    plans: list[Plan] = []
    left_alone = {
        plain_name(name): f"{type(module).__name__}, not nn.Conv2d"
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd) and not isinstance(module, nn.Conv2d)
    }
    left_alone |= {plain_name(name): program for name, program in closed_parts(model).items()}
    seen: set[nn.Module] = set()
    for name, conv in found:
        if conv in seen:
            continue
        seen.add(conv)
        asked, width = sizes_of.get(conv), width_of.get(conv)
        if request.named and asked is None:
            left_alone[name] = "not named in group_sizes"
            continue
        reason = skipped.get(conv) or ineligible(conv) or held.get(conv)
        if reason is None and conv in request.called:
            reason = "the model calls it through a function that no copy of the model can change"
        if reason is None:
            widths = _default_width(conv) if width is None else check_pair("width", width)
            assert asked is not None
            if request.named:
                sizes = check_group_sizes(asked, *widths, name=f"group_sizes[{name!r}]")
            else:
                sizes = _fitting(asked, widths)
                reason = _not_worthwhile(conv, sizes, widths, request, chosen_here=width is None)
                if reason is None and not request.keep_costlier:
                    sizes = tuple(s for s in sizes if _costs_less(conv, s, widths))
        if reason is None:
            plans.append(Plan(name, conv, conv.weight, sizes, widths))
        elif request.named and conv not in skipped:
            raise ValueError(f"group_sizes: {name!r} cannot be decomposed: {reason}")
        else:
            left_alone[name] = reason
    for plan in _half_tied(model, plans):
        reason = "its weight is shared with a layer that is not decomposed alike"
        if request.named:
            raise ValueError(f"group_sizes: {plan.name!r} cannot be decomposed: {reason}")
        plans.remove(plan)
        left_alone[plan.name] = reason
    if not plans:
        raise ValueError(_nothing_to_do(model, request, left_alone))
    return plans, left_alone


def check_weights(plans: Sequence[Plan]) -> None:
    """Check that there is something to fit.

    Raises:
        ValueError: if a weight has no values, or some that are not finite.
    """
    for plan in plans:
        if plan.weight.is_meta:
            raise ValueError(
                f"model: got {plan.name!r} on the meta device, which has no values; accepted there "
                "is method='random'"
            )
        if not torch.isfinite(plan.weight).all():
            raise ValueError(
                f"model: got a weight of {plan.name!r} that is not finite, accepted are finite "
                "weights"
            )


@contextmanager
def calls_of_originals(
    model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,)
) -> Iterator[set[nn.Module]]:
    """While it lasts, collects the layers of some kinds in ``model`` that are called: if a copy of
    the model runs, those that it reaches through something that is not copied, such as a
    closure."""
    originals = {module for module in model.modules() if isinstance(module, kinds)}
    called: set[nn.Module] = set()

    def note(module: nn.Module, args: object) -> None:
        # A copy of the model has a copy of this hook, too.
        if module in originals:
            called.add(module)

    handles = [conv.register_forward_pre_hook(note) for conv in originals]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def call_order(report: MacsReport) -> list[str]:
    """Qualified names of the layers in the order of their first calls."""
    called = [layer for layer in report.layers if layer.first_call is not None]
    return [layer.name for layer in sorted(called, key=lambda layer: layer.first_call or 0)]


def ineligible(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot be decomposed, whatever is asked for; None if it can."""
    reason = overridden(conv, nn.Conv2d)
    if reason is not None:
        return reason
    if conv.groups != 1:
        depthwise = conv.groups == conv.in_channels
        return "depthwise" if depthwise else f"grouped already, {conv.groups} groups"
    if _taps(conv) == 1:
        return "1×1"
    return holds_more(conv, _layer_attributes())


def overridden(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Why a module does not compute what torch's class does, None if it does."""
    kind = type(module)
    methods = [name for name in ("forward", "_conv_forward") if hasattr(base, name)]
    if any(getattr(kind, name) is not getattr(base, name) for name in methods):
        return f"{kind.__name__} has a forward of its own"
    if set(methods) & vars(module).keys():
        return "its forward was replaced on the instance"
    return None


def holds_more(module: nn.Module, attributes: Collection[str]) -> str | None:
    """What of a module a layer with these attributes in its place would lose, None if nothing."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "it has hooks, which the layer in its place would lose"
    held = [*module._parameters, *module._buffers, *module._modules]
    extra = [name for name in held if name not in ("weight", "bias", "parametrizations")]
    if extra:
        return f"it holds {', '.join(extra)}, which the layer in its place would lose"
    taken = own_attributes(module).keys() & set(attributes)
    if taken:
        return f"its attributes {', '.join(sorted(taken))} have names of the layer in its place"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters()):
        return "its parameters have hooks, which the layer in its place would lose"
    # Of the parameters: to read a parametrised weight can change it (spectral norm).
    parameter = next(module.parameters())
    if not parameter.is_floating_point():
        return f"its dtype is {parameter.dtype}"
    return None


@cache
def _layer_attributes() -> frozenset[str]:
    layer = GroSSConv2d(1, 1, 1, device="meta")
    return frozenset((*vars(layer), *dir(type(layer))))


# Sizes and widths -------------------------------------------------------------------------------


def _taps(conv: nn.Conv2d) -> int:
    return math.prod(map(int, conv.kernel_size))


def _default_width(conv: nn.Conv2d) -> tuple[int, int]:
    """The paper's width is the number of input channels; where there are fewer output channels, a
    bottleneck of that width could cost more than the convolution at every group size."""
    return (min(int(conv.in_channels), int(conv.out_channels)),) * 2


def _fitting(group_sizes: Iterable[int], width: tuple[int, int]) -> tuple[int, ...]:
    return tuple(s for s in group_sizes if width[0] % s == 0 and width[1] % (width[0] // s) == 0)


def _costs_less(conv: nn.Conv2d, group_size: int, width: tuple[int, int]) -> bool:
    """Whether the bottleneck has fewer MACs than the convolution, for each output position of a
    large image: the first pointwise convolution runs at the input's resolution."""
    taps, area = _taps(conv), math.prod(map(int, conv.stride))
    bottleneck = (
        area * conv.in_channels * width[0]
        + taps * group_size * width[1]
        + width[1] * conv.out_channels
    )
    return bottleneck < taps * conv.in_channels * conv.out_channels


def _not_worthwhile(
    conv: nn.Conv2d,
    sizes: Sequence[int],
    width: tuple[int, int],
    request: Request,
    chosen_here: bool,
) -> str | None:
    """Why a convolution that was not asked for by name had better stay, None if it had not."""
    shown = f"width {width[0]}→{width[1]}"
    if not sizes:
        return f"none of the group sizes fits its {shown}"
    axes = (conv.in_channels, conv.out_channels)
    for keeps, channels, others in zip(width, axes, reversed(axes), strict=True):
        rank = min(channels, others * _taps(conv))
        if chosen_here and keeps < LEAST_SHARE * rank:
            return f"its {shown} would keep {keeps} of its kernel's {rank} dimensions"
    if not (request.keep_costlier or any(_costs_less(conv, s, width) for s in sizes)):
        return f"at {shown} every group size costs more MACs than it does"
    return None


# Names ------------------------------------------------------------------------------------------


def _convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Every nn.Conv2d under each of its names, in network order."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d):
            yield plain_name(name), module


def inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def check_names(
    argument: str, values: Mapping[str, object], names: Sequence[str], kind: str = "nn.Conv2d"
) -> None:
    """Check that the keys of a mapping are names of layers; ValueError if not."""
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=3) or list(names)[:3]
            raise ValueError(
                f"{argument}: got {name!r}, accepted are names of {kind} in the model, such as "
                f"{near}"
            )


def _by_module(
    value: T | Mapping[str, T] | None, found: Sequence[tuple[str, nn.Conv2d]]
) -> dict[nn.Conv2d, T]:
    """A value for each convolution: those of a mapping, or the one for all."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        by_name = dict(found)
        return {by_name[name]: each for name, each in value.items()}
    return {conv: value for _, conv in found}


def _skipped(found: Sequence[tuple[str, nn.Conv2d]], request: Request) -> dict[nn.Conv2d, str]:
    """The convolutions that shall stay, with the reason: those of ``skip``, or by default the first
    larger than 1×1."""
    if request.skip is not None or request.named:
        skip = request.skip or ()
        named = [conv for n, conv in found if any(inside(n, module) for module in skip)]
        return dict.fromkeys(named, "named in skip")
    return skipped_by_default(found, request.order)


def skipped_by_default(found: Sequence[tuple[str, T]], order: Sequence[str] | None) -> dict[T, str]:
    """The first convolution larger than 1×1, with the reason.

    Args:
        order: names in the order of their calls; None where that is not known.
    """
    by_name: dict[str, Any] = dict(found)
    in_order = [by_name[name] for name in order or () if name in by_name]
    larger = [conv for conv in in_order or by_name.values() if _taps(conv) > 1]
    return dict.fromkeys(larger[:1], "the first convolution")


# What else in the model refers to a convolution --------------------------------------------------


def _half_tied(model: nn.Module, plans: Sequence[Plan]) -> list[Plan]:
    """The plans whose weight is shared with a module that is not decomposed alike: decomposing them
    would untie it."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)
    planned: dict[nn.Module, object] = {p.module: (p.group_sizes, p.width) for p in plans}
    return [
        plan
        for plan in plans
        if any(
            planned.get(other) != planned[plan.module] for other in owners.get(id(plan.weight), ())
        )
    ]


def captured(
    model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,)
) -> dict[nn.Module, str]:
    """The layers of some kinds that an attribute of some module holds inside a function: a bound
    method such as ``self.op = self.conv.forward``, a partial, or a closure. The function would go
    on calling the layer itself."""
    reasons: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        for attribute, value in own_attributes(module).items():
            where = f"{name}.{attribute}" if name else attribute
            for conv in _held(value, kinds, in_function=False, seen=set()):
                reasons.setdefault(conv, f"{where!r} holds a function that calls it")
    return reasons


def _held(
    value: object, kinds: tuple[type[nn.Module], ...], in_function: bool, seen: set[int]
) -> Iterator[nn.Module]:
    """The layers that functions in ``value`` refer to."""
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: Iterable[object] = ()
    if isinstance(value, kinds):
        if in_function:
            yield value
    elif isinstance(value, MethodType):
        in_function, inner = True, (value.__self__,)
    elif isinstance(value, partial):
        in_function, inner = True, (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, FunctionType):
        cells = (cell for cell in value.__closure__ or () if _is_set(cell))
        contents = [cell.cell_contents for cell in cells]
        in_function, inner = True, (*contents, *(value.__defaults__ or ()))
    elif isinstance(value, list | tuple | set):
        inner = value
    elif isinstance(value, dict):
        inner = value.values()
    for each in inner:
        yield from _held(each, kinds, in_function, seen)


def _is_set(cell: object) -> bool:
    try:
        cell.cell_contents  # type: ignore[attr-defined]  # noqa: B018
    except ValueError:
        return False
    return True


def _nothing_to_do(model: nn.Module, request: Request, left_alone: Mapping[str, str]) -> str:
    """The error where not one convolution can be decomposed: what was found, and why nothing
    fits."""
    got = f"model: got {type(model).__name__}"
    already = decomposed_layers(model)
    if already:
        got += f", a supernet of {len(already)} decomposed layers,"
    if not left_alone:
        return f"{got} without any nn.Conv2d, accepted are models to decompose"
    reasons = []
    for reason, names in names_by_reason(left_alone).items():
        shown = ", ".join(names[:NAMES_SHOWN])
        rest = len(names) - NAMES_SHOWN
        reasons.append(f"{reason}: {shown}" + (f" and {rest} more" if rest > 0 else ""))
    sizes = "" if request.named else f" with group_sizes={request.group_sizes}"
    return (
        f"{got} with {len(left_alone)} convolutions, of which none can be decomposed{sizes}. "
        + "; ".join(reasons)
    )
