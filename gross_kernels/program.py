"""Programs: a network, or a part of one, that runs in one call of the operator
``gross::program_run``.

A program is a list of :class:`Step`: layers, convolutions, linear layers and pooling, each with all
that follows it until its output is stored: ``act(x + bias + residual)``, or ``act(x + bias) +
residual``. Between steps a value is held as numbers, or in 8 bits (:class:`Quantised`), and a step
that reads 8 bits sums products of integers. ``gross::program_pack`` puts the steps and their
weights into one tensor of bytes, in the order of this processor's kernels. Between the steps
nothing returns to torch, and nothing is allocated: on the CPU a step costs a few microseconds
beside its arithmetic.

:func:`define` is what a program computes, in PyTorch's own operators."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from . import ops
from .epilogue import ACTIVATIONS, Epilogue
from .geometry import Geometry
from .grouped_pointwise import grouped_pointwise
from .series import convolution_macs

KINDS = ("layer", "convolution", "linear", "max_pool", "mean_pool", "mean", "quantise")

_library = torch.library.Library("gross", "FRAGMENT")
for _schema in (
    "program_pack(Tensor like, Tensor[] weights, int[] steps, int inputs, int[] returned, "
    "float[] scales=[], int[] zeros=[]) -> Tensor",
    "program_run(Tensor[] inputs, Tensor program, str steps) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.cudagraph_unsafe,))


@dataclass(frozen=True)
class Step:
    """One step of a program. Values are numbered: the program's inputs first, then what each step
    writes.

    Attributes:
        kind: one of :data:`KINDS`. "layer" is pointwise → grouped → pointwise; "convolution" has
            the channels ``width_in`` → ``width_out``, which are ``in_channels`` →
            ``out_channels``; "linear" reads all channels of all pixels, pixel by pixel, as one;
            "mean" is over whole images; "quantise" copies its source into the form that its target
            has, between numbers and 8 bits or from one scale to another.
        source, residual: the values that it reads; -1 for no residual.
        activation: one of :data:`ACTIVATIONS`.
        residual_last: whether the residual is added after the activation.
        weights: number of its first weight (P, R and Q of a layer), -1 for none.
        bias, slopes: numbers of its other weights, -1 for none.
        scales: of a step that reads 8 bits: number of its first scales, float32, one for each
            output channel of its weights: of P ``[width_in]``, of r ``[width_out]`` and of Q
            ``[out_channels]`` of a layer, else ``[out_channels]``.

    Weights of a step that reads 8 bits are int8, but for R, which is float32 and is packed in 16
    bits (:class:`Words`). r is rounded once per channel, to −127 … 127 steps of its scale. Q's
    columns hold r's scales already: they were multiplied in before Q was quantised.
    """

    kind: str
    source: int
    residual: int = -1
    activation: str = "none"
    residual_last: bool = False
    in_channels: int = 0
    width: tuple[int, int] = (0, 0)
    group_size: int = 0
    out_channels: int = 0
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    weights: int = -1
    bias: int = -1
    slopes: int = -1
    scales: int = -1

    def numbers(self, target: int) -> list[int]:
        """The step as csrc/program.h reads it."""
        return [
            KINDS.index(self.kind),
            self.source,
            target,
            self.residual,
            ACTIVATIONS.index(self.activation),
            int(self.residual_last),
            self.in_channels,
            *self.width,
            self.group_size,
            self.out_channels,
            *self.kernel_size,
            *self.stride,
            *self.padding,
            *self.dilation,
            self.weights,
            self.bias,
            self.slopes,
            self.scales,
            0,
        ]


@dataclass(frozen=True)
class Quantised:
    """How a value is held in 8 bits: q of 0 … 255 stands for ``scale · (q − zero)``."""

    scale: float
    zero: int = 0

    def quantise(self, value: Tensor) -> Tensor:
        """The nearest q, ties to even, as uint8; what is out of range, or is not a number, becomes
        the nearest end, or the lower one."""
        steps = (value / self.scale).round().nan_to_num(-self.zero)
        return (steps.clamp(-self.zero, 255 - self.zero) + self.zero).to(torch.uint8)

    def value(self, q: Tensor) -> Tensor:
        """``scale · (q − zero)`` in float32."""
        return self.scale * (q.to(torch.float32) - self.zero)


@dataclass(frozen=True)
class Steps:
    """A program without its weights: its steps, how many inputs it has, which values it returns,
    and how each of its values is held: None stands for numbers of the inputs' dtype. Inputs and
    returned values are numbers. Empty where all are."""

    steps: tuple[Step, ...]
    inputs: int
    returned: tuple[int, ...]
    quantised: tuple[Quantised | None, ...] = ()

    def held(self, value: int) -> Quantised | None:
        """How a value is held."""
        return self.quantised[value] if self.quantised else None

    def pack(self, weights: Sequence[Tensor], like: Tensor) -> Tensor:
        """The program with its weights in this processor's order, for activations of ``like``'s
        dtype: a tensor of bytes."""
        numbers = [
            number for i, step in enumerate(self.steps) for number in step.numbers(self.inputs + i)
        ]
        # A scale of 0 stands for numbers.
        held = [self.held(i) or Quantised(0.0) for i in range(self.inputs + len(self.steps))]
        return torch.ops.gross.program_pack(
            like,
            list(weights),
            numbers,
            self.inputs,
            list(self.returned),
            [of.scale for of in held],
            [of.zero for of in held],
        )

    def text(self) -> str:
        """The same as text, for :func:`from_text`."""
        steps = [astuple(step) for step in self.steps]
        held = [of and astuple(of) for of in self.quantised]
        return json.dumps([steps, self.inputs, self.returned, held], separators=(",", ":"))


def from_text(text: str) -> Steps:
    """The steps that :meth:`Steps.text` wrote."""
    rows, inputs, returned, held = json.loads(text)
    names = [field.name for field in fields(Step)]
    steps = []
    for row in rows:
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in zip(names, row, strict=True)
        }
        steps.append(Step(**given))
    quantised = tuple(of and Quantised(*of) for of in held)
    return Steps(tuple(steps), inputs, tuple(returned), quantised)


def run(inputs: Sequence[Tensor], program: Tensor, text: str) -> list[Tensor]:
    """What the program returns for these inputs, ``[N, C, H, W]`` or ``[N, C]``, of the dtype that
    it was packed for; channels-last."""
    return torch.ops.gross.program_run.default(inputs, program, text)


def define(inputs: Sequence[Tensor], weights: Sequence[Tensor], steps: Steps) -> list[Tensor]:
    """What :func:`run` returns, in PyTorch's own operators; on a GPU the last two convolutions of a
    layer are one kernel unless there are gradients."""
    values = list(inputs)
    differentiable = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (*inputs, *weights)
    )

    def read(index: int) -> Tensor | None:
        held = steps.held(index) if index >= 0 else None
        value = values[index] if index >= 0 else None
        return value if held is None or value is None else held.value(value)

    for step in steps.steps:
        bias, slopes = (weights[i] if i >= 0 else None for i in (step.bias, step.slopes))
        epilogue = Epilogue(bias, read(step.residual), step.activation, slopes, step.residual_last)
        held, source = steps.held(step.source), values[step.source]
        if held is not None and step.weights >= 0:
            value = epilogue.of(_sum_of_integers(step, source, held, weights))
        elif step.kind == "layer" and source.is_cuda and not differentiable:
            value = _in_two(step, source, weights, epilogue)
        else:
            value = epilogue.of(_sum(step, source if held is None else held.value(source), weights))
        target = steps.held(len(values))
        values.append(value if target is None else target.quantise(value))
    return [values[i] for i in steps.returned]


def _per_channel(numbers: Tensor, value: Tensor) -> Tensor:
    return numbers.to(value.dtype).view(1, -1, *[1] * (value.dim() - 2))


def _sum(step: Step, source: Tensor, weights: Sequence[Tensor]) -> Tensor:
    if step.kind == "quantise":
        return source
    if step.kind == "max_pool":
        return F.max_pool2d(source, step.kernel_size, step.stride, step.padding, step.dilation)
    if step.kind == "mean_pool":
        return F.avg_pool2d(source, step.kernel_size, step.stride, step.padding)
    if step.kind == "mean":
        return source.mean((2, 3), keepdim=True)
    first, *others = [
        weight.to(source.dtype)
        for weight in weights[step.weights : step.weights + (3 if step.kind == "layer" else 1)]
    ]
    if step.kind == "linear":
        # Pixel by pixel, and of each all channels.
        pixels = source if source.dim() == 2 else source.permute(0, 2, 3, 1).flatten(1)
        return F.linear(pixels, first[:, :, 0, 0])
    geometry = (step.stride, step.padding, step.dilation, step.width[0] // step.group_size)
    if step.kind == "convolution":
        return F.conv2d(source, first, None, *geometry)
    middle, last = others
    return F.conv2d(F.conv2d(F.conv2d(source, first), middle, None, *geometry), last)


def _in_two(step: Step, source: Tensor, weights: Sequence[Tensor], epilogue: Epilogue) -> Tensor:
    """A layer whose last two convolutions, and what follows, are one kernel."""
    p, r, q = weights[step.weights : step.weights + 3]
    geometry = Geometry(step.stride, step.padding, step.dilation)
    one = torch.tensor(1, dtype=torch.int64, device="cpu")
    inner = F.conv2d(source, p.to(source.dtype))
    return grouped_pointwise(inner, [r], [q], one, None, geometry, epilogue)


def _sum_of_integers(
    step: Step, source: Tensor, held: Quantised, weights: Sequence[Tensor]
) -> Tensor:
    """The same of 8 bits: exact sums of integers, which float64 holds, times their scales in
    float32."""
    scales = weights[step.scales : step.scales + (3 if step.kind == "layer" else 1)]
    whole = source.double() - held.zero
    if step.kind != "layer":
        total = _sum(step, whole, weights).float()
        return total * _per_channel(held.scale * scales[0], total)
    first, middle, last = weights[step.weights : step.weights + 3]
    words = Words.of(held, first, middle, scales)
    p = words.p(F.conv2d(whole, first.double()))
    groups = step.width[0] // step.group_size
    r = F.conv2d(p, words.middle, None, step.stride, step.padding, step.dilation, groups).float()
    r = (r * _per_channel(words.steps, r)).round().clamp(-127, 127)
    total = F.conv2d(r.double(), last.double()).float()
    return total * _per_channel(scales[2], total)


@dataclass(frozen=True)
class Words:
    """p and R of a layer of 8 bits as whole numbers of 16 bits.

    P's sums of integers are divided by a power of two, each channel by the smallest for which the
    largest sum that any input gives is at most 32767, or 2¹⁹/√n where an output of R adds more
    than n = 256 products: p = ⌊sum / divisor + ½⌋. R becomes w = ⌊R · t · (what p's steps are in
    r's) + ½⌋, t the largest for which neither w passes 32767 nor Σ |w p| passes 2³¹ − 1, whatever
    the input. Nothing saturates, every sum is exact, and r = Σ w p / t steps.

    Attributes:
        divisors: float64, ``[width_in]``.
        middle: w, whole numbers in float64, like R.
        steps: 1/t, float32, ``[width_out]``.
    """

    divisors: Tensor
    middle: Tensor
    steps: Tensor

    @staticmethod
    def of(held: Quantised, first: Tensor, middle: Tensor, scales: Sequence[Tensor]) -> Words:
        """Those of the int8 weights P and float32 weights R of a layer whose input is ``held`` so;
        ``scales`` of P's outputs and of r."""
        weights = first.double().flatten(1)
        low, high = weights * -held.zero, weights * (255 - held.zero)
        reach = torch.stack((torch.maximum(low, high).sum(1), -torch.minimum(low, high).sum(1)))
        reach = reach.amax(0)
        terms = middle[0].numel()
        most = min(32767, math.floor(2**19 / math.sqrt(terms)))
        # The smallest power of two for which reach / divisor + ½ is below most + 1.
        divisors = torch.frexp(reach / (most + 0.5)).exponent.clamp_min(0).double().exp2()
        bounds = (reach / divisors + 0.5 * (divisors > 1)).floor()
        scale = float(torch.tensor(held.scale, dtype=torch.float32))
        # Of each output the inputs that it reads.
        groups = len(reach) // middle.shape[1]
        outputs = len(middle) // groups
        unit, bounds = (
            numbers.view(groups, 1, -1, 1, 1).expand(-1, outputs, -1, *middle.shape[2:])
            .reshape(middle.shape)
            for numbers in (scale * scales[0].double() * divisors, bounds)
        )  # fmt: skip
        step = scales[1].double().view(-1, 1, 1, 1)
        # Of a channel whose steps are 0 every r is.
        rows = torch.where(step > 0, middle.double() * (unit / step), 0.0)
        size, rounded = (rows.abs() * bounds).flatten(1).sum(1), bounds.flatten(1).sum(1) / 2
        times = torch.minimum(
            32767 / rows.abs().flatten(1).amax(1), (2**31 - 1 - rounded) / size
        ).where(size > 0, 1)
        whole = (rows * times.view(-1, 1, 1, 1)).round()
        return Words(divisors, whole, (1 / times).float())

    def p(self, sums: Tensor) -> Tensor:
        """p of P's sums, float64 both."""
        divisors = _per_channel(self.divisors, sums)
        return (sums / divisors + 0.5 * (divisors > 1)).floor()


class Program(nn.Module):
    """Steps of a network that run in one call.

    Args:
        steps: without weights.
        weights: of the steps, plain: they are this module's buffers, in ``state_dict`` and in what
            ``torch.export`` writes. Packed for this processor they are kept beside.
        flat: which outputs are ``[N, C]`` to the rest of the network though the program returns
            ``[N, C, 1, 1]``.

    On the CPU without gradients this is ``gross::program_run``, which refuses inputs of another
    dtype than the weights'; with gradients and on other devices it is the same in PyTorch's own
    operators.
    """

    def __init__(self, steps: Steps, weights: Sequence[Tensor], flat: Sequence[bool]) -> None:
        super().__init__()
        self.text = steps.text()
        self.flat = tuple(flat)
        for i, weight in enumerate(weights):
            self.register_buffer(f"weight_{i}", weight.detach().clone().contiguous())
        self._pack()

    def macs(self, inputs: Sequence[Sequence[int]]) -> int:
        """Multiply–accumulates for inputs of these shapes, as :func:`gross.macs` counts them."""
        return _macs(self.steps, inputs)

    def macs_in_8_bits(self, inputs: Sequence[Sequence[int]]) -> int:
        """Those of :meth:`macs` that multiply 8 bits: of a layer, the pointwise ones."""
        return _macs(self.steps, inputs, in_8_bits=True)

    @property
    def steps(self) -> Steps:
        return from_text(self.text)

    def _weights(self) -> list[Tensor]:
        return list(self._buffers.values())  # type: ignore[arg-type]

    def _like(self) -> Tensor:
        """An empty tensor of the activations' dtype."""
        weights = self._weights()
        real = [weight for weight in weights if weight.is_floating_point()]
        return real[0].new_empty(0) if real else torch.empty(0)

    def _pack(self) -> None:
        """Put the weights into this processor's order; called whenever they have changed."""
        weights, like = self._weights(), self._like()
        self._packed: Tensor | None = None
        if like.device.type == "cpu":
            self._packed = self.steps.pack(weights, like)

    def _apply(self, *args: Any, **kwargs: Any) -> Program:
        applied = super()._apply(*args, **kwargs)
        self._pack()
        return applied

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pack()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        packed = self._packed
        if torch.compiler.is_exporting():
            # A file is packed where it is loaded.
            packed = self.steps.pack(self._weights(), self._like())
        if packed is None or (
            torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        ):
            results = define(inputs, self._weights(), self.steps)
        else:
            results = run(inputs, packed, self.text)
        if any(self.flat):
            results = [
                result.flatten(1) if flat else result
                for result, flat in zip(results, self.flat, strict=True)
            ]
        return tuple(results)

    def extra_repr(self) -> str:
        return f"{len(self.steps.steps)} steps"


@torch.library.register_fake("gross::program_run", lib=_library)
def _program_shape(inputs: list[Tensor], program: Tensor, text: str) -> list[Tensor]:
    steps = from_text(text)
    shapes = _shapes(steps, [tensor.shape for tensor in inputs])
    return [
        inputs[0]
        .new_empty(shape)
        .contiguous(
            memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format
        )
        for shape in (shapes[i] for i in steps.returned)
    ]


def _shapes(steps: Steps, inputs: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Those of all values."""
    shapes = [tuple(shape) for shape in inputs]
    for step in steps.steps:
        shapes.append(_shape(step, shapes[step.source]))
    return shapes


def _macs(steps: Steps, inputs: Sequence[Sequence[int]], in_8_bits: bool = False) -> int:
    """Every product once, and one more per output of a convolution with a bias; or those of 8 bits
    alone, without biases."""
    shapes = _shapes(steps, inputs)
    total = 0
    for step, output in zip(steps.steps, shapes[len(inputs) :], strict=True):
        if step.weights < 0 or (in_8_bits and step.scales < 0):
            continue
        images, size = output[0], output[2:] or (1, 1)
        has_bias = step.bias >= 0 and step.kind != "linear" and not in_8_bits
        if step.kind == "layer":
            before = shapes[step.source][2:]
            total += images * convolution_macs(step.width[0], step.in_channels, (1, 1), before)
            if not in_8_bits:
                total += images * convolution_macs(
                    step.width[1], step.group_size, step.kernel_size, size
                )
            total += images * convolution_macs(
                step.out_channels, step.width[1], (1, 1), size, has_bias
            )
        else:
            total += images * convolution_macs(
                step.out_channels, step.group_size, step.kernel_size, size, has_bias
            )
    return total


@register_flop_formula(torch.ops.gross.program_run, get_raw=True)
def _program_flops(inputs: list[Tensor], program: Tensor, text: str, **_: Any) -> int:
    """Two per multiply–accumulate, biases left out."""
    steps = from_text(text)
    plain = Steps(
        tuple(replace(step, bias=-1) for step in steps.steps), steps.inputs, steps.returned
    )
    return 2 * _macs(plain, [tensor.shape for tensor in inputs])


def _shape(step: Step, source: tuple[Any, ...]) -> tuple[Any, ...]:
    images, channels = source[:2]
    if step.kind == "linear":
        return images, step.out_channels
    if step.kind == "mean":
        return images, channels, 1, 1
    if step.kind == "quantise":
        return source
    geometry = Geometry(step.stride, step.padding, step.dilation)
    size = geometry.output_size(source[2:], step.kernel_size)
    return images, channels if step.weights < 0 else step.out_channels, *size


@torch.library.register_fake("gross::program_pack", lib=_library)
def _program_pack_shape(like: Tensor, *_: Any) -> Tensor:
    # How many bytes depends on the processor's vectors.
    size = torch.library.get_ctx().new_dynamic_size()
    return like.new_empty(size, dtype=torch.uint8)


if ops.load_error is not None:
    _library.impl("program_pack", ops.missing, "CPU")
    _library.impl("program_run", ops.missing, "CPU")
