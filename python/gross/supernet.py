"""A supernet: a network whose convolutions are ``GroSSConv2d``, and the configuration it runs
in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gross_kernels import GroSSConv2d

#: One group size per decomposed layer, in network order.
Configuration = tuple[int, ...]


def decomposed_layers(model: nn.Module) -> dict[str, GroSSConv2d]:
    """The decomposed layers by qualified name, in network order.

    That is the order in which the model registers them; a layer that is registered more than once
    has its first name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, GroSSConv2d)
    }


def configuration(model: nn.Module) -> Configuration:
    """The active group size of each decomposed layer, in network order."""
    return tuple(layer.group_size for layer in decomposed_layers(model).values())


def set_configuration(model: nn.Module, configuration: Sequence[int]) -> None:
    """Set the active group size of each decomposed layer, in network order.

    Raises:
        ValueError: if there is not one group size per decomposed layer, or a layer does not have
            it; nothing is changed then.
    """
    layers = decomposed_layers(model)
    check_configuration(configuration, [layer.group_sizes for layer in layers.values()])
    for layer, group_size in zip(layers.values(), configuration, strict=True):
        layer.group_size = group_size


def check_configuration(configuration: Sequence[int], group_sizes: Sequence[Sequence[int]]) -> None:
    """Check that a configuration takes one of each layer's group sizes.

    Raises:
        ValueError: naming the layer's position, what was got and what is accepted.
    """
    if len(configuration) != len(group_sizes):
        raise ValueError(
            f"configuration: got {len(configuration)} group sizes, accepted is one per decomposed layer, "
            f"{len(group_sizes)}"
        )
    for i, (size, sizes) in enumerate(zip(configuration, group_sizes, strict=True)):
        if size not in sizes:
            raise ValueError(
                f"configuration: got {size!r} for decomposed layer {i}, accepted are {tuple(sizes)}"
            )
