"""The grouped convolution inside every decomposed layer: ours, the library's best, and what a user
would write.

All three are called below autograd, each gradient alone. ``library`` gets the summed weight
ready-made and may use either memory format; ``materialised`` expands and sums the terms first. Its
input gradient is left out: autograd has kept the summed weight, so that it is the library's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gross_kernels.backends import reference
from gross_kernels.geometry import Geometry
from gross_kernels.series import Series, convolution_macs, restrict, sum_terms

from .measure import DEVICE, PRECISIONS, Call, check_close, stopwatch
from .shapes import Shape, cores

pytestmark = pytest.mark.benchmark(group="grouped convolution", timer=stopwatch, disable_gc=True)

CORES = {core.label: core for core in cores()}
FORMATS = ("channels_last", "contiguous_format")
OPERATIONS = ("forward", "input gradient", "weight gradient")
#: Measured with --full on every core whose width is a power of two, beside the sizes that the paper
#: gives it.
POWERS = (1, 2, 4, 8, 16, 32, 64)
#: The core that a quick run measures in every precision.
EVERY_PRECISION = "128@28"
#: The two whose sizes are no powers of two that a quick run measures.
OTHER_SIZES = ("224@14", "116-100@28")
#: Left out of a quick run: each lies between two others in channels and map.
BETWEEN = ("128@8", "256@4", "256@28")
UNDILATED = (1, 1)


def cases() -> Iterator[Any]:
    for label, core in CORES.items():
        power_of_two = core.width[0] == core.width[1] and core.width[0].bit_count() == 1
        further = {s for s in POWERS if power_of_two and s <= core.width[0]}
        for group_size in sorted({*core.group_sizes, *further}):
            for precision in PRECISIONS:
                main = precision == PRECISIONS[0] or label == EVERY_PRECISION
                # Maps larger than 28×28 take most of the time: one size stands for them in a quick
                # run.
                fast = core.output_size[0] <= 28 or group_size == 4
                wanted = (power_of_two and label not in BETWEEN) or label in OTHER_SIZES
                quick = main and fast and wanted and group_size in core.group_sizes
                yield pytest.param(
                    label, group_size, *precision, marks=() if quick else pytest.mark.full
                )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("label", "group_size", "dtype", "memory_format"), list(cases()))
def test_grouped_convolution(
    compare: Callable[..., None],
    label: str,
    group_size: int,
    dtype: str,
    memory_format: str,
    operation: str,
) -> None:
    core = CORES[label]
    inputs, grads = _tensors(label, dtype)
    input, grad = inputs[memory_format], grads[memory_format]
    # The layer's own series, and the measured size where the paper does not give the layer that
    # one.
    series = sorted({*core.group_sizes, group_size})
    terms = [
        torch.randn(core.out_channels, s, *core.kernel_size, device=DEVICE, dtype=input.dtype)
        for s in series
    ]
    active = series.index(group_size) + 1
    with torch.inference_mode():
        weight = sum_terms(Series(terms, active), core.in_channels)
        formats = FORMATS if memory_format == "channels_last" else (memory_format,)
        baselines = {
            "library": {
                format: library(
                    operation,
                    core,
                    inputs[format],
                    grads[format],
                    weight.contiguous(memory_format=getattr(torch, format)),
                )
                for format in formats
            }
        }
        if operation != "input gradient":
            baselines["materialised"] = {
                memory_format: materialised(operation, core, input, grad, terms, active, weight)
            }
        expected = definition(operation, core, input, grad, terms, active)
        # Materialised goes through library: the baselines compute the same as ours.
        check_close(
            baselines.get("materialised", baselines["library"])[memory_format](), expected()
        )
        compare(
            ours(operation, core, input, grad, terms, active),
            expected,
            baselines,
            suite="grouped convolution",
            subject=label,
            setting=group_size,
            operation=operation,
            batch=len(input),
            dtype=dtype,
            memory_format=memory_format,
            macs=len(input)
            * convolution_macs(core.out_channels, group_size, core.kernel_size, core.output_size),
            # Each operation reads two of input, output and weights and writes the third.
            bytes=sum(tensor.nbytes for tensor in (input, grad, *terms[:active])),
        )


def ours(
    operation: str, core: Shape, input: Tensor, grad: Tensor, terms: list[Tensor], active: int
) -> Call:
    arguments = (input, terms, torch.tensor(active), None, core.stride, core.padding, UNDILATED)
    if operation == "forward":
        return partial(torch.ops.gross.series_conv2d.default, *arguments)
    needs = (operation == "input gradient", operation == "weight gradient", False)
    return partial(torch.ops.gross.series_conv2d_backward.default, grad, *arguments, needs)


def library(operation: str, core: Shape, input: Tensor, grad: Tensor, weight: Tensor) -> Call:
    groups = core.in_channels // weight.shape[1]
    arguments = (input, weight, None, core.stride, core.padding, UNDILATED, False, (0, 0), groups)
    if operation == "forward":
        return partial(torch.ops.aten.convolution.default, *arguments)
    needs = (operation == "input gradient", operation == "weight gradient", False)
    return partial(torch.ops.aten.convolution_backward.default, grad, *arguments, needs)


def materialised(
    operation: str,
    core: Shape,
    input: Tensor,
    grad: Tensor,
    terms: list[Tensor],
    active: int,
    weight: Tensor,
) -> Call:
    def forward() -> Tensor:
        return library(
            operation, core, input, grad, sum_terms(Series(terms, active), core.in_channels)
        )()

    def weight_gradient() -> list[Tensor]:
        _, whole, _ = library(operation, core, input, grad, weight)()
        parts = [restrict(whole, term.shape[1], core.in_channels) for term in terms[:active]]
        return parts + [torch.zeros_like(term) for term in terms[active:]]

    return forward if operation == "forward" else weight_gradient


def definition(
    operation: str, core: Shape, input: Tensor, grad: Tensor, terms: list[Tensor], active: int
) -> Call:
    arguments = (input, Series(terms, active), Geometry(core.stride, core.padding))
    if operation == "forward":
        return partial(reference.forward, *arguments)
    gradient = reference.input_grad if operation == "input gradient" else reference.weight_grad
    return partial(gradient, grad, *arguments)


@lru_cache(maxsize=1)
def _tensors(label: str, dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Input and output gradient in both memory formats; one set lives at a time."""
    core = CORES[label]
    batch = core.batch(DEVICE)
    shapes = (
        (batch, core.in_channels, *core.input_size),
        (batch, core.out_channels, *core.output_size),
    )
    input, grad = (
        torch.randn(shape, device=DEVICE, dtype=getattr(torch, dtype)) for shape in shapes
    )
    formats = {format: getattr(torch, format) for format in FORMATS}
    return (
        {format: input.contiguous(memory_format=value) for format, value in formats.items()},
        {format: grad.contiguous(memory_format=value) for format, value in formats.items()},
    )
