"""Convolutions in 8 bits by PyTorch's own operators: what ours are measured beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gross_kernels.program import Quantised

from .measure import Call

#: Engines of ``torch.ops.quantized`` for x86; "operator" stands for oneDNN's own operator, which
#: ``torch.compile`` calls.
ENGINES = ("x86", "fbgemm")
OPERATOR = "operator"


@dataclass(frozen=True)
class Convolution:
    """int8 weights ``[C_out, group size, kh, kw]``, their scale by output channel, a bias in
    numbers."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    dilation: tuple[int, int] = field(default=(1, 1), init=False)


def rounded(weight: Tensor, bits: int, **geometry: Any) -> Convolution:
    """A convolution of numbers with its weights in so many bits."""
    most = 2 ** (bits - 1) - 1
    scales = weight.abs().amax((1, 2, 3)) / most
    whole = (weight / scales.view(-1, 1, 1, 1)).round().to(torch.int8)
    return Convolution(whole, scales, **geometry)


def variants(
    convolutions: Sequence[Convolution], held: Quantised, input: Tensor, repeats: int
) -> dict[str, Call]:
    """By operator, calls that quantise ``input``, run the chain ``repeats`` times over with
    everything between held as ``held`` says, and return the last result as numbers."""
    calls: dict[str, Call] = {OPERATOR: _by_operator(convolutions, held, input, repeats)}
    before = torch.backends.quantized.engine
    for engine in ENGINES:
        if engine in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = engine
            calls[engine] = _by_engine(convolutions, held, input, repeats)
    torch.backends.quantized.engine = before
    return calls


def _by_operator(
    convolutions: Sequence[Convolution], held: Quantised, input: Tensor, repeats: int
) -> Call:
    scale, zero = held.scale, held.zero
    steps = []
    for of in convolutions:
        geometry = (list(of.stride), list(of.padding), list(of.dilation), of.groups)
        packed = torch.ops.onednn.qconv_prepack(of.weight, of.scales, scale, zero, *geometry)
        zeros = torch.zeros(len(of.scales), dtype=torch.int64)
        steps.append((packed, of.scales, zeros, of.bias, *geometry))

    def convolve(value: Tensor, step: tuple, dtype: torch.dtype) -> Tensor:
        target = (scale, zero) if dtype == torch.uint8 else (1.0, 0)
        return torch.ops.onednn.qconv2d_pointwise(
            value, scale, zero, *step, *target, dtype, "none", [], ""
        )

    def call() -> Tensor:
        value = first = torch.quantize_per_tensor(input, scale, zero, torch.quint8).int_repr()
        for i in range(repeats):
            value = first
            for step in steps[:-1]:
                value = convolve(value, step, torch.uint8)
            last = torch.float32 if i == repeats - 1 else torch.uint8
            value = convolve(value, steps[-1], last)
        return value

    return call


def _by_engine(
    convolutions: Sequence[Convolution], held: Quantised, input: Tensor, repeats: int
) -> Call:
    steps = []
    for of in convolutions:
        zeros = torch.zeros(len(of.scales), dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(of.weight, of.scales.double(), zeros, 0)
        weight = weight.contiguous(memory_format=torch.channels_last)
        steps.append(
            torch.ops.quantized.conv2d_prepack(
                weight, of.bias, list(of.stride), list(of.padding), list(of.dilation), of.groups
            )
        )

    def call() -> Tensor:
        value = first = torch.quantize_per_tensor(input, held.scale, held.zero, torch.quint8)
        for _ in range(repeats):
            value = first
            for step in steps:
                value = torch.ops.quantized.conv2d(value, step, held.scale, held.zero)
        return value.dequantize()

    return call
