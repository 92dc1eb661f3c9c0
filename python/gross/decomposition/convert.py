"""Model surgery: the convolutions of a network become ``GroSSConv2d``, the series of equation 6
(section 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gross_kernels import GroSSConv2d

from ..arguments import check_choice, check_flag, check_int, check_module, check_type
from ..copying import check_open, copy_attributes, copy_model, sharing_parameters, unwrapped
from ..example import Example, check_call
from ..macs import MacsReport, macs
from ..report import error_console
from ..supernet import decomposed_layers
from .block_term import BlockTerm, measured
from .calibration import Calibration, second_moments
from .fit import FitSettings, Progress, fit_layers, shown_progress
from .plan import (
    GroupSizes,
    Plan,
    Request,
    Width,
    call_order,
    calls_of_originals,
    check_request,
    check_weights,
    make_plans,
)
from .refit import match_responses
from .report import DecomposedLayer, Decomposition

Method = Literal["als", "random"]
#: For a class of modules, a function from one of them to an equal plain convolution.
Convert = Mapping[type[nn.Module], Callable[[Any], nn.Module]]


def decompose(
    model: nn.Module,
    group_sizes: GroupSizes = (1, 4, 16, 32),
    *,
    width: Width | Mapping[str, Width] | None = None,
    skip: Collection[str] | None = None,
    keep_costlier: bool = False,
    convert: Convert | None = None,
    method: Method = "als",
    sweeps: int = 50,
    tolerance: float = 1e-5,
    ridge: float = 1e-2,
    warm_start: bool = True,
    seed: int = 0,
    workers: int | None = None,
    calibration: Tensor | Iterable[Any] | None = None,
    refit: bool = True,
    input_size: Sequence[int] | None = None,
    example: Example | None = None,
    quiet: bool = False,
) -> nn.Module:
    """Turn the convolutions of a network into ``GroSSConv2d``: all group sizes at once, as one
    series (equation 6).

    Dense ``nn.Conv2d`` larger than 1×1 are decomposed, wherever they stand in the model. One that
    stands in several places becomes one layer, and convolutions that share a weight share their
    terms. A parametrised convolution (weight norm and the like) is decomposed at its present
    weight. Whether a weight is trained, and attributes that were set on it, such as ``lr_mult``,
    pass to all its terms. Everything that is left alone is copied.

    Left alone, with the reason in the report, is a convolution with hooks, of a subclass with a
    forward of its own, with a ``forward`` replaced on the instance, or which some attribute of the
    model holds inside a function (``self.op = self.conv.forward``, a closure): the function would
    go on calling the convolution. With an ``example``, a forward pass also finds those that the
    model calls through functions stored elsewhere. What that pass does not reach is not found, nor
    is a bound method that it calls without the module.

    Args:
        model: the network; left as it is.
        group_sizes: each layer takes those that fit its width (see ``GroSSConv2d``) and cost fewer
            MACs than the convolution. Or a mapping from qualified names to group sizes, all of
            which must fit; then the named convolutions alone are decomposed, as asked.
        width: channels of the bottleneck, one int or (in, out), or a mapping from qualified names
            to those; by default the number of the convolution's input channels or of its output
            channels, whichever is smaller. A convolution of whose kernel this would keep less than
            a quarter of the dimensions (3→64) is left alone.
        skip: names of convolutions, or of modules around them, to leave alone; ``()`` skips none.
            By default the first convolution larger than 1×1 is, unless ``group_sizes`` is a
            mapping: the first that is called where ``input_size`` or ``example`` is given, the
            first that is registered otherwise.
        keep_costlier: keep group sizes that cost as many MACs as the convolution or more. The MACs
            compared are those for each output position of a large image.
        convert: for classes of modules, a function from one of them to an equal plain
            ``nn.Conv2d``, or to a ``nn.Sequential`` with one, which takes its place first. So
            subclasses are decomposed that compute their padding or standardise their weights; names
            are those of the result. See the second example.
        method: "als" fits every group size (:func:`gross.decomposition.block_term_series`);
            "random" draws fresh weights from torch's global generator, as a new layer does.
        sweeps, tolerance, ridge, warm_start, seed: of the fit.
        workers: how many layers are fitted at a time, each by one thread; by default
            ``torch.get_num_threads()``. The result is the same for any number.
        calibration: inputs of the model like those it will meet, some dozens and without labels: a
            tensor ``[N, …]``, or an iterable of model inputs, such as a loader, which is gone
            through twice (:class:`gross.decomposition.Calibration` has the rules). The kernels are
            then decomposed in the metric of the patches that they see. The model runs in
            evaluation mode, and its modes and batch norms are as before afterwards. A layer that
            no input reaches is decomposed without.
        refit: with ``calibration``, fit the last pointwise of every layer to the dense network's
            responses, by least squares (:mod:`gross.decomposition.refit`).
        input_size: shape of one input without the batch dimension, for a network that takes one
            tensor; with it the report counts MACs.
        example: in its place, what the network is called with, as in :func:`gross.macs`.
        quiet: show no progress and print no report. The report is the returned model's attribute
            ``decomposition_report`` in any case, a :class:`Decomposition`.

    Returns:
        A new model on the devices and in the dtypes of ``model``, every decomposed layer at its
        largest group size. Of a model that has decomposed layers already, these stay, and the
        report is of both. Of one inside ``torch.compile`` or ``DataParallel``, the model alone.

    Raises:
        TypeError: before any work, for an argument of another type.
        ValueError: before any work, if no convolution can be decomposed, one that is asked for by
            name cannot be as asked, the model cannot be copied or is a program of TorchScript or
            ``torch.export``, a weight is not finite, or there is
            no calibration data, or data that is not finite or that the model does not accept. What
            the model itself raises on the input is passed on with a note.
        ImportError: if rich is missing and ``quiet`` is False.

    Examples:
        A network whose forward takes two images and a flag::

            supernet = gross.decompose(flow, example=(first, second, True))

        timm's networks with TensorFlow's padding, and its normaliser-free ones::

            class Padding(nn.Module):
                def __init__(self, conv):
                    super().__init__()
                    self.geometry = (conv.kernel_size, conv.stride, conv.dilation)

                def forward(self, image):
                    return timm.layers.pad_same(image, *self.geometry)

            def plain(conv, weight, padding):
                made = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                                 padding, conv.dilation, conv.groups, conv.bias is not None)
                made.weight, made.bias = nn.Parameter(weight.detach()), conv.bias
                return made

            def padded(conv):  # timm.layers.Conv2dSame
                return nn.Sequential(Padding(conv), plain(conv, conv.weight, 0))

            def standardised(conv):  # timm.layers.ScaledStdConv2d
                rows = conv.weight.reshape(1, conv.out_channels, -1)
                gain = (conv.gain * conv.scale).view(-1)
                weight = F.batch_norm(rows, None, None, gain, None, True, 0.0, conv.eps)
                return plain(conv, weight.reshape_as(conv.weight), conv.padding)

            supernet = gross.decompose(model, convert={Conv2dSame: padded,
                                                       ScaledStdConv2d: standardised})
    """
    check_module("model", model)
    check_choice("method", method, get_args(Method))
    check_flag("keep_costlier", keep_costlier)
    check_flag("quiet", quiet)
    check_flag("refit", refit)
    if calibration is not None and method != "als":
        raise ValueError(f"calibration: got data for method {method!r}, accepted is 'als'")
    settings = FitSettings(sweeps, tolerance, ridge, warm_start, seed)
    if workers is not None:
        check_int("workers", workers, least=1)
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError(
            "model: got parameters that are not initialised yet, accepted is a model that has run "
            "once"
        )
    given = model = unwrapped(model)
    check_open(model)
    data = None
    if calibration is not None:
        data = Calibration(calibration, next(model.parameters()).device)
    call = check_call(model, input_size, example)
    if convert is not None:
        model = _converted(model, convert)
    request = check_request(model, Request(group_sizes, width, skip, keep_costlier))

    macs_before = None
    if call is not None:
        with calls_of_originals(model) as called:
            macs_before = macs(model, input_size, example=example)
        request = replace(request, called=called, order=call_order(macs_before))
    plans, left_alone = make_plans(model, request)

    fits: dict[int, list[BlockTerm]] = {}
    responses: Mapping[str, tuple[float, ...]] = {}
    if method == "als":
        check_weights(plans)
    count = len({id(plan.weight) for plan in plans})
    with shown_progress(count, quiet or method != "als") as progress:
        if method == "als":
            moments = {} if data is None else _moments(model, plans, data, progress)
            fits = fit_layers(plans, settings, workers, progress, moments)
        # Tensors made under inference mode could never be trained.
        with torch.inference_mode(False):
            layers = [_layer(plan, fits.get(id(plan.weight))) for plan in plans]
        _tie(plans, layers)
        # Whatever refers to a convolution, the copy refers to the layer instead.
        replaced = {id(plan.module): layer for plan, layer in zip(plans, layers, strict=True)}
        decomposed = copy_model(model, replaced)
        if data is not None:
            responses = match_responses(
                model, decomposed, data, refit=refit, progress=progress.calibration
            )

    described = [_describe(plan, fits.get(id(plan.weight)), macs_before) for plan in plans]
    if data is not None:
        described = [
            replace(
                layer_report,
                errors=tuple(_weight_error(plan.weight, layer, s) for s in plan.group_sizes),
                response_errors=responses.get(plan.name),
            )
            for layer_report, plan, layer in zip(described, plans, layers, strict=True)
        ]
    report = Decomposition(
        method,
        tuple(described),
        left_alone,
        sum(p.numel() for p in given.parameters()),
        sum(p.numel() for p in decomposed.parameters()),
    )
    earlier = vars(given).get("decomposition_report")
    if isinstance(earlier, Decomposition):
        report = _joined(earlier, report, decomposed)
    vars(decomposed)["decomposition_report"] = report
    if not quiet:
        error_console().print(report)
    return decomposed


def _converted(model: nn.Module, convert: Convert) -> nn.Module:
    """The model with plain convolutions in place of the modules of the given classes."""
    check_type("convert", convert, Mapping, "a mapping from classes of modules to functions")
    for kind, function in convert.items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module) and callable(function)):
            raise TypeError(
                f"convert: got {kind!r}: {function!r}, accepted are classes of modules and "
                "functions"
            )
    replaced: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        make_plain = next((f for kind, f in convert.items() if isinstance(module, kind)), None)
        if make_plain is None:
            continue
        made = make_plain(module)
        plain = (
            [each for each in made.modules() if type(each) is nn.Conv2d]
            if isinstance(made, nn.Module)
            else []
        )
        if len(plain) != 1:
            raise ValueError(
                f"convert: got {type(made).__name__} with {len(plain)} nn.Conv2d for {name!r}, "
                "accepted is one nn.Conv2d, or a nn.Sequential with one"
            )
        replaced[id(module)] = made.train(module.training)
    if not replaced:
        names = ", ".join(kind.__name__ for kind in convert)
        raise ValueError(f"convert: got {names}, accepted are classes of modules in the model")
    return sharing_parameters(model, replaced)


def _moments(
    model: nn.Module, plans: Sequence[Plan], calibration: Calibration, progress: Progress
) -> dict[int, Tensor]:
    """The second moments of the patches that meet each weight, by its ``id``."""
    convolutions = {plan.name: plan.module for plan in plans}
    by_name = second_moments(model, convolutions, calibration, progress=progress.calibration)
    moments: dict[int, Tensor] = {}
    for plan in plans:
        if plan.name in by_name:
            key = id(plan.weight)
            moments[key] = moments.get(key, 0) + by_name[plan.name]
    return moments


# The layers -------------------------------------------------------------------------------------


def _layer(plan: Plan, terms: Sequence[BlockTerm] | None) -> GroSSConv2d:
    """The layer of the fitted terms, or a freshly initialised one."""
    conv = plan.conv
    if terms is not None:
        layer = GroSSConv2d.from_bottlenecks(
            conv,
            {
                term.group_size: (term.pointwise_in, term.grouped, term.pointwise_out)
                for term in terms
            },
        )
    else:
        layer = GroSSConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=plan.weight.device,
            dtype=plan.weight.dtype,
            group_sizes=plan.group_sizes,
            width=plan.width,
        ).train(conv.training)
    for parameter in layer.parameters():
        source = plan.module.bias if parameter is layer.bias else plan.weight
        assert source is not None
        parameter.requires_grad_(source.requires_grad)
        copy_attributes(source, parameter)
    return layer


def _tie(plans: Sequence[Plan], layers: Sequence[GroSSConv2d]) -> None:
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
    plan: Plan, terms: Sequence[BlockTerm] | None, before: MacsReport | None
) -> DecomposedLayer:
    conv = plan.conv
    width_in, width_out = plan.width
    biases = 0 if conv.bias is None else conv.out_channels
    taps = plan.weight[0, 0].numel()
    first, last = width_in * conv.in_channels, conv.out_channels * width_out
    grouped = [width_out * s * taps for s in plan.group_sizes]
    macs_before = macs_after = None
    if before is not None:
        counted = next(layer for layer in before.layers if layer.name == plan.name)
        macs_before = counted.total
        macs_after = tuple(
            first * counted.input_pixels + (each + last + biases) * counted.output_pixels
            for each in grouped
        )
    return DecomposedLayer(
        name=plan.name,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        width=plan.width,
        group_sizes=plan.group_sizes,
        errors=None if terms is None else tuple(term.relative_error for term in terms),
        seconds=sum(term.seconds for term in terms or ()),
        parameters_before=plan.weight.numel() + biases,
        parameters=tuple(first + each + last + biases for each in grouped),
        macs_before=macs_before,
        macs=macs_after,
    )


def _weight_error(weight: Tensor, layer: GroSSConv2d, group_size: int) -> float:
    """``‖X − X̂‖/‖X‖`` of the kernel that the layer has at a group size."""
    state = layer.fold(group_size).state_dict()
    p, r, q = (state[f"{i}.weight"] for i in range(3))
    return measured(weight.detach(), p, r, q).relative_error


def _joined(earlier: Decomposition, new: Decomposition, supernet: nn.Module) -> Decomposition:
    """The report of a network that was decomposed in two turns."""
    by_name = {layer.name: layer for layer in (*earlier.layers, *new.layers)}
    return replace(
        new,
        method=" and ".join(dict.fromkeys((earlier.method, new.method))),
        layers=tuple(by_name[name] for name in decomposed_layers(supernet) if name in by_name),
        parameters_before=earlier.parameters_before,
    )
