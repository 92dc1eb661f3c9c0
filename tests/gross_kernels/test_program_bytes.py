"""Programs whose values are held in 8 bits against exact integers: sums bit for bit, and what
is rounded to 8 bits within the float error of the number that is rounded."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gross_kernels.environment import instruction_set
from gross_kernels.program import (
    ACTIVATIONS,
    KINDS,
    Program,
    Quantised,
    Step,
    Steps,
    Words,
    define,
    from_text,
    run,
)

POOLING = ("max_pool", "mean_pool", "mean", "quantise")
EPSILON = 2.0**-23


def words(
    held: Quantised, first: Tensor, middle: Tensor, scales: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What p's sums are divided by, R in whole numbers, and r's steps for each of its sums, number
    by number: :class:`gross_kernels.program.Words` says what they are."""
    terms, taps = middle[0].numel(), middle[0, 0].numel()
    most = min(32767, math.floor(2**19 / math.sqrt(terms)))
    divisors, bounds = [], []
    for row in first.flatten(1).tolist():
        ends = [(-held.zero * w, (255 - held.zero) * w) for w in row]
        reach = int(max(sum(map(max, ends)), -sum(map(min, ends))))
        n = 0
        while (reach + 2**n // 2) >> n > most:
            n += 1
        divisors.append(2.0**n)
        bounds.append((reach + 2**n // 2) >> n)
    whole, steps = [], []
    outputs = len(middle) // (len(first) // middle.shape[1])
    scale = float(torch.tensor(held.scale))
    for o, row in enumerate(middle.flatten(1).tolist()):
        inputs = [o // outputs * middle.shape[1] + i // taps for i in range(terms)]
        row = [
            w * (scale * float(scales[0][c]) * divisors[c] / float(scales[1][o]))
            for w, c in zip(row, inputs, strict=True)
        ]
        size = sum(abs(w) * bounds[c] for w, c in zip(row, inputs, strict=True))
        rounded = sum(bounds[c] for c in inputs) / 2
        times = min(32767 / max(map(abs, row)), (2**31 - 1 - rounded) / size) if size else 1.0
        whole.append([round(w * times) for w in row])
        steps.append(1 / times)
    return (
        torch.tensor(divisors, dtype=torch.float64),
        torch.tensor(whole, dtype=torch.float64).view_as(middle),
        torch.tensor(steps, dtype=torch.float32),
    )


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

    def sum(self) -> Tensor:
        """The step's sum in float64."""
        step, held = self.step, self.steps.held(2)
        q = self.source.double() - held.zero
        if step.kind == "max_pool":
            window = (step.kernel_size, step.stride, step.padding)
            return held.scale * F.max_pool2d(q, *window)
        if step.kind == "mean_pool":
            window = (step.kernel_size, step.stride, step.padding)
            return held.scale * F.avg_pool2d(q, *window)
        if step.kind == "mean":
            return held.scale * q.mean((2, 3), keepdim=True)
        if step.kind == "quantise":
            return held.scale * q
        kernels = [w.double() for w in self.weights[step.weights : step.weights + 3]]
        scales = [w.double() for w in self.weights[step.scales : step.scales + 3]]
        geometry = (None, step.stride, step.padding, step.dilation)
        if step.kind == "convolution":
            total = F.conv2d(q, kernels[0], *geometry)
            return total * held.scale * scales[0].view(-1, 1, 1)
        if step.kind == "linear":
            total = F.linear(q.permute(0, 2, 3, 1).flatten(1), kernels[0][:, :, 0, 0])
            return total * held.scale * scales[0]
        groups = step.width[0] // step.group_size
        divisors, middle, steps = words(held, kernels[0], kernels[1], scales)
        p = F.conv2d(q, kernels[0]) / divisors.view(-1, 1, 1)
        p = torch.where(divisors.view(-1, 1, 1) > 1, (p + 0.5).floor(), p)
        r = F.conv2d(p, middle, *geometry, groups).float()
        r = (r * steps.view(-1, 1, 1)).double().round().clamp(-127, 127)
        scale = scales[2].view(-1, 1, 1)
        return F.conv2d(r, kernels[2]) * scale

    def check(self) -> None:
        step = self.step
        value = self.sum()
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
        allowed = 8 * EPSILON * size
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


ENDS = [
    (activation, residual, last, target)
    for activation in ACTIVATIONS
    for residual in ("none", "numbers", "bytes")
    for last in (False, True)
    for target in ("numbers", "bytes")
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_every_end(kind: str) -> None:
    """Catches an activation, a residual or a form of the output that one kind of step does without,
    or takes in another order."""
    for activation, residual, last, target in ENDS:
        if (activation == "prelu" and kind in POOLING) or (kind == "linear" and residual != "none"):
            continue
        draw = Draw(7)
        draw.random.choice = lambda values: values[-1]  # type: ignore[method-assign]
        case = draw.case(kind, activation=activation)
        assert case is not None
        held = list(case.steps.quantised)
        alike = held[4]
        other = None
        if residual != "none":
            assert alike is not None
            held[3] = alike if residual == "bytes" else None
            shape = tuple(case.sum().shape)
            other = draw.bytes(*shape) if residual == "bytes" else draw.numbers(*shape)
        if target == "numbers":
            held[4] = None
        steps = list(case.steps.steps)
        steps[2] = replace(steps[2], residual=-1 if residual == "none" else 3, residual_last=last)
        case.steps = replace(case.steps, steps=tuple(steps), quantised=tuple(held))
        case.residual = other
        case.check()


@pytest.mark.parametrize("most", [63, 127])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", ["convolution", "linear", "layer"])
def test_the_largest_sums(kind: str, sign: int, most: int) -> None:
    """Catches sums of two products that saturate in 16 bits, and sums that pass 32: all bytes 255,
    all weights the largest. The sum of integers is exact where float32 holds it."""
    source = Quantised(1.0)
    channels = 512 if kind == "convolution" else 4096 if kind == "linear" else 300
    shape = (64, channels, 3, 3) if kind == "convolution" else (64, channels, 1, 1)
    weight = torch.full(shape, sign * most, dtype=torch.int8)
    step = Step(
        kind, 1, in_channels=channels, width=(channels, 64), group_size=channels, out_channels=64,
        kernel_size=shape[2:], padding=(shape[2] // 2, shape[3] // 2), weights=0, scales=1,
    )  # fmt: skip
    weights = [weight, torch.ones(64)]
    total = 255.0 * sign * most * channels * shape[2] * shape[3]
    if kind == "layer":
        # p is that sum, R takes it as it is, and r has 127 steps of it.
        step = replace(step, width=(64, 64), group_size=1, scales=3)
        middle, last = torch.ones(64, 1, 1, 1), torch.full((64, 64, 1, 1), most, dtype=torch.int8)
        weights = [weight, middle, last, torch.ones(64), torch.full((64,), abs(total) / 127)]
        weights.append(torch.ones(64))
        total = sign * 127.0 * most * 64
    steps = Steps((Step("quantise", 0), step), 1, (2,), (None, source, None))
    input = torch.full((1, channels, 3, 3) if kind == "convolution" else (1, channels), 255.0)
    input = input if kind != "layer" else input[..., None, None]
    found = run([input], steps.pack(weights, input), steps.text())[0]
    found = found[..., 1, 1] if kind == "convolution" else found.flatten(1)
    assert torch.equal(found, torch.full_like(found, total))


@pytest.mark.parametrize("group_size", [1, 2, 4, 16, 32])
@pytest.mark.parametrize("channels", [32, 64, 512])
def test_what_16_bits_lose(channels: int, group_size: int) -> None:
    """Catches whole numbers of p or R that are too coarse: r loses a fifth of what its rounding to
    8 bits loses, at most, which is 1/√12 of a step."""
    draw, held = Draw(channels + group_size), Quantised(0.02, 40)
    first = draw.numbers(channels, channels)
    first = first / first.abs().amax(1, keepdim=True) * draw.most
    middle = draw.numbers(channels, group_size, 3, 3) * draw.scale(channels, 1, 1, 1)
    scales = [draw.scale(channels), draw.scale(channels)]
    q = 40 + 40 * torch.randn(2, channels, 9, 9, generator=draw.torch)
    q = q.clamp(0, 255).round().double() - held.zero
    p = F.conv2d(q, first.round().double()[..., None, None])
    groups = channels // group_size
    exact = F.conv2d(
        p * float(torch.tensor(held.scale)) * scales[0].double().view(-1, 1, 1),
        middle.double(), padding=1, groups=groups,
    )  # fmt: skip
    # The largest of each channel is 127 steps.
    scales[1] = (exact.abs().amax((0, 2, 3)) / 127).float()
    words = Words.of(held, first.round().to(torch.int8)[..., None, None], middle, scales)
    assert words.middle.abs().max() <= 32767
    r = F.conv2d(words.p(p), words.middle, padding=1, groups=groups)
    assert r.abs().max() < 2**31
    lost = r * words.steps.double().view(-1, 1, 1) - exact / scales[1].double().view(-1, 1, 1)
    assert lost.square().mean().sqrt() < 1 / 5 / 12**0.5


FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
CAPABILITY = torch.backends.cpu.get_cpu_capability()
ISAS = ["portable", *["avx2"] * (CAPABILITY in ("AVX2", "AVX512"))]
ISAS += ["avxvnni"] * ("avx_vnni" in FLAGS)
ISAS += ["avx512"] * (CAPABILITY == "AVX512") + ["avx512vnni"] * ("avx512_vnni" in FLAGS)
#: Without that of this process; with AVX512_BF16, 8 bits have the same code as without.
OTHERS = [isa for isa in ISAS if isa != instruction_set().replace("bf16", "vnni")]

DIGESTS = """
import hashlib, sys, torch
sys.path[:0] = sys.argv[1:]
from test_program_bytes import KINDS, Draw
for kind in ("layer", "convolution", "linear", "max_pool"):
    for seed in range(40):
        case = Draw(seed).case(kind, activation="none", bias=-1)
        if case is not None and case.residual is None and case.steps.held(4) is None:
            print(kind, seed, hashlib.sha256(case.run().contiguous().numpy().tobytes()).hexdigest())
"""


def test_every_instruction_set_has_the_same_sums() -> None:
    """Catches an instruction set whose sums of integers differ in one bit."""
    found = set()
    for isa in ISAS:
        result = subprocess.run(
            [sys.executable, "-c", DIGESTS, str(Path(__file__).parent)],
            env=os.environ | {"GROSS_KERNELS_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("\n") > 20
        found.add(result.stdout)
    assert len(found) == 1


@pytest.mark.parametrize("isa", OTHERS)
def test_programs_for_other_processors(isa: str, pytestconfig: pytest.Config) -> None:
    """Catches a fault in kernels that a lesser processor than this one would run."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *options,
            "-k",
            "random or every_end or largest",
            __file__,
        ],
        env=os.environ | {"GROSS_KERNELS_ISA": isa},
        cwd=str(pytestconfig.rootpath),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert f"{3 * len(KINDS) + 12} passed" in result.stdout


# Calls --------------------------------------------------------------------------------------------


def block(size: int = 40) -> tuple[Steps, list[Tensor]]:
    """Two layers with a residual that the second overwrites, a convolution, pooling and a
    classifier."""
    draw = Draw(3)
    held = Quantised(0.04, 11)
    layer = Step(
        "layer", 1, in_channels=24, width=(20, 40), group_size=4, out_channels=24,
        kernel_size=(3, 3), padding=(1, 1), weights=0, scales=3, bias=6, activation="relu",
    )  # fmt: skip
    weights = [draw.whole(20, 24, 1, 1), draw.numbers(40, 4, 3, 3), draw.whole(24, 40, 1, 1)]
    weights += [draw.scale(20) / 300, draw.scale(40) / 10, draw.scale(24) / 3000, draw.numbers(24)]
    weights += [draw.whole(33, 24, 3, 3), draw.scale(33) / 1000]
    weights += [draw.whole(10, 33, 1, 1), draw.scale(10) / 100]
    steps = (
        Step("quantise", 0),
        layer,
        replace(layer, source=2, residual=2),
        Step(
            "convolution", 3, in_channels=24, width=(24, 33), group_size=24, out_channels=33,
            kernel_size=(3, 3), padding=(1, 1), weights=7, scales=8,
        ),
        Step("max_pool", 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)),
        Step("mean", 5),
        Step(
            "linear", 6, in_channels=33, width=(33, 10), group_size=33, out_channels=10,
            weights=9, scales=10,
        ),
        Step("quantise", 4),
    )  # fmt: skip
    forms = (None, *[held] * 6, None, None)
    return Steps(steps, 1, (7, 8), forms), weights


def test_threads_and_repetition_change_no_bit(threads: None) -> None:
    """Catches work that is split so that results depend on it, and memory of an earlier call that
    is read."""
    steps, weights = block()
    for images, size in ((2, 40), (1, 5)):
        input = torch.randn(images, 24, size, size)
        packed = steps.pack(weights, input)
        torch.set_num_threads(1)
        expected = run([input], packed, steps.text())
        for result, wanted in zip(expected, define([input], weights, steps), strict=True):
            # A number at a tie may be rounded otherwise, and change some others by a step.
            assert (result - wanted).abs().mean() < 0.02 * wanted.abs().mean()
        for count in (2, 1, 3):
            torch.set_num_threads(count)
            run([torch.full((3, 24, 50, 50), torch.nan)], packed, steps.text())
            assert all(map(torch.equal, run([input], packed, steps.text()), expected))


def test_inputs_without_a_number() -> None:
    """Catches numbers that are not finite and become another byte than an end of the range."""
    held = Quantised(0.5, 100)
    steps = Steps((Step("quantise", 0), Step("quantise", 1)), 1, (2,), (None, held, None))
    input = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 3e9, 0.25, 0.75]])
    for images in (input, input.repeat(1, 3)):
        found = run([images], steps.pack([], images), steps.text())[0]
        assert torch.equal(found, define([images], [], steps)[0])
    assert found[0, :8].tolist() == [77.5, -50, -50, 77.5, -50, 77.5, 0, 1]


LAYOUTS = {
    "contiguous": lambda n, c, h, w: torch.randn(n, c, h, w),
    "channels_last": lambda n, c, h, w: torch.randn(n, h, w, c).permute(0, 3, 1, 2),
    "some_rows": lambda n, c, h, w: torch.randn(n, c, h + 2, w)[:, :, 1:-1],
    "some_columns": lambda n, c, h, w: torch.randn(n, c, h, w + 1)[..., 1:],
    "every_second_column": lambda n, c, h, w: torch.randn(n, c, h, 2 * w)[..., ::2],
    "some_channels": lambda n, c, h, w: torch.randn(n, h, w, c + 3).permute(0, 3, 1, 2)[:, 3:],
    "turned": lambda n, c, h, w: torch.randn(n, c, w, h).transpose(2, 3),
    "one_image_for_all": lambda n, c, h, w: torch.randn(1, c, h, w).expand(n, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_strides(layout: str) -> None:
    """Catches a number that becomes the byte of another channel, pixel, row or image, and one that
    is written over by its neighbour's: all channels, of whole vectors of pixels and of fewer."""
    torch.manual_seed(0)
    held = Quantised(2.0**-5, 100)  # A power of two: no number is rounded on its way to a byte.
    steps = Steps((Step("quantise", 0), Step("quantise", 1)), 1, (2,), (None, held, None))
    packed = steps.pack([], torch.empty(0))
    for channels in (1, 2, 3, 4, 5, 31, 70):
        for size in ((1, 1), (1, 3), (3, 5), (7, 7), (4, 64), (2, 1000 // channels)):
            input = LAYOUTS[layout](2, channels, *size)
            found = run([input], packed, steps.text())[0]
            assert torch.equal(found, define([input], [], steps)[0]), (channels, size)


def test_text_module_and_state(tmp_path: Path) -> None:
    """Catches forms that are lost in the text, and a module that packs for int8 activations."""
    steps, weights = block()
    assert from_text(steps.text()) == steps
    network, input = Program(steps, weights, [False, False]), torch.randn(2, 24, 9, 9)
    expected = network(input)
    torch.save(network.state_dict(), tmp_path / "state.pt")
    other = Program(steps, [torch.zeros_like(weight) for weight in weights], [False, False])
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert all(map(torch.equal, other(input), expected))
    exported = torch.export.export(network, (input,)).module()
    assert all(map(torch.equal, exported(input), expected))


REFUSED = {
    "input": ({"quantised": {0: Quantised(1.0)}}, "scales: got an input held in 8 bits"),
    "returned": ({"quantised": {8: Quantised(1.0)}}, "returned: got 8, held in 8 bits"),
    "scale": ({"quantised": {2: Quantised(-1.0)}}, "scales: got -1, accepted are positive"),
    "infinite": ({"quantised": {2: Quantised(1e39)}}, "scales: got .*, accepted are positive"),
    "tiny": ({"quantised": {2: Quantised(1e-42)}}, "scales: got .*, accepted are positive"),
    "zero": ({"quantised": {2: Quantised(1.0, 256)}}, "zeros: got 256, accepted are 0 to 255"),
    "form": ({"quantised": {1: None}}, "got weights that read numbers and a residual or output"),
    "no_scales": ({"step": {"scales": -1}}, "got weights of 8 bits without scales"),
    "scales": ({"step": {"scales": 4}}, r"weights\[4\]: accepted is \[20\]"),
    "dtype": ({"weight": (0, torch.float32)}, r"weights\[0\]: got float32, accepted is int8"),
    "middle": ({"weight": (1, torch.int8)}, r"weights\[1\]: got int8, accepted is a floating"),
    "double": ({"weight": (1, torch.float64)}, r"weights\[1\]: accepted is float32"),
    "residual": ({"step": {"residual": 0}}, "got an input as residual of a step of 8 bits"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(change: dict, message: str) -> None:
    """Catches a step of 8 bits that is packed and then reads or writes what is not there."""
    steps, weights = block()
    held = list(steps.quantised)
    for value, form in change.get("quantised", {}).items():
        held[value] = form
    first = replace(steps.steps[1], **change.get("step", {}))
    if "weight" in change:
        index, dtype = change["weight"]
        weights[index] = weights[index].to(dtype)
    changed = replace(steps, steps=(steps.steps[0], first, *steps.steps[2:]), quantised=tuple(held))
    with pytest.raises(RuntimeError, match=message):
        changed.pack(weights, torch.empty(0))


@pytest.mark.parametrize(
    ("index", "number"), [(1, torch.nan), (1, torch.inf), (3, -1.0), (4, torch.inf)]
)
def test_numbers_that_16_bits_have_no_place_for(index: int, number: float) -> None:
    """Catches R that becomes some whole number though it is none."""
    steps, weights = block()
    weights[index].view(-1)[-1] = number
    with pytest.raises(RuntimeError, match="got R of a layer of 8 bits, or scales of p or r, with"):
        steps.pack(weights, torch.empty(0))


def test_a_channel_without_steps() -> None:
    """Catches a division by the scale of a channel of r that is always zero."""
    steps, weights = block()
    weights[4][5] = 0.0
    input = torch.randn(1, 24, 9, 9)
    found = run([input], steps.pack(weights, input), steps.text())
    assert all(map(torch.equal, found, define([input], weights, steps)))


def test_sums_that_32_bits_do_not_hold() -> None:
    """Catches sums that wrap around."""
    channels = 65_800
    step = Step(
        "linear", 1, in_channels=channels, width=(channels, 1), group_size=channels,
        out_channels=1, weights=0, scales=1,
    )  # fmt: skip
    weights = [torch.ones(1, channels, 1, 1, dtype=torch.int8), torch.ones(1)]
    steps = Steps((Step("quantise", 0), step), 1, (2,), (None, Quantised(1.0), None))
    with pytest.raises(RuntimeError, match="got sums of 65800 products of 8 bits, accepted are"):
        steps.pack(weights, torch.empty(0))


def test_only_float32() -> None:
    """Catches a program that is packed for activations which its kernels do not have."""
    steps, weights = block()
    with pytest.raises(RuntimeError, match="like: got bfloat16, accepted with values of 8 bits"):
        steps.pack(weights, torch.empty(0, dtype=torch.bfloat16))
