"""Structured convolutions beside the dense ones that they equal, and what of their time is the
sum-pooling; and ResNet-18 in both, exported.

In inference the weights of both may be packed beforehand, as compilers do: "dense packed" and
"ours packed" are that. "convolution" is the small convolution alone, of sums that are ready."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gross
import pytest
import torch
from gross.copying import copy_model
from gross.structured.plan import structured_layers
from torch import Tensor, nn

from gross_kernels import StructuredConv2d

from .measure import DEVICE, Call, by_definition, check_close, stopwatch
from .shapes import layers
from .test_gross_conv2d import REPRESENTATIVE, gradients, packed

pytestmark = pytest.mark.benchmark(group="structured", timer=stopwatch, disable_gc=True)

LAYERS = {layer.label: layer for layer in layers()}
#: Shares of the channels, and sides of the small kernel.
STRUCTURES = ((1.0, 2), (0.5, 2), (0.5, 3))
BATCHES = (16, 1)
DTYPE = "float32"
#: The layer that is also measured contiguous.
BOTH_FORMATS = "64@56"


def cases() -> Iterator[Any]:
    for label in LAYERS:
        for batch in BATCHES:
            for structure in STRUCTURES:
                for operation in ("inference", "training"):
                    for memory_format in ("channels_last", "contiguous_format"):
                        quick = (
                            label in REPRESENTATIVE
                            and (operation == "inference" or (batch, structure) == (16, (1.0, 2)))
                            and (memory_format == "channels_last" or label == BOTH_FORMATS)
                        )
                        values = label, batch, structure, operation, memory_format
                        yield pytest.param(
                            *values,
                            marks=() if quick else pytest.mark.full,
                            id=" ".join(map(str, (*values[:2], *structure, *values[3:]))),
                        )


@pytest.mark.parametrize(
    ("label", "batch", "structure", "operation", "memory_format"), list(cases())
)
def test_layer(
    compare: Callable[..., None],
    label: str,
    batch: int,
    structure: tuple[float, int],
    operation: str,
    memory_format: str,
) -> None:
    training = operation == "training"
    shape, format = LAYERS[label], getattr(torch, memory_format)
    share, side = structure
    small = (max(1, round(share * shape.in_channels)), side)
    layer = StructuredConv2d(
        shape.in_channels,
        shape.out_channels,
        shape.kernel_size,
        shape.stride,
        shape.padding,
        device=DEVICE,
        structure=small,
    ).to(memory_format=format)
    dense = layer.to_dense().to(memory_format=format)
    input, grad = (
        torch.randn(batch, channels, *size, device=DEVICE).contiguous(memory_format=format)
        for channels, size in (
            (shape.in_channels, shape.input_size),
            (shape.out_channels, shape.output_size),
        )
    )
    calls: dict[str, Call] = {
        name: partial(gradients, module, input, grad) if training else partial(module, input)
        for name, module in (("ours", layer), ("dense", dense))
    }
    with torch.inference_mode(not training):
        baselines = {"dense": {"eager": calls["dense"]}}
        if not training:
            check_close(dense(input), layer(input))
            pooling, convolution = layer.fold()
            pooled = pooling(input)
            baselines["convolution"] = {"eager": partial(convolution, pooled)}
            if DEVICE.type == "cpu" and torch.backends.mkldnn.is_available():
                baselines["dense packed"] = {"packed": packed(dense, input)}
                baselines["ours packed"] = {"packed": packed_after(pooling, convolution, input)}
        counted, before = layer.operations(shape.input_size)
        passes = 3 if training else 1
        weights = sum(parameter.nbytes for parameter in layer.parameters())
        compare(
            calls["ours"],
            partial(by_definition, calls["ours"]),
            baselines,
            suite="structured",
            subject=label,
            setting=f"{small[0]} {side}",
            operation=operation,
            batch=batch,
            dtype=DTYPE,
            memory_format=memory_format,
            macs=passes * batch * counted.multiplications,
            dense_macs=passes * batch * before.multiplications,
            additions=passes * batch * counted.additions,
            dense_additions=passes * batch * before.additions,
            bytes=passes * (input.nbytes + weights) + (2 if training else 1) * grad.nbytes,
        )


def packed_after(pooling: nn.Module, convolution: nn.Conv2d, input: Tensor) -> Call:
    """Sums, and then the small convolution with its weights packed."""
    geometry = (
        convolution.padding,
        convolution.stride,
        convolution.dilation,
        convolution.groups,
    )
    sums = pooling(input)
    weight = torch.ops.mkldnn._reorder_convolution_weight(convolution.weight, *geometry, sums.shape)
    rest = (weight, convolution.bias, *geometry, "none", [], "")

    def call() -> Tensor:
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(pooling(input), *rest)
        return result

    check_close(call(), convolution(sums))
    return call


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.skipif(DEVICE.type != "cpu", reason="programs run on a CPU")
def test_resnet18(compare: Callable[..., None], batch: int) -> None:
    torch.manual_seed(0)
    network = gross.networks.build("resnet18").eval()
    structured = gross.structured.decompose(
        network, (None, 2), input_size=(3, 224, 224), quiet=True
    ).to(memory_format=torch.channels_last)
    equal = {id(layer): layer.to_dense() for layer in structured_layers(structured).values()}
    dense = copy_model(structured, equal, with_attributes=False)
    images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Batch norms that have seen nothing.
        ours, other = (gross.export(each, example=images) for each in (structured, dense))
    report = structured.structured_report
    operations = [(x.multiplications, x.multiplications_before) for x in report.layers]
    counts = [(x.additions, x.additions_before) for x in report.layers]
    rest = report.macs - sum(after for after, _ in operations)
    with torch.inference_mode():
        compare(
            partial(ours, images),
            partial(structured, images),
            {
                "dense": {"exported": partial(other, images)},
                "dense eager": {"eager": partial(dense, images)},
            },
            suite="structured",
            subject="ResNet-18",
            setting="C 2",
            operation="inference",
            batch=batch,
            dtype=DTYPE,
            memory_format="channels_last",
            macs=batch * report.macs,
            dense_macs=batch * report.macs_before,
            additions=batch * (rest + sum(after for after, _ in counts)),
            dense_additions=batch * (rest + sum(before for _, before in counts)),
            bytes=images.nbytes,
        )
