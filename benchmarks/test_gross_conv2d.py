"""``GroSSConv2d`` beside the dense convolution that it replaces, and beside its ``fold()``: three plain convolutions.

Two operations: inference, and training (forward, and the gradients of the input and of every parameter). Everything is
channels-last, weights too. In inference on a CPU the dense convolution may also have its weight packed beforehand, as
compilers do; the faster counts.
"""

from __future__ import annotations

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
#: One layer of each network at equal width: what a quick run measures.
REPRESENTATIVE = ("64@4", "256@8", "128@28", "512@14")
#: Images per call on a CPU; on a GPU the batch is the shape's own.
BATCHES = (16, 1)


def cases() -> Iterator[Any]:
    for label, layer in LAYERS.items():
        batches = BATCHES if DEVICE.type == "cpu" else (layer.batch(DEVICE),)
        for batch in batches:
            for group_size in layer.group_sizes:
                quick = label in REPRESENTATIVE and batch == batches[0]
                yield pytest.param(label, batch, group_size, marks=() if quick else pytest.mark.full)


@pytest.mark.parametrize("operation", ["inference", "training"])
@pytest.mark.parametrize(("label", "batch", "group_size"), list(cases()))
def test_layer(compare: Callable[..., None], label: str, batch: int, group_size: int, operation: str) -> None:
    training = operation == "training"
    dtype_name, memory_format = PRECISIONS[0]
    dtype = getattr(torch, dtype_name)
    shape = LAYERS[label]
    geometry = (shape.in_channels, shape.out_channels, shape.kernel_size, shape.stride, shape.padding)
    layer = GroSSConv2d(*geometry, device=DEVICE, dtype=dtype, group_sizes=shape.group_sizes, width=shape.width)
    layer.group_size = group_size
    dense = nn.Conv2d(*geometry, device=DEVICE, dtype=dtype)
    modules: dict[str, nn.Module] = {"ours": layer, "dense": dense, "fold": layer.fold()}
    input, grad = (
        torch.randn(batch, channels, *size, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for channels, size in ((shape.in_channels, shape.input_size), (shape.out_channels, shape.output_size))
    )
    calls: dict[str, Call] = {}
    for name, module in modules.items():
        module.to(memory_format=torch.channels_last)
        calls[name] = partial(gradients, module, input, grad) if training else partial(module, input)
    weights = sum(parameter.nbytes for parameter in modules["fold"].parameters())
    dense_macs = convolution_macs(
        shape.out_channels, shape.in_channels, shape.kernel_size, shape.output_size, bias=True
    )
    # In training each of two gradients costs what the forward costs. The backward pass reads input, output gradient and
    # weights again, and writes gradients of input and weights.
    passes = 3 if training else 1
    with torch.inference_mode(not training):
        baselines = {name: {"eager": calls[name]} for name in ("dense", "fold")}
        if not training and DEVICE.type == "cpu" and torch.backends.mkldnn.is_available():
            baselines["dense"]["packed"] = packed(dense, input)
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
            macs=passes * batch * layer.macs(shape.input_size),
            dense_macs=passes * batch * dense_macs,
            bytes=passes * (input.nbytes + weights) + (2 if training else 1) * grad.nbytes,
        )


def gradients(module: nn.Module, input: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward: the gradients of the input and of every parameter."""
    input = input.detach().requires_grad_()
    return torch.autograd.grad(module(input), [input, *module.parameters()], grad, materialize_grads=True)


def packed(dense: nn.Conv2d, input: Tensor) -> Call:
    """The dense convolution with its weight in oneDNN's layout, by the operators that ``torch.compile`` uses."""
    geometry = (dense.padding, dense.stride, dense.dilation, dense.groups)
    weight = torch.ops.mkldnn._reorder_convolution_weight(dense.weight, *geometry, input.shape)
    call = partial(torch.ops.mkldnn._convolution_pointwise, input, weight, dense.bias, *geometry, "none", [], "")
    check_close(call(), dense(input))
    return call
