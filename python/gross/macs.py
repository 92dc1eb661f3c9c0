"""Multiply–accumulates (MACs) of a whole network: closed form in its configuration, once the
spatial sizes are known.

The counting rule, which reproduces the papers' tables:

- a convolution or linear layer counts its multiply–accumulates, a convolution with a bias one more
  per output element;
- a batch norm counts two per output element;
- biases of linear layers, activations, pooling and the sums of a series count nothing;
- of a decomposed layer, the first pointwise convolution counts at the input's resolution, the
  grouped and the last pointwise one at the output's.

So every count is affine in the group sizes, ``fixed + Σ_i per_group_size_i · s_i``. Layers are what
PyTorch calls modules: a convolution that a model computes by calling a function is not seen."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gross_kernels import GroSSConv2d, SeriesConv2d, use_backend
from gross_kernels.series import convolution_macs

from .report import size, text
from .supernet import Configuration, check_configuration, decomposed_layers

if TYPE_CHECKING:
    from rich.table import Table

COUNTED = (GroSSConv2d, SeriesConv2d, _ConvNd, nn.Linear, _BatchNorm)


@dataclass(frozen=True)
class LayerMacs:
    """MACs of one layer for one input, over all its calls: ``fixed + per_group_size · group_size``.

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
    """

    name: str
    kind: str
    output_size: tuple[int, ...] = ()
    calls: int = 0
    fixed: int = 0
    per_group_size: int = 0
    group_size: int | None = None

    @property
    def grouped(self) -> int:
        return self.per_group_size * (self.group_size or 0)

    @property
    def total(self) -> int:
        return self.fixed + self.grouped


@dataclass(frozen=True)
class MacsReport:
    """MACs of a network for one input, in one configuration. Printable: a table of layers.

    Attributes:
        input_size: shape of the input, without the batch dimension.
        configuration: one group size per decomposed layer in network order; empty for a network
            that is not decomposed.
        group_sizes: the sizes that each decomposed layer can take.
        fixed: MACs that are the same in every configuration.
        per_group_size: MACs of each decomposed layer per unit of its group size.
    """

    input_size: tuple[int, ...]
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
    def layers(self) -> tuple[LayerMacs, ...]:
        """The counted layers in network order, at this configuration."""
        sizes = iter(self.configuration)
        return tuple(
            count if count.group_size is None else replace(count, group_size=next(sizes))
            for count in self._counts
        )

    def with_configuration(self, configuration: Sequence[int]) -> MacsReport:
        """The same network in another configuration. Takes microseconds: nothing is run.

        Raises:
            ValueError: if the configuration is not one of the network's.
        """
        check_configuration(configuration, self.group_sizes)
        return replace(self, configuration=tuple(configuration))

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            box=SIMPLE_HEAD,
            title=f"MACs for one input of {size(self.input_size)}",
            show_footer=True,
        )
        table.add_column("layer", "total")
        table.add_column("kind")
        table.add_column("output", justify="right")
        table.add_column("group size", justify="right")
        table.add_column("grouped", f"{self.grouped:,}", justify="right")
        table.add_column("MACs", f"{self.total:,}", justify="right")
        for layer in self.layers:
            table.add_row(
                layer.name or "(the model)",
                layer.kind if layer.calls == 1 else f"{layer.kind} ({layer.calls} calls)",
                size(layer.output_size),
                "" if layer.group_size is None else str(layer.group_size),
                "" if layer.group_size is None else f"{layer.grouped:,}",
                f"{layer.total:,}",
            )
        return table

    def __str__(self) -> str:
        return text(self)


def macs(
    model: nn.Module, input_size: Sequence[int], configuration: Sequence[int] | None = None
) -> MacsReport:
    """Count the multiply–accumulates of ``model`` for one input by the rule above.

    The spatial sizes come from one forward pass of a copy of the model on the meta device, which
    computes nothing and holds no weights. Other configurations then cost microseconds:
    :meth:`MacsReport.with_configuration`.

    Args:
        model: any network, decomposed or not.
        input_size: shape of one input without the batch dimension, such as ``(3, 224, 224)``.
        configuration: one group size per decomposed layer in network order; by default the active
            ones.

    Returns:
        The report: ``total``, ``grouped``, ``layers``.

    Raises:
        ValueError: for an input size that is not made of positive ints, or a configuration that
            does not fit. What the model itself raises on an input of this size is passed on with a
            note.
    """
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in input_size):
        raise ValueError(
            f"input_size: got {input_size}, accepted are positive ints, such as (3, 224, 224)"
        )
    shapes = _shapes_of(model).eval()
    counts: dict[str, LayerMacs] = {}
    for name, module in shapes.named_modules():
        if isinstance(module, COUNTED):
            group_size = module.group_size if isinstance(module, GroSSConv2d) else None
            counts[name] = LayerMacs(name, type(module).__name__, group_size=group_size)
            module.register_forward_hook(partial(_add_call, counts, name), with_kwargs=True)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    try:
        # Tensors that the model's own forward makes follow to the meta device, where the reference
        # alone always serves.
        with torch.no_grad(), torch.device("meta"), use_backend("reference"):
            shapes(torch.empty(1, *input_size, dtype=dtype))
    except (RuntimeError, ValueError, TypeError) as error:
        error.add_note(
            f"while running the model on the meta device for input_size={tuple(input_size)}"
        )
        raise
    layers = decomposed_layers(model)
    report = MacsReport(
        tuple(input_size),
        tuple(layer.group_size for layer in layers.values()),
        tuple(layer.group_sizes for layer in layers.values()),
        sum(count.fixed for count in counts.values()),
        tuple(counts[name].per_group_size for name in layers),
        tuple(counts.values()),
    )
    return report if configuration is None else report.with_configuration(configuration)


def _shapes_of(model: nn.Module) -> nn.Module:
    """A copy of the model that has the shapes of its parameters and no memory, so that running it
    costs nothing."""
    memo: dict[int, Tensor] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


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
    fixed, per_group_size = _macs_of_call(layer, args[0] if args else kwargs["input"], output)
    counts[name] = replace(
        count,
        output_size=count.output_size or tuple(output.shape[1:]),
        calls=count.calls + 1,
        fixed=count.fixed + fixed,
        per_group_size=count.per_group_size + per_group_size,
    )


def _macs_of_call(layer: nn.Module, input: Tensor, output: Tensor) -> tuple[int, int]:
    """MACs of one call: those that do not depend on the group size, and those per unit of group
    size."""
    elements = output.numel()
    if isinstance(layer, GroSSConv2d):
        per_group_size = convolution_macs(layer.width[1], 1, layer.kernel_size, output.shape[-2:])
        return layer.macs(input.shape[-2:]) - per_group_size * layer.group_size, per_group_size
    if isinstance(layer, SeriesConv2d):
        return layer.macs(input.shape[-2:]), 0
    if isinstance(layer, _BatchNorm):
        return 2 * elements, 0
    if isinstance(layer, nn.Linear):
        return elements * layer.in_features, 0
    assert isinstance(layer, _ConvNd)
    bias = elements if layer.bias is not None else 0
    # A transposed convolution spreads each input element over the outputs, where a convolution
    # gathers each output from the inputs.
    spread = input.numel() if isinstance(layer, _ConvTransposeNd) else elements
    return spread * math.prod(layer.weight.shape[1:]) + bias, 0
