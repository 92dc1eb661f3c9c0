"""A network before and after its deployment, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gross_kernels import GroSSConv2d
from gross_kernels.program import Program

from ..copying import copy_model, unwrapped
from ..latency import milliseconds
from ..macs import macs
from ..supernet import decomposed_layers
from .exporting import tensors_of


def dense(supernet: nn.Module, configuration: Sequence[int]) -> nn.Module:
    """The supernet with each decomposed layer as the one dense convolution that it stands for at
    its group size: the products, and the time, of the network before its decomposition."""
    layers = decomposed_layers(supernet)
    replaced = {
        id(layer): _convolution(layer, size)
        for layer, size in zip(layers.values(), configuration, strict=True)
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


def comparison(candidates: Mapping[str, nn.Module], example: Tensor) -> list[dict[str, Any]]:
    """Multiply–accumulates for one image, parameters, milliseconds for the example, timed in turn,
    and the largest difference from the first one's output relative to its largest magnitude."""
    networks = list(candidates.values())
    with torch.inference_mode():
        outputs = [tensors_of(network(example)) for network in networks]
    rows = []
    for name, network, duration, output in zip(
        candidates, networks, milliseconds(networks, example), outputs, strict=True
    ):
        errors = [
            float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
            for got, wanted in zip(output, outputs[0], strict=True)
        ]
        rows.append(
            {
                "network": name,
                "macs": macs(network, tuple(example.shape[1:])).total,
                "parameters": _numbers(network),
                "milliseconds": duration,
                "difference": max(errors, default=0.0),
            }
        )
    return rows


def _numbers(network: nn.Module) -> int:
    """Parameters, and a program's weights, which are buffers."""
    programs = {
        id(weight)
        for module in network.modules()
        if isinstance(module, Program)
        for weight in module.buffers()
    }
    tensors = [*network.parameters(), *(b for b in network.buffers() if id(b) in programs)]
    return sum(tensor.numel() for tensor in tensors)
