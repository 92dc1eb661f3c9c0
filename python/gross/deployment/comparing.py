"""A network before and after its deployment, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gross_kernels.program import Program

from ..latency import milliseconds
from ..macs import macs
from .graph import tensors_of


def comparison(candidates: Mapping[str, nn.Module], example: Tensor) -> list[dict[str, Any]]:
    """Multiply–accumulates for one image, and those of them in 8 bits; parameters; milliseconds for
    the example, timed in turn; and the largest difference from the first one's output relative to
    its largest magnitude."""
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
        counts = macs(network, tuple(example.shape[1:]))
        rows.append(
            {
                "network": name,
                "macs": counts.total,
                "in_8_bits": counts.in_8_bits,
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
