"""Layers and dense convolutions in 8 bits beside PyTorch's own convolutions in 8 bits, and beside
our float32.

Everything begins and ends with numbers, channels-last: what is timed brings its input into 8 bits
once, computes :data:`REPEATS` times from the same bytes, and writes numbers instead of bytes the
last time. So the result of what is timed is what is checked, against the exact sums of integers.
``dense`` and ``fold`` have the fastest of PyTorch's operators; fold rounds both inner tensors to 8
bits, where ours rounds one. All have weights of as many bits as ours are fastest with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gross_kernels.environment import weight_bits
from gross_kernels.program import Quantised, Step, Steps, define, run
from gross_kernels.series import convolution_macs

from .eight_bits import Convolution, rounded, variants
from .measure import Call, stopwatch
from .shapes import Shape
from .test_gross_conv2d import BATCHES, GROUP_SIZES, LAYERS, REPRESENTATIVE

pytestmark = [
    pytest.mark.benchmark(group="int8", timer=stopwatch, disable_gc=True),
    pytest.mark.skipif(torch.cuda.is_available(), reason="8 bits are for processors"),
    # PyTorch's tensors of 8 bits, which its engines read.
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions"),
]

#: How often a call computes what it is for.
REPEATS = 8
#: How every value between is held: numbers of variance 1, cut at four of their deviations.
HELD = Quantised(4 / 127, 128)


def cases() -> Iterator[Any]:
    for label, layer in LAYERS.items():
        for batch in BATCHES:
            for group_size in layer.group_sizes:
                # A quick run has every size at the larger batch, and 4 at the other.
                wanted = GROUP_SIZES if batch == BATCHES[0] else (4,)
                quick = label in REPRESENTATIVE and group_size in wanted
                yield pytest.param(
                    label, batch, group_size, marks=() if quick else pytest.mark.full
                )


def dense_cases() -> Iterator[Any]:
    for label in LAYERS:
        for batch in BATCHES:
            quick = label in REPRESENTATIVE
            yield pytest.param(label, batch, marks=() if quick else pytest.mark.full)


@pytest.mark.parametrize(("label", "batch", "group_size"), list(cases()))
def test_layer(compare: Callable[..., None], label: str, batch: int, group_size: int) -> None:
    shape = LAYERS[label]
    step, weights = layer_step(shape, group_size)
    dense, kernel = dense_step(shape)
    input = images(shape, batch)
    first, middle, last = weights[:3]
    r = rounded(
        middle / weights[4].view(-1, 1, 1, 1) * HELD.scale, weight_bits(), stride=shape.stride,
        padding=shape.padding, groups=shape.width[0] // group_size,
    )  # fmt: skip
    folded = [
        Convolution(first, weights[3]),
        r,
        Convolution(last, weights[5] / HELD.scale, weights[6]),
    ]
    baselines = {
        "dense": variants([convolution(dense, kernel)], HELD, input, REPEATS),
        "fold": variants(folded, HELD, input, REPEATS),
        "float32": {"ours": program(step, in_float32(step, weights), input, None)},
    }
    ours = program(step, weights, input, HELD)
    exact = check(ours, step, weights, input)
    for call in (*baselines["fold"].values(), *baselines["float32"].values()):
        assert (call()[:1] - exact).abs().mean() <= 0.05  # of numbers of variance 1
    inputs = convolution_macs(shape.width[0], shape.in_channels, (1, 1), shape.input_size)
    grouped = convolution_macs(shape.width[1], group_size, shape.kernel_size, shape.output_size)
    outputs = convolution_macs(shape.out_channels, shape.width[1], (1, 1), shape.output_size, True)
    compare(
        ours, ours, baselines, suite="int8 layer", setting=group_size,
        macs=REPEATS * batch * (inputs + grouped + outputs), **facts(shape, batch, weights),
    )  # fmt: skip


@pytest.mark.parametrize(("label", "batch"), list(dense_cases()))
def test_convolution(compare: Callable[..., None], label: str, batch: int) -> None:
    shape = LAYERS[label]
    step, weights = dense_step(shape)
    input = images(shape, batch)
    baselines = {
        "library": variants([convolution(step, weights)], HELD, input, REPEATS),
        "float32": {"ours": program(step, in_float32(step, weights), input, None)},
    }
    ours = program(step, weights, input, HELD)
    exact = check(ours, step, weights, input)
    for call in baselines["library"].values():  # The same bits, at most rounded once to 8 of them.
        assert (call()[:1] - exact).abs().clamp(max=4).max() <= 0.51 * HELD.scale
    more = facts(shape, batch, weights)
    compare(
        ours, ours, baselines, suite="int8 convolution", setting="dense",
        macs=more["dense_macs"], **more,
    )  # fmt: skip


def images(shape: Shape, batch: int) -> Tensor:
    return torch.randn(batch, shape.in_channels, *shape.input_size).contiguous(
        memory_format=torch.channels_last
    )


def layer_step(shape: Shape, group_size: int) -> tuple[Step, list[Tensor]]:
    """A layer whose inner tensors and outputs have variance 1, and its weights in 8 bits."""
    inputs, outputs = shape.width
    step = Step(
        "layer", 1, in_channels=shape.in_channels, width=shape.width, group_size=group_size,
        out_channels=shape.out_channels, kernel_size=shape.kernel_size, stride=shape.stride,
        padding=shape.padding, weights=0, scales=3, bias=6,
    )  # fmt: skip
    first, first_scales = drawn(inputs, shape.in_channels, (1, 1))
    last, last_scales = drawn(shape.out_channels, outputs, (1, 1))
    terms = group_size * shape.kernel_size[0] * shape.kernel_size[1]
    middle = torch.randn(outputs, group_size, *shape.kernel_size) / terms**0.5
    # r's steps, which Q's columns hold.
    steps = torch.full((outputs,), HELD.scale)
    bias = torch.randn(shape.out_channels) / 4
    return step, [first, middle, last, first_scales, steps, last_scales * HELD.scale, bias]


def dense_step(shape: Shape) -> tuple[Step, list[Tensor]]:
    """The dense convolution that the layer replaces, likewise."""
    step = Step(
        "convolution", 1, in_channels=shape.in_channels,
        width=(shape.in_channels, shape.out_channels), group_size=shape.in_channels,
        out_channels=shape.out_channels, kernel_size=shape.kernel_size, stride=shape.stride,
        padding=shape.padding, weights=0, scales=1, bias=2,
    )  # fmt: skip
    weight, scales = drawn(shape.out_channels, shape.in_channels, shape.kernel_size)
    return step, [weight, scales, torch.randn(shape.out_channels) / 4]


def drawn(outputs: int, inputs: int, kernel: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Whole weights of all sizes, and scales with which a sum of theirs has variance 1."""
    most = 2 ** (weight_bits() - 1) - 1
    weight = torch.randint(-most, most + 1, (outputs, inputs, *kernel), dtype=torch.int8)
    size = most / 3**0.5 * (inputs * kernel[0] * kernel[1]) ** 0.5
    return weight, torch.full((outputs,), 1 / size)


def convolution(step: Step, weights: list[Tensor]) -> Convolution:
    return Convolution(*weights, stride=step.stride, padding=step.padding)


def in_float32(step: Step, weights: list[Tensor]) -> list[Tensor]:
    """The same weights in numbers, at the same places."""
    if step.kind == "convolution":
        return [weights[0] * weights[1].view(-1, 1, 1, 1), *weights[1:]]
    first, middle, last, first_scales, steps, last_scales = weights[:6]
    return [
        first * first_scales.view(-1, 1, 1, 1),
        middle,
        last * last_scales.view(-1, 1, 1, 1) / steps.view(-1, 1, 1),
        *weights[3:],
    ]


def described(step: Step, held: Quantised | None) -> Steps:
    """A program that computes ``step`` :data:`REPEATS` times from its input: in 8 bits, which it
    quantises to first, or in numbers."""
    if held is None:
        plain = replace(step, source=0, scales=-1)
        return Steps((plain,) * REPEATS, 1, (REPEATS,))
    values = (None, held, *[held] * (REPEATS - 1), None)
    return Steps((Step("quantise", 0), *[step] * REPEATS), 1, (1 + REPEATS,), values)


def program(step: Step, weights: list[Tensor], input: Tensor, held: Quantised | None) -> Call:
    steps = described(step, held)
    packed, text = steps.pack(weights, input), steps.text()
    return lambda: run([input], packed, text)[0]


def check(ours: Call, step: Step, weights: list[Tensor], input: Tensor) -> Tensor:
    """Hold the first image of ours against the sums of integers, which it returns. Of a layer an r
    between two of its steps may be rounded to the other."""
    once = Steps((Step("quantise", 0), step), 1, (2,), (None, HELD, None))
    exact = define([input[:1]], weights, once)[0]
    error = (ours()[:1] - exact).abs()
    assert error.mean() <= 1e-4
    assert error.max() <= (1e-4 if step.kind == "convolution" else HELD.scale)
    return exact


def facts(shape: Shape, batch: int, weights: list[Tensor]) -> dict[str, Any]:
    """What is the same of layers and convolutions; bytes are those of the tensors in 8 bits."""
    dense = convolution_macs(
        shape.out_channels, shape.in_channels, shape.kernel_size, shape.output_size, True
    )
    (height, width), (out_height, out_width) = shape.input_size, shape.output_size
    values = shape.in_channels * height * width + shape.out_channels * out_height * out_width
    return {
        "subject": shape.label,
        "operation": "inference",
        "batch": batch,
        "dtype": "int8",
        "memory_format": "channels_last",
        "narrow": shape.narrow,
        "dense_macs": REPEATS * batch * dense,
        "bytes": REPEATS * (batch * values + sum(weight.nbytes for weight in weights)),
    }
