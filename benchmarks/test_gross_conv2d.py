"""``GroSSConv2d`` beside the dense convolution that it replaces, and beside its ``fold()``: three
plain convolutions.

Two operations: inference, and training (forward, and the gradients of the input and of every
parameter). Everything is channels-last, weights too. In inference ours is packed
(``GroSSConv2d.pack``) and "unpacked" is the same layer without, which sums its weights at every
call; on a CPU the plain convolutions, too, may have their weights packed beforehand, as compilers
do, and the faster counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gross_kernels import GroSSConv2d
from gross_kernels.series import convolution_macs

from .measure import DEVICE, PRECISIONS, Call, by_definition, check_close, stopwatch
from .shapes import layers

pytestmark = pytest.mark.benchmark(group="GroSSConv2d", timer=stopwatch, disable_gc=True)

LAYERS = {layer.label: layer for layer in layers()}
#: What a quick run measures: of the 4-layer network, of VGG-16 at 32×32, of ResNet-18 (three: large
#: maps, a stride, and the most channels for its maps, where packing counts) and of VGG-16 at
#: 224×224.
REPRESENTATIVE = ("64@4", "256@8", "64@56", "256-512@14/2", "512@7", "512@14")
#: In inference; a quick run trains at 4 and the larger batch alone, as the goals do.
GROUP_SIZES = (1, 4, 16, 32)
#: Images per call on a CPU; on a GPU the batch is the shape's own.
BATCHES = (16, 1)


def cases() -> Iterator[Any]:
    for label, layer in LAYERS.items():
        batches = BATCHES if DEVICE.type == "cpu" else (layer.batch(DEVICE),)
        for batch in batches:
            for group_size in layer.group_sizes:
                for operation in ("inference", "training"):
                    training = operation == "training"
                    wanted = (
                        (batch, group_size) == (batches[0], 4)
                        if training
                        else group_size in GROUP_SIZES
                    )
                    quick = label in REPRESENTATIVE and wanted
                    yield pytest.param(
                        label, batch, group_size, operation, marks=() if quick else pytest.mark.full
                    )


@pytest.mark.parametrize(("label", "batch", "group_size", "operation"), list(cases()))
def test_layer(
    compare: Callable[..., None], label: str, batch: int, group_size: int, operation: str
) -> None:
    training = operation == "training"
    dtype_name, memory_format = PRECISIONS[0]
    dtype = getattr(torch, dtype_name)
    shape = LAYERS[label]
    geometry = (
        shape.in_channels,
        shape.out_channels,
        shape.kernel_size,
        shape.stride,
        shape.padding,
    )
    layer = GroSSConv2d(
        *geometry, device=DEVICE, dtype=dtype, group_sizes=shape.group_sizes, width=shape.width
    )
    layer.group_size = group_size
    dense = nn.Conv2d(*geometry, device=DEVICE, dtype=dtype)
    modules: dict[str, nn.Module] = {"ours": layer, "dense": dense, "fold": layer.fold()}
    input, grad = (
        torch.randn(batch, channels, *size, device=DEVICE, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        for channels, size in (
            (shape.in_channels, shape.input_size),
            (shape.out_channels, shape.output_size),
        )
    )
    for module in modules.values():
        module.to(memory_format=torch.channels_last).train(training)
    if not training:
        modules["unpacked"] = copy.deepcopy(layer)
        layer.pack()
    calls: dict[str, Call] = {
        name: partial(gradients, module, input, grad) if training else partial(module, input)
        for name, module in modules.items()
    }
    weights = sum(parameter.nbytes for parameter in modules["fold"].parameters())
    dense_macs = convolution_macs(
        shape.out_channels, shape.in_channels, shape.kernel_size, shape.output_size, bias=True
    )
    # In training each of two gradients costs what the forward costs. The backward pass reads input,
    # output gradient and weights again, and writes gradients of input and weights.
    passes = 3 if training else 1
    with torch.inference_mode(not training):
        baselines = {name: {"eager": call} for name, call in calls.items() if name != "ours"}
        if not training and DEVICE.type == "cpu" and torch.backends.mkldnn.is_available():
            for name in ("dense", "fold"):
                baselines[name]["packed"] = packed(modules[name], input)
        if not training:
            check_close([calls["unpacked"](), calls["fold"]()], [calls["ours"]()] * 2)
        compare(
            calls["ours"],
            partial(by_definition, calls["ours"]),
            baselines,
            suite="GroSSConv2d",
            subject=label,
            setting=group_size,
            operation=operation,
            batch=batch,
            dtype=dtype_name,
            memory_format=memory_format,
            narrow=shape.narrow,
            macs=passes * batch * layer.macs(shape.input_size),
            dense_macs=passes * batch * dense_macs,
            bytes=passes * (input.nbytes + weights) + (2 if training else 1) * grad.nbytes,
        )


def gradients(module: nn.Module, input: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward: the gradients of the input and of every parameter."""
    input = input.detach().requires_grad_()
    return torch.autograd.grad(
        module(input), [input, *module.parameters()], grad, materialize_grads=True
    )


def packed(module: nn.Module, input: Tensor) -> Call:
    """A convolution, or a chain of them, with the weights in oneDNN's layout, by the operators of
    ``torch.compile``."""
    steps: list[tuple[Any, ...]] = []
    output = input
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv2d):
            geometry = (
                convolution.padding,
                convolution.stride,
                convolution.dilation,
                convolution.groups,
            )
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                convolution.weight, *geometry, output.shape
            )
            steps.append((weight, convolution.bias, *geometry, "none", [], ""))
            output = convolution(output)

    def call() -> Tensor:
        value = input
        for step in steps:
            value = torch.ops.mkldnn._convolution_pointwise(value, *step)
        return value

    check_close(call(), output)
    return call
