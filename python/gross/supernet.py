"""A supernet: a network whose convolutions are ``GroSSConv2d``, and the configuration it runs
in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gross_kernels import GroSSConv2d

from .arguments import check_int, check_ints, check_module
from .copying import copy_model, plain_name, unwrapped

#: One group size per decomposed layer, in network order.
Configuration = tuple[int, ...]


def decomposed_layers(model: nn.Module) -> dict[str, GroSSConv2d]:
    """The decomposed layers by qualified name, in network order.

    That is the order in which the model registers them; a layer that is registered more than once
    has its first name. Names are those of the network itself, also where it is compiled or wrapped
    in ``DistributedDataParallel``."""
    return {
        plain_name(name): module
        for name, module in unwrapped(check_module("model", model)).named_modules()
        if isinstance(module, GroSSConv2d)
    }


def check_supernet(name: str, value: object) -> dict[str, GroSSConv2d]:
    """The decomposed layers of ``value``, as :func:`decomposed_layers`.

    Raises:
        TypeError: if it is no module.
        ValueError: if it has none.
    """
    layers = decomposed_layers(check_module(name, value))
    if not layers:
        raise ValueError(
            f"{name}: got {type(value).__name__} without decomposed layers, accepted is what "
            "gross.decompose returns"
        )
    return layers


def configuration(model: nn.Module) -> Configuration:
    """The active group size of each decomposed layer, in network order."""
    return tuple(layer.group_size for layer in decomposed_layers(model).values())


def set_configuration(
    model: nn.Module, configuration: int | Sequence[int] | Mapping[str, int]
) -> None:
    """Set the active group sizes of the decomposed layers.

    Args:
        configuration: one group size per layer in network order; or one int for all of them; or
            group sizes by the layers' names, the layers not named keep theirs.

    Raises:
        TypeError: if it is none of these.
        ValueError: if there is not one group size per decomposed layer, or a layer does not have
            it. Nothing is changed then.
    """
    layers = decomposed_layers(model)
    sizes = [layer.group_sizes for layer in layers.values()]
    active = tuple(layer.group_size for layer in layers.values())
    checked = check_configuration(configuration, sizes, active, list(layers))
    for layer, group_size in zip(layers.values(), checked, strict=True):
        layer.group_size = group_size


def covering(model: nn.Module) -> list[Configuration]:
    """As few configurations as have every group size of every layer: in the i-th every layer is at
    its i-th size; layers with fewer start over."""
    sizes = [layer.group_sizes for layer in decomposed_layers(model).values()]
    return [tuple(s[i % len(s)] for s in sizes) for i in range(max(map(len, sizes)))]


def dense_network(supernet: nn.Module, configuration: Sequence[int] | None = None) -> nn.Module:
    """The supernet with each decomposed layer as the one dense convolution that it stands for at
    a group size (default: the active one): the products, and the time, of the network before its
    decomposition. In evaluation mode and channels-last."""
    layers = decomposed_layers(supernet)
    sizes = [layer.group_size for layer in layers.values()]
    replaced = {
        id(layer): _convolution(layer, size)
        for layer, size in zip(layers.values(), configuration or sizes, strict=True)
    }
    copied = copy_model(unwrapped(supernet), replaced, with_attributes=False).eval()
    vars(copied).pop("decomposition_report", None)
    return copied.to(memory_format=torch.channels_last)


def _convolution(layer: GroSSConv2d, size: int) -> nn.Module:
    before, layer.group_size = layer.group_size, size
    try:
        weight = layer.weight.detach()
    finally:
        layer.group_size = before
    made: Any = {"padding_mode": layer.padding_mode}
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=layer.bias is not None,
        **made,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        conv.weight.copy_(weight)
        if conv.bias is not None and layer.bias is not None:
            conv.bias.copy_(layer.bias)
    return nn.Sequential(conv, nn.ReLU()) if layer.relu else conv


def check_configuration(
    configuration: int | Sequence[int] | Mapping[str, int],
    group_sizes: Sequence[Sequence[int]],
    active: Configuration,
    names: Sequence[str] | None = None,
) -> Configuration:
    """The configuration that a user means, one of each layer's group sizes, as Python's ints.

    Args:
        configuration: as :func:`set_configuration` takes it.
        group_sizes, active, names: of the layers, in network order.

    Raises:
        TypeError: if it is no int, sequence of ints or mapping to ints.
        ValueError: naming the layer's position, what was got and what is accepted.
    """
    if isinstance(configuration, Mapping):
        chosen = dict(zip(names or (), active, strict=True))
        for name, size in configuration.items():
            if name not in chosen:
                near = difflib.get_close_matches(str(name), chosen, n=3) or list(chosen)[:3]
                raise ValueError(
                    f"configuration: got {name!r}, accepted are names of decomposed layers, such "
                    f"as {near}"
                )
            chosen[name] = check_int(f"configuration[{name!r}]", size)
        configuration = tuple(chosen.values())
    elif isinstance(configuration, Sequence) or getattr(configuration, "ndim", 0) > 0:
        configuration = check_ints("configuration", configuration)
    else:
        configuration = (check_int("configuration", configuration),) * len(group_sizes)
    if len(configuration) != len(group_sizes):
        raise ValueError(
            f"configuration: got {len(configuration)} group sizes, accepted is one per decomposed "
            f"layer, {len(group_sizes)}"
        )
    for i, (size, sizes) in enumerate(zip(configuration, group_sizes, strict=True)):
        if size not in sizes:
            raise ValueError(
                f"configuration: got {size!r} for decomposed layer {i}, accepted are {tuple(sizes)}"
            )
    return configuration
