"""Multiply–accumulates (MACs) of a whole network: closed form in its configuration, once the
spatial sizes are known.

The counting rule, which reproduces the papers' tables:

- a convolution or linear layer counts its multiply–accumulates, a convolution with a bias one more
  per output element;
- a batch norm counts two per output element;
- biases of linear layers, activations, pooling and the sums of a series count nothing;
- of a decomposed layer, the first pointwise convolution counts at the input's resolution, the
  grouped and the last pointwise one at the output's;
- of a structured layer the small convolution counts, and its sum-pooling, as all pooling, nothing;
  ``gross.structured`` reports additions and multiplications apart;
- where a decomposed layer pads with other values than zeros, its first pointwise runs, and counts,
  on the padded map, unless that has more than three times the pixels.

So every count is affine in the group sizes, ``fixed + Σ_i per_group_size_i · s_i``. Layers are what
PyTorch calls modules: a convolution that a model computes by calling a function is not seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gross_kernels import (
    GroSSConv2d,
    SeriesConv2d,
    StructuredConv2d,
    StructuredConv3d,
    StructuredLinear,
)
from gross_kernels.geometry import first_size
from gross_kernels.program import Program
from gross_kernels.series import convolution_macs

from .arguments import check_module
from .copying import check_open, closed_parts, plain_name, unwrapped
from .example import Example, check_call, run_copy
from .report import size, text
from .supernet import Configuration, check_configuration, decomposed_layers

if TYPE_CHECKING:
    from rich.table import Table

COUNTED = (
    GroSSConv2d,
    SeriesConv2d,
    StructuredConv2d,
    StructuredConv3d,
    StructuredLinear,
    _ConvNd,
    nn.Linear,
    _BatchNorm,
    Program,
)


@dataclass(frozen=True)
class LayerMacs:
    """MACs of one layer in one call of the network, over all its own calls: ``fixed +
    per_group_size · group_size``.

    Attributes:
        name: qualified name, the first one of a layer that is registered more than once.
        kind: the layer's class.
        output_size: shape of its output without the batch dimension, at the first call.
        calls: how often the forward pass calls it; a layer that is not called as a module counts
            nothing.
        fixed: MACs that are the same at every group size.
        per_group_size: MACs of the grouped convolution per input channel of a group.
        group_size: the one that is counted. None for a layer that is not decomposed, which counts
            as fixed.
        first_call: how many other layers were called before it; None if it was not called.
        in_8_bits: those of ``fixed`` that multiply 8 bits, as exported programs may.
        input_pixels, output_pixels: spatial positions over all its calls and all their images, of
            the input with its border where a decomposed layer in its place pads first; 0 for a
            layer without any.
    """

    name: str
    kind: str
    output_size: tuple[int, ...] = ()
    calls: int = 0
    fixed: int = 0
    per_group_size: int = 0
    group_size: int | None = None
    first_call: int | None = None
    input_pixels: int = 0
    output_pixels: int = 0
    in_8_bits: int = 0

    @property
    def grouped(self) -> int:
        return self.per_group_size * (self.group_size or 0)

    @property
    def total(self) -> int:
        return self.fixed + self.grouped


@dataclass(frozen=True)
class MacsReport:
    """MACs of a network for one call, in one configuration. Printable: a table of layers.

    Attributes:
        input_size: shape of the one input, without the batch dimension; None where an example was
            counted, with all the images that it holds.
        configuration: one group size per decomposed layer in network order; empty for a network
            that is not decomposed.
        group_sizes: the sizes that each decomposed layer can take.
        fixed: MACs that are the same in every configuration.
        per_group_size: MACs of each decomposed layer per unit of its group size.
    """

    input_size: tuple[int, ...] | None
    configuration: Configuration
    group_sizes: tuple[tuple[int, ...], ...]
    fixed: int
    per_group_size: tuple[int, ...]
    _counts: tuple[LayerMacs, ...] = field(repr=False)

    @property
    def grouped(self) -> int:
        """MACs of the grouped convolutions alone (the column "G.Conv" of the paper's tables)."""
        return sum(
            slope * s for slope, s in zip(self.per_group_size, self.configuration, strict=True)
        )

    @property
    def total(self) -> int:
        """MACs of the whole network."""
        return self.fixed + self.grouped

    @property
    def in_8_bits(self) -> int:
        """Of the total, what multiplies 8 bits; the others multiply floats."""
        return sum(count.in_8_bits for count in self._counts)

    @property
    def layers(self) -> tuple[LayerMacs, ...]:
        """The counted layers in network order, at this configuration."""
        sizes = iter(self.configuration)
        return tuple(
            count if count.group_size is None else replace(count, group_size=next(sizes))
            for count in self._counts
        )

    def with_configuration(
        self, configuration: int | Sequence[int] | Mapping[str, int]
    ) -> MacsReport:
        """The same network in another configuration. Takes microseconds: nothing is run.

        Args:
            configuration: as :func:`gross.set_configuration` takes it.

        Raises:
            TypeError, ValueError: if the configuration is not one of the network's.
        """
        # The names are looked up where they are needed alone: searches ask this a million times.
        names = (
            [layer.name for layer in self._counts if layer.group_size is not None]
            if isinstance(configuration, Mapping)
            else None
        )
        checked = check_configuration(configuration, self.group_sizes, self.configuration, names)
        return replace(self, configuration=checked)

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            box=SIMPLE_HEAD,
            title="MACs for the example"
            if self.input_size is None
            else f"MACs for one input of {size(self.input_size)}",
            show_footer=True,
        )
        table.add_column("layer", "total")
        table.add_column("kind")
        table.add_column("output", justify="right")
        table.add_column("group size", justify="right")
        table.add_column("grouped", f"{self.grouped:,}", justify="right")
        table.add_column("MACs", f"{self.total:,}", justify="right")
        lowered = self.in_8_bits > 0
        if lowered:
            table.add_column("in 8 bits", f"{self.in_8_bits:,}", justify="right")
        for layer in self.layers:
            table.add_row(
                layer.name or "(the model)",
                layer.kind if layer.calls == 1 else f"{layer.kind} ({layer.calls} calls)",
                size(layer.output_size),
                "" if layer.group_size is None else str(layer.group_size),
                "" if layer.group_size is None else f"{layer.grouped:,}",
                f"{layer.total:,}",
                *([f"{layer.in_8_bits:,}"] if lowered else []),
            )
        return table

    def __str__(self) -> str:
        return text(self)


def macs(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    configuration: int | Sequence[int] | Mapping[str, int] | None = None,
    *,
    example: Example | None = None,
) -> MacsReport:
    """Count the multiply–accumulates of ``model`` for one call by the rule above.

    The spatial sizes come from one forward pass of a copy of the model on the meta device, which
    computes nothing and holds no weights; where the model cannot run there, because it looks at
    values, from one on its own device. Other configurations then cost microseconds:
    :meth:`MacsReport.with_configuration`.

    Args:
        model: any network, decomposed or not; of one inside ``torch.compile`` or ``DataParallel``,
            the network itself is counted.
        input_size: shape of one input without the batch dimension, such as ``(3, 224, 224)``, for a
            network that takes one tensor of floating point.
        configuration: as :func:`gross.set_configuration` takes it; by default the active one.
        example: what the network is called with, in place of ``input_size``: a tensor, or a list
            (of images, say), is its one argument, a tuple its positional arguments, a dictionary
            its named ones. All images in it count.

    Returns:
        The report: ``total``, ``grouped``, ``layers``.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for an input size that is not made of positive ints, a configuration that does
            not fit, none or both of ``input_size`` and ``example``, or a model that cannot be
            copied, or parts of which are programs of TorchScript or ``torch.export``. What the
            model itself raises on the input is passed on with a note.
    """
    model = unwrapped(check_module("model", model))
    check_open(model)
    for name, program in closed_parts(model).items():
        raise ValueError(
            f"model: got {name!r}, {program}, whose layers are no modules to count; accepted is a "
            "network with what it was made from in its place"
        )
    call = check_call(model, input_size, example)
    if call is None:
        raise ValueError("input_size: got None, accepted is the shape of one input, or an example")
    layers = decomposed_layers(model)
    active = tuple(layer.group_size for layer in layers.values())
    sizes = tuple(layer.group_sizes for layer in layers.values())
    if configuration is not None:
        active = check_configuration(configuration, sizes, active, list(layers))
    counts = run_copy(model, call, _counting)
    return MacsReport(
        call.input_size,
        active,
        sizes,
        sum(count.fixed for count in counts.values()),
        tuple(counts[name].per_group_size for name in layers),
        tuple(counts.values()),
    )


def _counting(model: nn.Module) -> dict[str, LayerMacs]:
    """Counts by qualified name, which forward hooks fill in while the model runs."""
    counts: dict[str, LayerMacs] = {}
    for name, module in model.named_modules():
        if isinstance(module, COUNTED):
            name = plain_name(name)
            group_size = module.group_size if isinstance(module, GroSSConv2d) else None
            counts[name] = LayerMacs(name, type(module).__name__, group_size=group_size)
            module.register_forward_hook(partial(_add_call, counts, name), with_kwargs=True)
    return counts


def _add_call(
    counts: dict[str, LayerMacs],
    name: str,
    layer: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    output: Tensor,
) -> None:
    """Forward hook: add one call of ``layer`` to its count."""
    count = counts[name]
    if isinstance(layer, Program):
        output = output[-1]
        shapes = [tensor.shape for tensor in args]
        fixed, per_group_size, in_8_bits = layer.macs(shapes), 0, layer.macs_in_8_bits(shapes)
        input_pixels, output_pixels = 0, 0
    else:
        in_8_bits = 0
        input = args[0] if args else kwargs["input"]
        fixed, per_group_size = _macs_of_call(layer, input, output)
        input_pixels, output_pixels = _pixels(layer, input, output)
    first_call = count.first_call
    if first_call is None:
        first_call = sum(other.calls > 0 for other in counts.values())
    counts[name] = replace(
        count,
        output_size=count.output_size or tuple(output.shape[1:]),
        calls=count.calls + 1,
        fixed=count.fixed + fixed,
        per_group_size=count.per_group_size + per_group_size,
        first_call=first_call,
        input_pixels=count.input_pixels + input_pixels,
        output_pixels=count.output_pixels + output_pixels,
        in_8_bits=count.in_8_bits + in_8_bits,
    )


def _pixels(layer: nn.Module, input: Tensor, output: Tensor) -> tuple[int, int]:
    """Spatial positions of a convolution's input and output, of all images."""
    if isinstance(layer, nn.Linear | StructuredLinear | _BatchNorm):
        return 0, 0
    assert isinstance(
        layer, GroSSConv2d | SeriesConv2d | StructuredConv2d | StructuredConv3d | _ConvNd
    )
    pixels = input.numel() // layer.in_channels
    if isinstance(layer, nn.Conv2d) and pixels:
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        size, sides = input.shape[-2:], ((top, bottom), (left, right))
        pixels = pixels // math.prod(size) * math.prod(first_size(size, sides, layer.padding_mode))
    return pixels, output.numel() // layer.out_channels


def _macs_of_call(layer: nn.Module, input: Tensor, output: Tensor) -> tuple[int, int]:
    """MACs of one call for all its images: those that do not depend on the group size, and those
    per unit of group size."""
    elements = output.numel()
    if isinstance(layer, GroSSConv2d | SeriesConv2d):
        image = layer.out_channels * math.prod(output.shape[-2:])
        images = elements // image if image else 0
        total = images * layer.macs(input.shape[-2:])
        if isinstance(layer, SeriesConv2d):
            return total, 0
        per_group_size = images * convolution_macs(
            layer.width[1], 1, layer.kernel_size, output.shape[-2:]
        )
        return total - per_group_size * layer.group_size, per_group_size
    if isinstance(layer, _BatchNorm):
        return 2 * elements, 0
    if isinstance(layer, nn.Linear):
        return elements * layer.in_features, 0
    if isinstance(layer, StructuredLinear):
        return elements * layer.weight.shape[1], 0
    assert isinstance(layer, StructuredConv2d | StructuredConv3d | _ConvNd)
    bias = elements if layer.bias is not None else 0
    # A transposed convolution spreads each input element over the outputs, where a convolution
    # gathers each output from the inputs.
    spread = input.numel() if isinstance(layer, _ConvTransposeNd) else elements
    return spread * math.prod(layer.weight.shape[1:]) + bias, 0
