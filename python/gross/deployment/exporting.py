"""From a supernet and a configuration to the network that is deployed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gross_kernels import GroSSConv2d, StructuredConv2d, pack

from ..arguments import check_flag, check_module
from ..copying import copy_model, plain_name, unwrapped
from ..devices import Graphed, check_device, check_graphs
from ..structured.plan import structured_layers
from ..supernet import check_configuration, decomposed_layers
from ..supernet import configuration as active_configuration
from . import graph
from .fusing import fuse
from .graph import tensors_of
from .plan import Report, choose
from .precision import Int8, read, warn_of_slow_weights
from .programs import build
from .quantising import quantise

#: Largest difference from the supernet's output, relative to the largest magnitude, that an export
#: may have: sums in another order.
TOLERANCE = 1e-3


def export(
    supernet: nn.Module,
    configuration: int | Sequence[int] | Mapping[str, int] | None = None,
    *,
    example: Tensor | None = None,
    kernels: bool = True,
    tune: bool = False,
    precision: str | Int8 = "float32",
    calibration: Tensor | Iterable[Any] | None = None,
    device: str | int | torch.device | None = None,
    graphs: bool = False,
) -> nn.Module:
    """The network that one configuration of a supernet is, with nothing of the others in it, as
    fast as this package can run it.

    Batch norms are folded into the layers, convolutions and linear layers before them (or after
    them, where no padding comes between). Activations (ReLU, ReLU6, SiLU, PReLU, LeakyReLU) and
    residual additions become the end of what they follow. Layers, convolutions, linear layers and
    pooling then run as programs (:mod:`gross_kernels.program`), in one call for all that follow
    one another. Each decomposed layer runs as the bottleneck that it is, or as the dense
    convolution that its product is, whichever is faster. What no program knows stays as it is:
    ``exported.report`` says what and why, and ``print(exported.report)`` shows the plan.

    With ``precision="int8"`` layers, convolutions and linear layers read and write 8 bits, as far
    as the error of the network's output allows; between a layer's pointwise convolutions it
    computes in float32. The report says of every step which range it has, what 8 bits cost it and
    the network's output, and which steps stay in float32. Inputs and outputs stay float32.

    Args:
        supernet: a network with decomposed layers, from one tensor to whatever it returns; left as
            it is. A network without any is exported likewise; a structured layer as its
            sum-pooling and its convolution.
        configuration: as :func:`gross.set_configuration` takes it; by default the active one.
        example: an input, of any batch size. The outputs of both networks are compared on it. With
            ``kernels`` it is needed; a network that flattens images larger than 1×1 will take
            other sizes no longer.
        kernels: run on this package's kernels. Without, each decomposed layer becomes three
            ``nn.Conv2d``, and the network needs PyTorch alone: ready for ONNX, and for training.
        tune: time how each layer can run on this machine and take the fastest, instead of
            predicting it.
        precision: "float32", which is whatever the network has; "int8"; or a
            :class:`gross.deployment.Int8` with settings, such as the bound on the error.
        calibration: for 8 bits, some dozens of inputs like those that the network will meet: a
            tensor, or an iterable of batches, labels with them or not.
        device: where the network is to run, such as "cuda"; by default where the supernet is.
        graphs: on a GPU, run as CUDA graphs, one for each shape of input (:class:`gross.Graphed`).

    Returns:
        A new network in evaluation mode, for inference.

    Raises:
        TypeError: if ``example`` is missing or no tensor, or calibration data is missing.
        ValueError: if the configuration is not the supernet's, the example does not fit the
            network, something in the network cannot be copied, or the device is not there; for 8
            bits, of a network that is not in float32 on a CPU or cannot be read as a graph, or
            with calibration data that does not fit the network or is not finite in it.
        RuntimeError: if the outputs for ``example`` differ by more than rounding.
    """
    layers = decomposed_layers(check_module("supernet", supernet))
    check_flag("kernels", kernels)
    check_flag("tune", tune)
    place = check_device(device) or next((p.device for p in supernet.parameters()), None)
    if place is not None:
        check_graphs(graphs, place)
    if configuration is None:
        configuration = active_configuration(supernet)
    sizes = [layer.group_sizes for layer in layers.values()]
    configuration = check_configuration(
        configuration, sizes, active_configuration(supernet), list(layers)
    )
    _check_example(supernet, example, kernels)
    lowering = _lowering(precision, calibration, kernels, example, place)
    if any(m.training for m in supernet.modules() if isinstance(m, _TRAINED)):
        warnings.warn(
            "supernet: got a network in training mode; what is exported is in evaluation mode, "
            "with batch norm's statistics so far and without dropout",
            stacklevel=2,
        )
    _check_norms(supernet)
    replaced: dict[int, nn.Module] = {
        id(layer): _single(layer, size) if kernels else layer.fold(size)
        for layer, size in zip(layers.values(), configuration, strict=True)
    }
    for structured in structured_layers(supernet).values():
        replaced[id(structured)] = _in_parts(structured, kernels)
    plain = copy_model(unwrapped(supernet), replaced, with_attributes=False).eval()
    for report in ("decomposition_report", "structured_report"):
        vars(plain).pop(report, None)
    exported = plain.to(place).to(memory_format=torch.channels_last)
    if example is not None:
        expected = _output(supernet, configuration, example)
        example = example.to(place)
        if kernels:
            exported = _deployed(exported, example, tune, expected, lowering)
        else:
            _compare(expected, exported, example)
    return Graphed(exported) if graphs else exported


#: What computes something else in training.
_TRAINED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


#: Settings for 8 bits and the images to calibrate on.
Lowering = tuple[Int8, list[Tensor]]


def _lowering(
    precision: object,
    calibration: Any,
    kernels: bool,
    example: Tensor | None,
    place: torch.device | None,
) -> Lowering | None:
    """What 8 bits need, checked; None for a network in its own precision."""
    if precision == "int8":
        precision = Int8()
    if not isinstance(precision, Int8):
        if precision != "float32":
            accepted = "'float32', 'int8' or a gross.deployment.Int8"
            kind = ValueError if isinstance(precision, str) else TypeError
            raise kind(f"precision: got {precision!r}, accepted is {accepted}")
        if calibration is not None:
            raise ValueError(
                "calibration: got data for precision 'float32', accepted is None; or 'int8'"
            )
        return None
    if not kernels:
        raise ValueError(
            "kernels: got False with precision 'int8', accepted is True; for other runtimes "
            "save_program(..., precision='int8') writes an .onnx file in 8 bits"
        )
    on = example.device if example is not None and place is None else place
    if example is None or example.dtype != torch.float32 or on is None or on.type != "cpu":
        found = None if example is None else f"{example.dtype} on {on}"
        raise ValueError(f"example: got {found}, accepted for 8 bits is float32 on a CPU")
    return precision, read(calibration, example)


def _deployed(
    plain: nn.Module, example: Tensor, tune: bool, expected: object, lowering: Lowering | None
) -> nn.Module:
    """The network as programs, with its report."""
    try:
        with torch.no_grad():
            traced = graph.trace(plain, example)
    except graph.UntraceableError as error:
        why = f"it could not be read as a graph ({error})"
        if lowering is not None:
            raise ValueError(f"supernet: {why}, which 8 bits need") from error
        return _finished(plain, Report([], {"the network": why}), expected, example)
    steps, left = fuse(traced)
    rows = choose(traced, steps, example, tune, lowering is not None)
    report = Report(list(rows.values()), left)
    exported = _finished(build(traced, steps).eval(), report, expected, example)
    if lowering is None:
        return exported
    settings, batches = lowering
    for i, batch in enumerate(batches):
        try:
            with torch.no_grad():
                exported(batch[:1].clone())
        except RuntimeError as error:
            raise ValueError(
                f"calibration[{i}]: got {tuple(batch.shape)}, accepted is what the network takes "
                f"like the example: {error}"
            ) from error
    lowered = quantise(traced, steps, batches, settings)
    inside = [replace(row, loss=lowered.losses.get(node)) for node, row in rows.items()]
    exported = build(traced, lowered.steps).eval()
    warn_of_slow_weights(exported.buffers())
    exported.report = Report(inside, left, lowered.error)  # type: ignore[assignment]
    return exported


def _finished(exported: nn.Module, report: Report, expected: object, example: Tensor) -> nn.Module:
    """The network with its report, if it computes what it should."""
    pack(exported)
    exported.report = report  # type: ignore[assignment]
    _compare(expected, exported, example)
    return exported


def _check_norms(supernet: nn.Module) -> None:
    """Warn of batch norms that have never seen a batch, nor were loaded."""
    unset = [
        plain_name(name)
        for name, module in supernet.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_mean is not None
        and module.running_var is not None
        and not bool(module.running_mean.any())
        and bool((module.running_var == 1).all())
    ]
    if unset:
        warnings.warn(
            f"supernet: got {len(unset)} batch norms whose statistics were never set (mean 0, "
            f"variance 1), {unset[0]} among them; they are exported as they are",
            stacklevel=3,
        )


def _check_example(supernet: nn.Module, example: Tensor | None, kernels: bool) -> None:
    if example is None:
        if kernels:
            raise TypeError(
                "example: got None, accepted is an input of the network (or kernels=False, for "
                "plain convolutions)"
            )
        return
    if not isinstance(example, Tensor):
        raise TypeError(f"example: got {type(example).__name__}, accepted is a torch.Tensor")
    parameter = next(supernet.parameters(), None)
    if parameter is not None and parameter.device != example.device:
        raise ValueError(
            f"example: got a tensor on {example.device}, accepted is one on {parameter.device}, "
            "where the network is"
        )


def _output(supernet: nn.Module, configuration: Sequence[int], example: Tensor) -> object:
    from ..evaluation import inference

    with inference(supernet, configuration):
        try:
            return supernet(example.clone())  # Which it may write into.
        except Exception as error:
            raise ValueError(
                f"example: got {tuple(example.shape)}, accepted is what the network takes: {error}"
            ) from error


def _single(layer: GroSSConv2d, size: int) -> GroSSConv2d:
    """The layer with one group size, and the sums of its terms as that one's terms."""
    folded = layer.fold(size)
    single = GroSSConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        1,
        layer.bias is not None,
        layer.padding_mode,
        layer.grouped[0].device,
        layer.grouped[0].dtype,
        group_sizes=(size,),
        width=layer.width,
        relu=layer.relu,
    )
    with torch.no_grad():
        for series, conv in zip(single._series(), folded, strict=False):
            series[0].copy_(conv.weight)
        if single.bias is not None and layer.bias is not None:
            single.bias.copy_(layer.bias)
    return single.eval()


def _in_parts(layer: Any, kernels: bool) -> nn.Module:
    """A structured layer as its sum-pooling and its convolution, which then runs as any other; in
    PyTorch alone, where that has no such pooling, as the dense layer that it equals."""
    if isinstance(layer, StructuredConv2d) and layer.foldable:
        return layer.fold(kernels).eval()
    return layer if kernels else layer.to_dense().eval()


def _compare(expected: object, exported: nn.Module, example: Tensor) -> None:
    """Raise RuntimeError where the two networks' outputs differ by more than rounding."""
    with torch.no_grad():
        found = exported(example.clone())
    tolerance = TOLERANCE if example.dtype not in (torch.bfloat16, torch.float16) else 0.1
    for wanted, got in zip(tensors_of(expected), tensors_of(found), strict=True):
        if not wanted.is_floating_point():
            continue
        wanted = wanted.to(got.device)
        error = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
        if not error <= tolerance and bool(wanted.isfinite().all()):
            raise RuntimeError(
                f"example: the exported network's outputs differ by {error:.2g} of the largest, "
                f"accepted is {tolerance}"
            )
