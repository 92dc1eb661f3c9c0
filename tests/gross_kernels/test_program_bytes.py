"""Programs whose values are held in 8 bits against exact integers: sums bit for bit, what is rounded
to 8 bits within the float error of the number that is rounded."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gross_kernels.program import (
    ACTIVATIONS,
    KINDS,
    Program,
    Quantised,
    Step,
    Steps,
    define,
    from_text,
    run,
)

POOLING = ("max_pool", "mean_pool", "mean", "quantise")
EPSILON = 2.0**-23


@dataclass
class Case:
    """One step between two that quantise its source and its residual, and one that brings its
    result back: numbers in, numbers out, and what every value between them has to be."""

    steps: Steps
    weights: list[Tensor]
    #: q of the source, and what is added: q, numbers or nothing.
    source: Tensor
    residual: Tensor | None

    def inputs(self) -> list[Tensor]:
        """Numbers that are held without an error."""
        residual = self.steps.held(3)
        given = [self.steps.held(2).value(self.source)]
        if self.residual is None:
            return [given[0], given[0]]
        return [given[0], self.residual if residual is None else residual.value(self.residual)]

    def run(self) -> Tensor:
        packed = self.steps.pack(self.weights, torch.empty(0))
        return run(self.inputs(), packed, self.steps.text())[0]

    @property
    def step(self) -> Step:
        return self.steps.steps[2]

    def sum(self) -> tuple[Tensor, Tensor]:
        """The step's sum in float64, and by how much it may be wrong: of r every rounding to 8
        bits that float32 may do otherwise."""
        step, held = self.step, self.steps.held(2)
        q = self.source.double() - held.zero
        if step.kind == "max_pool":
            window = (step.kernel_size, step.stride, step.padding)
            return held.scale * F.max_pool2d(q, *window), torch.zeros(())
        if step.kind == "mean_pool":
            window = (step.kernel_size, step.stride, step.padding)
            return held.scale * F.avg_pool2d(q, *window), torch.zeros(())
        if step.kind == "mean":
            return held.scale * q.mean((2, 3), keepdim=True), torch.zeros(())
        if step.kind == "quantise":
            return held.scale * q, torch.zeros(())
        kernels = [w.double() for w in self.weights[step.weights : step.weights + 3]]
        scales = [w.double() for w in self.weights[step.scales : step.scales + 3]]
        geometry = (None, step.stride, step.padding, step.dilation)
        if step.kind == "convolution":
            total = F.conv2d(q, kernels[0], *geometry)
            return total * held.scale * scales[0].view(-1, 1, 1), torch.zeros(())
        if step.kind == "linear":
            total = F.linear(q.permute(0, 2, 3, 1).flatten(1), kernels[0][:, :, 0, 0])
            return total * held.scale * scales[0], torch.zeros(())
        groups = step.width[0] // step.group_size
        p = F.conv2d(q, kernels[0]) * (held.scale * scales[0]).view(-1, 1, 1)
        r = F.conv2d(p, kernels[1], *geometry, groups) / scales[1].view(-1, 1, 1)
        size = F.conv2d(p.abs(), kernels[1].abs(), *geometry, groups) / scales[1].view(-1, 1, 1)
        error = EPSILON * (step.group_size * kernels[1][0, 0].numel() + 8) * size
        ties = ((r - r.floor() - 0.5).abs() <= error) & (r.abs() < 127.5 + error)
        assert ties.double().mean() < 0.01  # else what follows proves nothing
        r = r.round().clamp(-127, 127)
        scale = scales[2].view(-1, 1, 1)
        return F.conv2d(r, kernels[2]) * scale, F.conv2d(ties.double(), kernels[2].abs()) * scale

    def check(self) -> None:
        step = self.step
        value, slack = self.sum()
        size = value.abs()
        if step.bias >= 0:
            bias = self.weights[step.bias].double().view(-1, *[1] * (value.dim() - 2))
            value, size = value + bias, size + bias.abs()
        residual = None
        if self.residual is not None:
            held = self.steps.held(3)
            residual = self.residual.double()
            residual = residual if held is None else held.scale * (residual - held.zero)
            size = size + residual.abs()
        if residual is not None and not step.residual_last:
            value = value + residual
        if step.activation == "prelu":
            value = F.prelu(value, self.weights[step.slopes].double())
        elif step.activation != "none":
            value = getattr(F, step.activation)(value)
        if residual is not None and step.residual_last:
            value = value + residual
        # Slopes of PReLU and SiLU are at most 1.1.
        allowed = 8 * EPSILON * size + 1.1 * slack
        found, held = self.run().double(), self.steps.held(4)
        if held is not None:
            q = found / held.scale + held.zero
            assert (q - q.round()).abs().max() < 0.01
            value = (value / held.scale + held.zero).clamp(0, 255)
            found, allowed = q.round(), 0.5 + allowed / held.scale
        wrong = (found - value).abs() - allowed
        assert found.shape == value.shape
        assert wrong.numel() == 0 or wrong.max() <= 0, (float(wrong.max()), self.steps)


class Draw:
    """A random case."""

    def __init__(self, seed: int, bits: int = 8) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.most = 2 ** (bits - 1) - 1
        self.weights: list[Tensor] = []

    def add(self, weight: Tensor) -> int:
        self.weights.append(weight)
        return len(self.weights) - 1

    def bytes(self, *shape: int) -> Tensor:
        q = torch.randint(0, 256, shape, generator=self.torch, dtype=torch.uint8)
        return q.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else q

    def whole(self, *shape: int) -> Tensor:
        return torch.randint(
            -self.most, self.most + 1, shape, generator=self.torch, dtype=torch.int8
        )

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.torch)

    def scale(self, *shape: int) -> Tensor:
        return 0.5 + torch.rand(shape, generator=self.torch)

    def held(self, size: float) -> Quantised:
        """One whose range holds some of what is `size` in the mean, and saturates at the rest."""
        zero = self.random.choice([0, 0, 128, 255, 7])
        return Quantised(size * self.random.choice([0.01, 0.02]), zero)

    def case(self, kind: str, **end: object) -> Case | None:
        choice = self.random.choice
        images, height, width = choice([1, 2, 3, 5]), choice([1, 2, 7, 16]), choice([1, 4, 7, 17])
        channels = choice([1, 3, 4, 16, 20, 33, 64])
        step = Step(kind, 2, activation=choice(ACTIVATIONS[:2] + ACTIVATIONS[3:]))
        if kind == "mean":
            size: tuple[int, ...] = (1, 1)
        elif kind in ("linear", "quantise"):
            size = () if kind == "linear" else (height, width)
        else:
            step, size = self._window(step, (height, width))
            if min(size) < 1:
                return None
        source = Quantised(0.5 + self.random.random(), choice([0, 0, 128, 255, 3]))
        # What sums are like, so that scales of the targets fit.
        typical = 100.0 * source.scale
        outputs = channels
        if kind not in POOLING:
            outputs = choice([1, 7, 16, 33, 64])
            step, typical = self._weighted(step, channels, height * width, outputs, typical)
        step = replace(step, **end)
        if step.activation == "prelu":
            step = replace(step, slopes=self.add(torch.rand(outputs, generator=self.torch)))
        residual: Tensor | None = None
        other: Quantised | None = None
        if kind != "linear" and choice([True, False]):
            step = replace(step, residual=3, residual_last=choice([True, False]))
            shape = (images, outputs, *size)
            other = choice([None, self.held(typical)])
            residual = typical * self.numbers(*shape) if other is None else self.bytes(*shape)
        target = choice([None, self.held(typical)])
        steps = (Step("quantise", 0), Step("quantise", 1), step, Step("quantise", 4))
        held = (None, None, source, other, target, None)
        case = Steps(steps, 2, (5,), held)
        return Case(case, self.weights, self.bytes(images, channels, height, width), residual)

    def _window(self, step: Step, size: tuple[int, int]) -> tuple[Step, tuple[int, ...]]:
        choice = self.random.choice
        pools = step.kind in POOLING
        kernel = (choice([1, 1, 2, 3, 7]), choice([1, 1, 2, 3, 7]))
        stride = choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 2)])
        dilation = (1, 1) if pools else choice([(1, 1), (1, 1), (2, 2), (1, 3)])
        most = tuple(k // 2 for k in kernel) if pools else tuple(k + 1 for k in kernel)
        padding = choice([(0, 0), tuple(k // 2 for k in kernel), most])
        step = replace(step, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation)
        return step, tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
        )

    def _weighted(
        self, step: Step, channels: int, pixels: int, outputs: int, size: float
    ) -> tuple[Step, float]:
        kernel, inputs = step.kernel_size, channels
        if step.kind == "linear":
            inputs, kernel = channels * pixels, (1, 1)
        size *= self.most / 2
        if step.kind == "layer":
            group, groups = self.random.choice([1, 2, 4, 8]), self.random.choice([1, 2, 5])
            widths = (group * groups, groups * self.random.choice([1, 3, 8]))
            size *= inputs**0.5
            first = self.add(self.whole(widths[0], inputs, 1, 1))
            terms = group * kernel[0] * kernel[1]
            self.add(self.numbers(widths[1], group, *kernel) / terms**0.5)
            self.add(self.whole(outputs, widths[1], 1, 1))
            scales = self.add(self.scale(widths[0]))
            self.add(self.scale(widths[1]) * size / 60)
            self.add(self.scale(outputs))
            size = 60 * self.most / 2 * widths[1] ** 0.5
        else:
            group, widths = inputs, (inputs, outputs)
            size *= (inputs * kernel[0] * kernel[1]) ** 0.5
            first = self.add(self.whole(outputs, inputs, *kernel))
            scales = self.add(self.scale(outputs))
        step = replace(
            step, in_channels=inputs, width=widths, group_size=group, out_channels=outputs,
            weights=first, scales=scales,
        )  # fmt: skip
        if self.random.random() < 0.7:
            step = replace(step, bias=self.add(size * self.numbers(outputs)))
        return step, size


@pytest.mark.parametrize("bits", [8, 7])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(seed=st.integers(0, 2**31))
def test_random_steps(kind: str, bits: int, seed: int) -> None:
    """Catches a product, a tap, a channel or an end that is lost or taken twice, a padding that is
    not the zero point, and a rounding to another number than the nearest."""
    case = Draw(seed, bits).case(kind)
    if case is not None:
        case.check()
