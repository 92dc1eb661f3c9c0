"""A supernet that runs in either precision, layer by layer: what a search for precisions looks at.

Each decomposed layer at each group size, and each other convolution and linear layer, is exported
alone in 8 bits, on what it reads in the float network. So it computes what it would in a deployed
network, by the same kernels: its input is rounded to 8 bits, its weights are, and a layer's r is,
channel by channel. What is between layers stays in float32: residual sums and poolings read values
that are not rounded, and no channels are equalised between layers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gross_kernels import GroSSConv2d

from ..copying import copy_model, unwrapped
from ..report import tracked
from ..supernet import Configuration, covering, decomposed_layers, set_configuration
from .exporting import export
from .precision import Int8


class MixedSupernet:
    """A supernet whose layers can be set to 8 bits.

    Attributes:
        network: a copy of the supernet, which takes any configuration.
    """

    def __init__(
        self, supernet: nn.Module, batches: Sequence[Tensor], settings: Int8 | None = None
    ) -> None:
        """Bring every layer into 8 bits, at every group size.

        Args:
            batches: images to calibrate on, a part of them at the smallest group sizes, one at the
                next and so on: what a layer reads in 8 bits has the range of all of them.
            settings: ranges and weights; by default those of a plain ``Int8()``.
        """
        self.network = copy_model(unwrapped(supernet), with_attributes=False).eval()
        layers = decomposed_layers(self.network)
        every, images = covering(self.network), torch.cat(list(batches))
        parts = list(zip(every, images.tensor_split(len(every)), strict=True))
        parts = [(c, part) for c, part in parts if len(part)]
        others = [
            name
            for name, module in self.network.named_modules()
            if isinstance(module, nn.Linear) or _is_convolution(module)
        ]
        self._layers = list(layers)
        self._parts: dict[str, _Either] = {}
        for name in tracked([*layers, *others], "layers in 8 bits"):
            read, module = inputs_of(self.network, name, parts), self.network.get_submodule(name)
            if read:
                lowered = in_8_bits(module, read, settings or Int8())
                self._parts[name] = _Either(module, lowered)
        for either in self._parts.values():
            vars(either.module)["forward"] = either

    def set_precision(self, int8: Sequence[bool]) -> None:
        """Run decomposed layers in 8 bits or in float32.

        Args:
            int8: of each decomposed layer, in network order, whether it is in 8 bits. With any, all
                other convolutions and linear layers are, too.
        """
        of_layers = dict(zip(self._layers, int8, strict=True))
        for name, either in self._parts.items():
            either.int8 = of_layers.get(name, any(int8))


def inputs_of(
    network: nn.Module, name: str, images: Sequence[tuple[Configuration, Tensor]]
) -> list[Tensor]:
    """What one of a network's modules reads in these configurations, of these images."""
    read: list[Tensor] = []

    def keep(module: nn.Module, args: Any) -> None:
        read.append(args[0].detach().clone())

    hook = network.get_submodule(name).register_forward_pre_hook(keep)
    with torch.inference_mode():
        for configuration, batch in images:
            set_configuration(network, configuration)
            network(batch.clone())  # Which it may write into.
    hook.remove()
    return read


def in_8_bits(module: nn.Module, read: Sequence[Tensor], settings: Int8) -> dict[int, nn.Module]:
    """A module alone in 8 bits, from numbers to numbers, whatever that costs: a decomposed layer by
    its group sizes, any other by 0.

    Args:
        read: what it reads, to calibrate on.
    """
    settings = replace(settings, most_error=sys.float_info.max, metric=None, float32=())
    options: dict[str, Any] = {"example": read[0], "precision": settings, "calibration": read}
    # torch.fx cannot trace a decomposed layer that is itself the network.
    alone = nn.Sequential(module)
    if isinstance(module, GroSSConv2d):
        return {size: export(alone, size, **options) for size in module.group_sizes}
    return {0: export(alone, **options)}


class _Either:
    """A module's forward, in the precision that is set."""

    def __init__(self, module: nn.Module, lowered: Mapping[int, nn.Module]) -> None:
        self.module, self.lowered = module, lowered
        self.in_float32 = module.forward
        self.int8 = False

    def __call__(self, input: Tensor) -> Tensor:
        if not self.int8:
            return self.in_float32(input)
        size = self.module.group_size if isinstance(self.module, GroSSConv2d) else 0
        return self.lowered[size](input)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1
