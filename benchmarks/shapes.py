"""Every distinct decomposed convolution of the paper's networks, read off the networks
themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from gross.decomposition.convert import decompose
from gross.networks import build, input_size, structure
from gross.supernet import decomposed_layers
from torch import Tensor, nn

from gross_kernels import GroSSConv2d
from gross_kernels.geometry import Geometry

#: The networks by name, each with the plain network that it is a decomposition of.
NETWORKS = {
    "4-layer": "4-layer",
    "vgg16-cifar": "vgg16-cifar",
    "resnet18": "resnet18",
    "vgg16": "vgg16",
    "vgg16-narrow": "vgg16",
}
#: Most elements of an output of one call on a CPU: of the powers of two that allow it, the largest
#: batch is taken.
CPU_ELEMENTS = 2**22


@dataclass(frozen=True)
class Shape:
    """A convolution and the size of its input: a decomposed layer, or the grouped convolution
    inside its bottleneck.

    Attributes:
        in_channels, out_channels, kernel_size, stride, padding: the convolution's.
        input_size: (H, W) of its input.
        image_size: height of the network's input, 32 or 224.
        group_sizes: those that the paper gives the layer.
        width: channels of the bottleneck (in, out).
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    input_size: tuple[int, int]
    image_size: int
    group_sizes: tuple[int, ...]
    width: tuple[int, int]

    @property
    def narrow(self) -> bool:
        """Whether the bottleneck is narrower than the paper's first three networks have it."""
        return self.width not in (
            (self.in_channels, self.in_channels),
            (self.in_channels, self.out_channels),
        )

    @property
    def label(self) -> str:
        """Channels, size, stride, and the width of a narrow bottleneck: "64@56", "64-128@56/2",
        "64@224:11-18"."""
        text = f"{_channels(self.in_channels, self.out_channels)}@{self.input_size[0]}"
        if self.stride != (1, 1):
            text += f"/{self.stride[0]}"
        if self.narrow:
            text += f":{_channels(*self.width)}"
        return text

    @property
    def output_size(self) -> tuple[int, ...]:
        """(H, W) of the output."""
        geometry = Geometry(self.stride, self.padding)
        return geometry.output_size(self.input_size, self.kernel_size)

    def batch(self, device: torch.device) -> int:
        """Images per call: on a GPU 128 of 224×224 or 256 of 32×32; on a CPU what
        :data:`CPU_ELEMENTS` allows."""
        if device.type == "cuda":
            return 128 if self.image_size == 224 else 256
        height, width = self.output_size
        return 1 << max(0, (CPU_ELEMENTS // (self.out_channels * height * width)).bit_length() - 1)


def _channels(channels_in: int, channels_out: int) -> str:
    return f"{channels_in}" if channels_in == channels_out else f"{channels_in}-{channels_out}"


def supernet(name: str, model: nn.Module | None = None) -> nn.Module:
    """The network ``name`` of :data:`NETWORKS`, or ``model`` in its place, with decomposed layers
    freshly drawn."""
    model = build(NETWORKS[name]) if model is None else model
    return decompose(model, **structure(name), method="random", quiet=True)


@cache
def layers() -> tuple[Shape, ...]:
    """The distinct decomposed layers of all networks."""
    return tuple(dict.fromkeys(shape for name in NETWORKS for shape in _layers_of(name)))


@cache
def cores() -> tuple[Shape, ...]:
    """The distinct grouped convolutions inside those layers' bottlenecks."""
    return tuple(
        dict.fromkeys(
            replace(layer, in_channels=layer.width[0], out_channels=layer.width[1])
            for layer in layers()
        )
    )


def _layers_of(name: str) -> Iterator[Shape]:
    image = input_size(name)
    sizes: dict[GroSSConv2d, torch.Size] = {}

    def note(layer: GroSSConv2d, args: tuple[Tensor], output: Tensor) -> None:
        sizes[layer] = args[0].shape[2:]

    # On the meta device nothing is computed, and no weight has memory.
    with torch.device("meta"), torch.no_grad():
        network = supernet(name)
        for layer in decomposed_layers(network).values():
            layer.register_forward_hook(note)
        network(torch.empty(1, *image))
    for layer, size in sizes.items():
        assert isinstance(layer.padding, tuple)
        yield Shape(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            (size[0], size[1]),
            image[1],
            layer.group_sizes,
            layer.width,
        )
