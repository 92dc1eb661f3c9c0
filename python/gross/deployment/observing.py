"""The float network on calibration data: what its values are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gross_kernels.program import Program, Quantised

from .fusing import Fused
from .precision import Int8
from .programs import encode, live, reads

#: Numbers of each value that its range is found from.
SAMPLE = 2**17
#: Parts of the largest magnitude at which a range may be cut.
CUTS = tuple(1 - 0.02 * i for i in range(36))
#: Patches of each batch that moments are summed over, and the most numbers that a patch may have.
PATCHES, COLUMNS = 2**12, 1152


def run(
    traced: fx.GraphModule,
    steps: Mapping[fx.Node, Fused],
    images: Tensor,
    see: Callable[[Fused, Tensor, Tensor], None],
) -> None:
    """Run the float network, and show each step's source and output."""
    interpreter = fx.Interpreter(traced, garbage_collect_values=False)
    interpreter.args_iter = iter([images])
    values = interpreter.env
    nodes = live(traced, steps)
    last = {read: node for node in nodes for read in reads(node, steps)}
    for node in nodes:
        if node in steps:
            made = steps[node]
            encoded, weights = encode([made], made.reads(), [node])
            program = Program(encoded, weights or [images.new_empty(0)], (False,))
            (values[node],) = program(*(values[each] for each in made.reads()))
            see(made, values[made.source], values[node])
        else:
            values[node] = interpreter.run_node(node)
        for read in reads(node, steps):
            if last[read] is node:
                values.pop(read, None)


class Range:
    """What the numbers of a value were seen to be: their ends, between which 0 lies, and some of
    them."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.generator = torch.Generator().manual_seed(0)
        self.parts: list[Tensor] = []

    def see(self, value: Tensor, share: float = 1.0) -> Range:
        """Take in a part of the value, a share of all that will be seen."""
        self.low = min(self.low, float(value.amin()))
        self.high = max(self.high, float(value.amax()))
        count = min(value.numel(), math.ceil(share * SAMPLE))
        drawn = torch.randint(value.numel(), (count,), generator=self.generator)
        self.parts.append(value.reshape(-1)[drawn])
        return self

    def form(self, settings: Int8) -> Quantised:
        """How the value is held in 8 bits."""
        low, high, sample = self.low, self.high, torch.cat(self.parts)
        if settings.ranges == "percentile":
            high = min(high, max(0.0, _quantile(sample, settings.percentile)))
            low = max(low, min(0.0, -_quantile(-sample, settings.percentile)))
        if settings.ranges != "mse":
            return _form(low, high)

        def error(form: Quantised) -> float:
            return float((form.value(form.quantise(sample)) - sample).square().sum())

        forms = [_form(low, high * cut) for cut in CUTS]
        high *= CUTS[min(range(len(CUTS)), key=lambda i: error(forms[i]))]
        forms = [_form(low * cut, high) for cut in CUTS] if low < 0 else [_form(low, high)]
        return min(forms, key=error)


def _quantile(numbers: Tensor, percentile: float) -> float:
    return float(torch.quantile(numbers, percentile / 100))


def _form(low: float, high: float) -> Quantised:
    """8 bits from ``low`` ≤ 0 to ``high`` ≥ 0; of a value that is always zero, steps of 1."""
    scale = (high - low) / 255
    # Of a range so narrow that its steps vanish in float32 nothing can be told.
    if scale < torch.finfo(torch.float32).tiny:
        return Quantised(1.0, 0)
    return Quantised(scale, round(-low / scale))


def first(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """The first so many images."""
    some: list[Tensor] = []
    for batch in batches:
        some.append(batch[: count - sum(map(len, some))])
    return [batch for batch in some if len(batch)]


@dataclass
class Seen:
    """What calibration data showed.

    Attributes:
        values: the range of each value that a step reads or writes.
        channels: of a layer, the largest magnitude of each channel of r, which its grouped
            convolution writes.
        moments: of each step, ``Σ x xᵀ`` over patches x of what its first weights read, and of a
            layer over the pixels of r; none where a patch is too long.
    """

    values: dict[fx.Node, Range] = field(default_factory=dict)
    channels: dict[fx.Node, Tensor] = field(default_factory=dict)
    moments: dict[fx.Node, list[Tensor | None]] = field(default_factory=dict)


@torch.no_grad()
def observe(
    traced: fx.GraphModule, steps: Mapping[fx.Node, Fused], batches: Sequence[Tensor]
) -> Seen:
    """Run the float network over the images.

    Raises:
        ValueError: naming the step, if one of its values is not finite.
    """
    seen = Seen()
    count = sum(map(len, batches))
    for batch in batches:
        look = _Look(seen, len(batch) / count)
        run(traced, steps, batch, look)
    return seen


class _Look:
    """What is seen of one batch, a share of all images."""

    def __init__(self, seen: Seen, share: float) -> None:
        self.seen, self.share = seen, share
        self.known: set[fx.Node] = set()

    def __call__(self, made: Fused, source: Tensor, output: Tensor) -> None:
        seen, node = self.seen, made.node
        for of, value in ((made.source, source), (node, output)):
            if of not in self.known:
                self.known.add(of)
                if not bool(value.isfinite().all()):
                    raise ValueError(f"calibration: {made.name} has values that are not finite")
                seen.values.setdefault(of, Range()).see(value, self.share)
        if not made.is_weighted:
            return
        read = [_patches(made, source)]
        if made.operation.kind == "layer":
            r = _between(made, source)
            largest = r.abs().amax((0, 2, 3))
            seen.channels[node] = torch.maximum(seen.channels.get(node, largest), largest)
            read.append(_drawn(r.transpose(0, 1).flatten(1)))
        products = [None if each is None else each @ each.T for each in read]
        before = seen.moments.get(node)
        if before is not None:
            products = [
                None if a is None or b is None else a + b
                for a, b in zip(before, products, strict=True)
            ]
        seen.moments[node] = products


def _between(made: Fused, source: Tensor) -> Tensor:
    """r, what a layer's grouped convolution writes."""
    operation = made.operation
    first, middle, _ = operation.weights
    geometry = (operation.stride, operation.padding, operation.dilation, operation.groups)
    return F.conv2d(F.conv2d(source, first), middle, None, *geometry)


def _patches(made: Fused, source: Tensor) -> Tensor | None:
    """Some of what the first weights' rows are multiplied by, ``[numbers, patches]``."""
    operation, first = made.operation, made.operation.weights[0]
    if first[0].numel() > COLUMNS or (operation.groups > 1 and operation.kind != "layer"):
        return None
    if operation.kind == "linear":
        pixels = source if source.dim() == 2 else source.permute(0, 2, 3, 1).flatten(1)
        return _drawn(pixels.T)
    if operation.kind == "layer":
        return _drawn(source.transpose(0, 1).flatten(1))
    geometry = (operation.dilation, operation.padding, operation.stride)
    # One image is enough, and its patches are nine times as many numbers.
    return _drawn(F.unfold(source[:1], operation.kernel_size, *geometry)[0])


def _drawn(columns: Tensor) -> Tensor:
    """Some of the columns, in float64."""
    if columns.shape[1] > PATCHES:
        generator = torch.Generator().manual_seed(0)
        columns = columns[:, torch.randint(columns.shape[1], (PATCHES,), generator=generator)]
    return columns.double()
