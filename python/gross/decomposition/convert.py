"""Model surgery: the convolutions of a network become ``GroSSConv2d``, the series of equation 6
(section 4.3)."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gross_kernels import GroSSConv2d
from gross_kernels.functional import pair
from gross_kernels.series import check_group_sizes

from ..extras import from_extra
from ..macs import MacsReport, macs
from ..report import error_console, errors_in_short, short, size, text
from .block_term import BlockTerm, block_term_series

if TYPE_CHECKING:
    from rich.console import Group

Width = int | tuple[int, int]
Method = Literal["als", "random"]
#: Called with the layer's position, its name and a line about the fit.
Show = Callable[[int, str, str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class DecomposedLayer:
    """What was done to one convolution.

    Attributes:
        name: qualified name, the first one of a convolution that is registered more than once.
        in_channels, out_channels, kernel_size, stride: the convolution's.
        width: channels of the bottleneck (in, out).
        group_sizes: those that the layer has, ascending.
        errors: ‖X − X̂‖/‖X‖ of the kernel X at each group size; None if nothing was fitted.
        seconds: how long the fit took.
        parameters_before: of the convolution.
        parameters: of the bottleneck at each group size, once it is exported.
        macs_before, macs: multiply–accumulates, likewise, over all calls; None if no input size was
            given.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    width: tuple[int, int]
    group_sizes: tuple[int, ...]
    errors: tuple[float, ...] | None
    seconds: float
    parameters_before: int
    parameters: tuple[int, ...]
    macs_before: int | None
    macs: tuple[int, ...] | None


@dataclass(frozen=True)
class Decomposition:
    """What :func:`decompose` did. Printable: a table of the layers, and the convolutions left alone
    with the reasons.

    Attributes:
        method: "als" or "random".
        layers: the decomposed layers, in network order.
        left_alone: why a convolution was not decomposed, by qualified name.
        parameters_before, parameters: of the whole network; of the supernet, with the terms of all
            group sizes.
    """

    method: str
    layers: tuple[DecomposedLayer, ...]
    left_alone: dict[str, str]
    parameters_before: int
    parameters: int

    def __rich__(self) -> Group:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table

        title = f"{len(self.layers)} convolutions decomposed, method {self.method!r}"
        table = Table(box=SIMPLE_HEAD, title=title, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in ("layer", "convolution", "width"):
            table.add_column(heading, no_wrap=True)
        for heading in ("group sizes", "relative error"):
            table.add_column(heading)
        for heading in ("seconds", "parameters", "MACs"):
            table.add_column(heading, no_wrap=True, justify="right")
        for layer in self.layers:
            table.add_row(
                layer.name or "(the model)",
                f"{layer.in_channels}→{layer.out_channels} {size(layer.kernel_size)}"
                + ("" if layer.stride == (1, 1) else f" /{size(dict.fromkeys(layer.stride))}"),
                "→".join(map(str, dict.fromkeys(layer.width))),
                " ".join(map(str, layer.group_sizes)),
                errors_in_short(layer.errors),
                f"{layer.seconds:.1f}",
                _change(layer.parameters_before, layer.parameters),
                _change(layer.macs_before, layer.macs),
            )
        totals = f"{short(self.parameters_before)} parameters before, {short(self.parameters)} in the supernet"
        names_by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            names_by_reason.setdefault(reason, []).append(name or "(the model)")
        alone = [
            f"left alone, {reason}: {', '.join(names)}" for reason, names in names_by_reason.items()
        ]
        return Group(table, totals, *alone)

    def __str__(self) -> str:
        return text(self)


def decompose(
    model: nn.Module,
    group_sizes: Sequence[int] | Mapping[str, Sequence[int]] = (1, 4, 16, 32),
    *,
    width: Width | Mapping[str, Width] | None = None,
    skip: Collection[str] | None = None,
    method: Method = "als",
    sweeps: int = 50,
    tolerance: float = 1e-5,
    ridge: float = 1e-2,
    warm_start: bool = True,
    seed: int = 0,
    input_size: Sequence[int] | None = None,
    quiet: bool = False,
) -> nn.Module:
    """Turn the convolutions of a network into ``GroSSConv2d``: all group sizes at once, as one
    series (equation 6).

    Dense ``nn.Conv2d`` larger than 1×1 are decomposed, wherever they stand in the model. One that
    stands in several places becomes one layer, and convolutions that share a weight share their
    terms. A parametrised convolution (weight norm and the like) is decomposed at its present
    weight. A convolution with hooks, or of a subclass with a forward of its own, is left alone.
    Everything that is left alone is copied.

    Args:
        model: the network; left as it is.
        group_sizes: each layer takes those that fit its width (see ``GroSSConv2d``). Or a mapping
            from qualified names to group sizes, all of which must fit; then the named convolutions
            alone are decomposed.
        width: channels of the bottleneck, one int or (in, out), or a mapping from qualified names
            to those; by default the convolution's input channels.
        skip: names of convolutions, or of modules around them, to leave alone; ``()`` skips none.
            By default the first convolution is, unless ``group_sizes`` is a mapping.
        method: "als" fits every group size (:func:`gross.decomposition.block_term_series`); "random"
            draws fresh weights from torch's global generator, as a new layer does.
        sweeps, tolerance, ridge, warm_start, seed: of the fit.
        input_size: shape of one input without the batch dimension; with it the report counts MACs.
        quiet: show no progress and print no report. The report is the returned model's attribute
            ``decomposition_report`` in any case, a :class:`Decomposition`.

    Returns:
        A new model on the devices and in the dtypes of ``model``, every decomposed layer at its
        largest group size.

    Raises:
        ValueError: before any work, if the model has no convolution, the group sizes fit none, a
            convolution asked for by name cannot be decomposed as asked, or a weight is not finite.
        TypeError: if ``model`` is not a module.
        ImportError: if rich is missing and ``quiet`` is False.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, accepted is a torch.nn.Module")
    if method not in get_args(Method):
        raise ValueError(
            f"method: got {method!r}, accepted are {', '.join(map(repr, get_args(Method)))}"
        )
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError(
            "model: got parameters that are not initialised yet, accepted is a model that has run once"
        )
    plans, left_alone = _plan(model, group_sizes, width, skip)
    if method == "als":
        _check_weights(plans)
    macs_before = None if input_size is None else macs(model, input_size)
    fits: dict[int, list[BlockTerm]] = {}
    layers: list[GroSSConv2d] = []
    with nullcontext(_show_nothing) if quiet else _progress_bar(len(plans)) as show:
        for i, plan in enumerate(plans):
            show(i, plan.name, "")
            if method == "als" and id(plan.weight) not in fits:
                fits[id(plan.weight)] = block_term_series(
                    plan.weight.detach().float()
                    if plan.weight.dtype.itemsize < 4
                    else plan.weight.detach(),
                    plan.group_sizes,
                    width=plan.width,
                    sweeps=sweeps,
                    tolerance=tolerance,
                    ridge=ridge,
                    warm_start=warm_start,
                    seed=seed,
                    progress=partial(_show_sweep, show, i, plan.name),
                )
            layers.append(_layer(plan, fits.get(id(plan.weight))))
    _tie(plans, layers)
    # Whatever refers to a convolution, the copy refers to the layer instead.
    decomposed = copy.deepcopy(
        model, {id(plan.conv): layer for plan, layer in zip(plans, layers, strict=True)}
    )
    macs_after = None if input_size is None else macs(decomposed, input_size)
    report = Decomposition(
        method,
        tuple(
            _describe(plan, fits.get(id(plan.weight)), macs_before, macs_after) for plan in plans
        ),
        left_alone,
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in decomposed.parameters()),
    )
    vars(decomposed)["decomposition_report"] = report
    if not quiet:
        error_console().print(report)
    return decomposed


# Which convolutions, and how --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Plan:
    """One convolution to decompose. ``weight`` is taken once: a parametrised convolution makes a
    new one each time."""

    name: str
    conv: nn.Conv2d
    weight: Tensor
    group_sizes: tuple[int, ...]
    width: tuple[int, int]


def _plan(
    model: nn.Module,
    group_sizes: Sequence[int] | Mapping[str, Sequence[int]],
    width: Width | Mapping[str, Width] | None,
    skip: Collection[str] | None,
) -> tuple[list[_Plan], dict[str, str]]:
    """The convolutions to decompose, in network order, and why the others are left alone."""
    by_name = {
        n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Conv2d)
    }
    names: dict[nn.Conv2d, str] = {}
    for name, conv in by_name.items():
        names.setdefault(conv, name)
    if not names:
        raise ValueError(
            f"model: got {type(model).__name__} without any nn.Conv2d, accepted are models to decompose"
        )
    if isinstance(group_sizes, Mapping):
        sizes_of = _by_convolution("group_sizes", group_sizes, by_name)
        skipped = _skipped(by_name, skip or ())
    else:
        sizes_of = dict.fromkeys(names, _check_nesting(group_sizes))
        skipped = (
            {next(iter(names)): "the first convolution"}
            if skip is None
            else _skipped(by_name, skip)
        )
    width_of = (
        _by_convolution("width", width, by_name)
        if isinstance(width, Mapping)
        else dict.fromkeys(names, width)
    )
    plans: list[_Plan] = []
    left_alone: dict[str, str] = {}
    misfits: list[str] = []
    for conv, name in names.items():
        reason = skipped.get(conv) or _ineligible(conv)
        if conv not in sizes_of:
            left_alone[name] = "not named in group_sizes"
        elif reason is not None:
            left_alone[name] = reason
            if isinstance(group_sizes, Mapping) and conv not in skipped:
                raise ValueError(f"group_sizes: {name!r} cannot be decomposed: {reason}")
        else:
            given = width_of.get(conv)
            argument = f"width[{name!r}]" if isinstance(width, Mapping) else "width"
            widths = pair(argument, conv.in_channels if given is None else given)
            if isinstance(group_sizes, Mapping):
                fitting = check_group_sizes(sizes_of[conv], *widths, name=f"group_sizes[{name!r}]")
            else:
                fitting = tuple(
                    s
                    for s in sizes_of[conv]
                    if widths[0] % s == 0 and widths[1] % (widths[0] // s) == 0
                )
            if fitting:
                plans.append(_Plan(name, conv, conv.weight, fitting, widths))
            else:
                left_alone[name] = f"none of the group sizes fits its width {widths[0]}→{widths[1]}"
                misfits.append(f"{name!r} of width {widths[0]}→{widths[1]}")
    if misfits and not plans:
        raise ValueError(
            f"group_sizes: got {tuple(group_sizes)}, of which none fits {', '.join(misfits)}"
        )
    for plan in _half_tied(model, plans):
        reason = "its weight is shared with a layer that is not decomposed alike"
        if isinstance(group_sizes, Mapping):
            raise ValueError(f"group_sizes: {plan.name!r} cannot be decomposed: {reason}")
        plans.remove(plan)
        left_alone[plan.name] = reason
    return plans, left_alone


def _check_nesting(group_sizes: Sequence[int]) -> tuple[int, ...]:
    """Check what can be checked without a layer: ints, ascending, each dividing the next."""
    sizes = group_sizes if isinstance(group_sizes, Sequence) else ()
    width = math.prod(s for s in sizes if isinstance(s, int))
    return check_group_sizes(group_sizes, width, width)


def _by_convolution(
    argument: str, values: Mapping[str, T], by_name: Mapping[str, nn.Conv2d]
) -> dict[nn.Conv2d, T]:
    for name in values:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=3) or list(by_name)[:3]
            raise ValueError(
                f"{argument}: got {name!r}, accepted are names of nn.Conv2d in the model, such as {near}"
            )
    return {by_name[name]: value for name, value in values.items()}


def _skipped(by_name: Mapping[str, nn.Conv2d], skip: Collection[str]) -> dict[nn.Conv2d, str]:
    """The convolutions that ``skip`` names, with the reason."""
    if isinstance(skip, str):
        raise TypeError(f"skip: got the string {skip!r}, accepted is a collection of names")
    skipped = {}
    for name in skip:
        inside = [conv for n, conv in by_name.items() if n == name or n.startswith(f"{name}.")]
        if not inside:
            raise ValueError(
                f"skip: got {name!r}, accepted are names of nn.Conv2d, or of modules around them"
            )
        skipped.update(dict.fromkeys(inside, "named in skip"))
    return skipped


def _ineligible(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot be decomposed, None if it can."""
    if (
        type(conv).forward is not nn.Conv2d.forward
        or type(conv)._conv_forward is not nn.Conv2d._conv_forward
    ):
        return f"{type(conv).__name__} has a forward of its own"
    if conv.groups != 1:
        return (
            "depthwise"
            if conv.groups == conv.in_channels
            else f"grouped already, {conv.groups} groups"
        )
    if conv.kernel_size == (1, 1):
        return "1×1"
    if (
        conv._forward_hooks
        or conv._forward_pre_hooks
        or conv._backward_hooks
        or conv._backward_pre_hooks
    ):
        return "it has hooks, which the layer in its place would lose"
    if not conv.weight.is_floating_point():
        return f"its dtype is {conv.weight.dtype}"
    return None


def _half_tied(model: nn.Module, plans: Sequence[_Plan]) -> list[_Plan]:
    """The plans whose weight is shared with a module that is not decomposed alike: decomposing them
    would untie it."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)
    planned: dict[nn.Module, object] = {plan.conv: (plan.group_sizes, plan.width) for plan in plans}
    return [
        plan
        for plan in plans
        if any(
            planned.get(other) != planned[plan.conv] for other in owners.get(id(plan.weight), ())
        )
    ]


def _check_weights(plans: Sequence[_Plan]) -> None:
    for plan in plans:
        if plan.weight.is_meta:
            raise ValueError(
                f"model: got {plan.name!r} on the meta device, which has no values; accepted there is method='random'"
            )
        if not torch.isfinite(plan.weight).all():
            raise ValueError(
                f"model: got a weight of {plan.name!r} that is not finite, accepted are finite weights"
            )


# The layers -------------------------------------------------------------------------------------


def _layer(plan: _Plan, terms: Sequence[BlockTerm] | None) -> GroSSConv2d:
    """The layer of the fitted terms, or a freshly initialised one."""
    conv = plan.conv
    if terms is not None:
        return GroSSConv2d.from_bottlenecks(
            conv,
            {
                term.group_size: (term.pointwise_in, term.grouped, term.pointwise_out)
                for term in terms
            },
        )
    return GroSSConv2d(
        conv.in_channels,
        conv.out_channels,
        pair("kernel_size", conv.kernel_size),
        pair("stride", conv.stride),
        conv.padding if isinstance(conv.padding, str) else pair("padding", conv.padding, least=0),
        pair("dilation", conv.dilation),
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device=plan.weight.device,
        dtype=plan.weight.dtype,
        group_sizes=plan.group_sizes,
        width=plan.width,
    ).train(conv.training)


def _tie(plans: Sequence[_Plan], layers: Sequence[GroSSConv2d]) -> None:
    """Let layers whose convolutions share a weight share their terms."""
    first: dict[int, GroSSConv2d] = {}
    for plan, layer in zip(plans, layers, strict=True):
        owner = first.setdefault(id(plan.weight), layer)
        layer.pointwise_in, layer.grouped, layer.pointwise_out = (
            owner.pointwise_in,
            owner.grouped,
            owner.pointwise_out,
        )


# The report -------------------------------------------------------------------------------------


def _describe(
    plan: _Plan,
    terms: Sequence[BlockTerm] | None,
    before: MacsReport | None,
    after: MacsReport | None,
) -> DecomposedLayer:
    conv = plan.conv
    width_in, width_out = plan.width
    biases = 0 if conv.bias is None else conv.out_channels
    kernel = plan.weight[0, 0].numel()
    pointwise = width_in * conv.in_channels + conv.out_channels * width_out
    macs_before = (
        None
        if before is None
        else next(layer.total for layer in before.layers if layer.name == plan.name)
    )
    macs_after = (
        None if after is None else next(layer for layer in after.layers if layer.name == plan.name)
    )
    return DecomposedLayer(
        plan.name,
        conv.in_channels,
        conv.out_channels,
        pair("kernel_size", conv.kernel_size),
        pair("stride", conv.stride),
        plan.width,
        plan.group_sizes,
        None if terms is None else tuple(term.relative_error for term in terms),
        sum(term.seconds for term in terms or ()),
        plan.weight.numel() + biases,
        tuple(pointwise + width_out * s * kernel + biases for s in plan.group_sizes),
        macs_before,
        None
        if macs_after is None
        else tuple(macs_after.fixed + macs_after.per_group_size * s for s in plan.group_sizes),
    )


def _change(before: int | None, after: Sequence[int] | None) -> str:
    if before is None or after is None:
        return ""
    return f"{short(before)}→" + "–".join(dict.fromkeys((short(after[0]), short(after[-1]))))


def _show_sweep(
    show: Show, position: int, name: str, group_size: int, sweep: int, error: float
) -> None:
    show(position, name, f"group size {group_size}, sweep {sweep}: error {error:.4f}")


def _show_nothing(position: int, name: str, line: str) -> None:
    pass


@contextmanager
def _progress_bar(count: int) -> Iterator[Show]:
    """A bar on the error stream: how many layers are done, and where the fit of the present one
    is."""
    with from_extra():
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=error_console()) as progress:
        task = progress.add_task("", total=count)
        yield lambda position, name, line: progress.update(
            task, completed=position, description=f"{name} {line}"
        )
        progress.update(task, completed=count, description="")
