"""How each decomposed layer runs: as the bottleneck that it is, in one pass or in three, or as the
dense convolution that is its product."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from gross_kernels.bottleneck import Weights, merged_kernel
from gross_kernels.program import Quantised, Step, Steps, run

from ..report import size, text
from .fusing import Fused
from .graph import shape_of
from .precision import Int8
from .programs import encode
from .rounding import with_weights

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Rates:
    """Multiply–accumulates per second and thread, in 10⁹, of pointwise products, of dense
    convolutions, and of grouped ones by their group size: of others as of the next smaller."""

    product: float
    dense: float
    grouped: Mapping[int, float]

    def of_groups(self, size: int) -> float:
        return self.grouped[max(known for known in self.grouped if known <= size)]


#: Measured on an AMD EPYC (Zen 5, AVX-512); only ratios decide. In 8 bits the grouped part of a
#: layer is computed in 16, twice as fast as in float32 where channels come in pairs (measured on
#: AVX2 at sizes 4 and 8, supposed of the others).
FLOAT32 = Rates(115.0, 112.0, {1: 30.0, 2: 60.0, 4: 85.0, 8: 90.0, 16: 95.0, 32: 105.0})
INT8 = Rates(370.0, 490.0, {1: 30.0, 2: 120.0, 4: 170.0, 8: 180.0, 16: 190.0, 32: 210.0})
#: Seconds that a candidate is timed for.
SECONDS = 0.03


@dataclass(frozen=True)
class Loss:
    """What 8 bits do to one step.

    Attributes:
        low, high: the range of its output on the calibration data.
        own: error of its output in 8 bits for a right input, relative, root mean square.
        output: error of the network's output with this step alone in 8 bits, likewise.
        dead: channels that are zero in all calibration images: of r, in a layer, else of the
            output.
        reason: why it stays in float32; empty if it does not.
    """

    low: float
    high: float
    own: float = 0.0
    output: float = 0.0
    dead: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One step of the plan.

    Attributes:
        name: where the network has it.
        choice: "fused", "parts" or "merged" of a decomposed layer; else the kind of step.
        followed_by: what it does beside: "batch norm", "relu", "sum" …
        milliseconds: by choice, predicted for one thread or measured with torch's threads; empty
            where there was no choice.
        output: shape of its output for the example.
        loss: what 8 bits do to it; None in a network of float32, and of steps without weights.
    """

    name: str
    choice: str
    followed_by: tuple[str, ...]
    milliseconds: Mapping[str, float]
    output: tuple[int, ...]
    loss: Loss | None = None


@dataclass(frozen=True)
class Report:
    """What an exported network runs, and what is left to PyTorch.

    Attributes:
        steps: in order.
        left: operations that no program has, by name, with the reason.
        error: of the network's output by 8 bits, root mean square, relative to the output's own;
            None in a network of float32.
    """

    steps: list[Row]
    left: Mapping[str, str]
    error: float | None = None

    def __str__(self) -> str:
        from rich.table import Column, Table

        table = Table(
            Column("layer", no_wrap=True),
            "runs as",
            "followed by",
            "output",
            "ms",
            title="deployment",
        )
        for row in self.steps:
            times = ", ".join(f"{name} {ms:.3f}" for name, ms in row.milliseconds.items())
            table.add_row(row.name, row.choice, ", ".join(row.followed_by), size(row.output), times)
        lines = [text(table)]
        if self.error is not None:
            lines += [text(_precisions(self.steps)), f"error of the output: {self.error:.2%}"]
        if self.left:
            left = Table(Column("left to PyTorch", no_wrap=True), "because")
            for name, why in self.left.items():
                left.add_row(name, why)
            lines.append(text(left))
        return "\n".join(lines)


def _precisions(rows: Sequence[Row]) -> Table:
    """What 8 bits do to each step; errors are relative."""
    from rich.table import Column, Table

    table = Table(
        Column("layer", no_wrap=True),
        "bits",
        "range",
        "its error",
        "the output's",
        "",
        title="8 bits",
    )
    for row in rows:
        loss = row.loss
        if loss is None:
            continue
        remarks = [loss.reason] if loss.reason else []
        remarks += [f"{loss.dead} dead channels"] if loss.dead else []
        remarks += ["always zero"] if loss.low == loss.high else []
        table.add_row(
            row.name,
            "32" if loss.reason else "8",
            f"{loss.low:.3g} to {loss.high:.3g}",
            f"{loss.own:.2%}",
            f"{loss.output:.2%}",
            ", ".join(remarks),
        )
    return table


def choose(
    traced: fx.GraphModule, steps: dict[fx.Node, Fused], example: Tensor, tune: bool, int8: bool
) -> dict[fx.Node, Row]:
    """Choose how each decomposed layer runs, in place, and say so.

    Args:
        traced: the network; a layer in three passes gets two nodes more.
        steps: of the network, in order.
        example: an input of the network: its dtype and device count.
        tune: time the choices instead of predicting them.
        int8: choose for 8 bits, where three passes are none of the choices.

    Returns:
        By the node whose value it writes, what is said of each step.
    """
    rows = {}
    for node, made in list(steps.items()):
        choice = made.operation.kind
        times: dict[str, float] = {}
        if choice == "layer":
            with traced.graph.inserting_before(node):
                inner = [traced.graph.call_function(_between) for _ in range(2)]
            candidates = {"fused": [made], "merged": [_merged(made)]}
            if not int8:
                candidates["parts"] = parts(made, inner)
            if tune and example.device.type == "cpu":
                times = _measured(candidates, example, int8)
            else:
                rates = INT8 if int8 else FLOAT32
                times = {name: _predicted(some, rates) for name, some in candidates.items()}
            choice = min(times, key=lambda name: times[name])
            steps |= {one.node: one for one in candidates[choice]}
        rows[node] = Row(made.name, choice, tuple(made.followed_by), times, shape_of(node) or ())
    return rows


def _between() -> None:
    """Stands in a graph for a value between a layer's parts, which only programs see."""


def _merged(made: Fused) -> Fused:
    """The layer as the dense convolution that it is."""
    operation = made.operation
    p, r, q = ([weight.double()] for weight in operation.weights)
    one = torch.tensor(1, dtype=torch.int64, device="cpu")
    kernel = merged_kernel(Weights(p, r, q, None, one, None)).to(operation.weights[0].dtype)
    return replace(
        made,
        operation=replace(operation, kind="convolution", weights=(kernel,), groups=1),
    )


def parts(made: Fused, inner: Sequence[fx.Node]) -> list[Fused]:
    """The layer as three convolutions, through the values `inner`."""
    operation, (p, r) = made.operation, inner
    first, middle, last = operation.weights
    pointwise: dict[str, Any] = {
        "kind": "convolution",
        "bias": None,
        "kernel_size": (1, 1),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": 1,
    }
    return [
        Fused(replace(operation, weights=(first,), **pointwise), made.name, p, made.source),
        Fused(
            replace(operation, kind="convolution", weights=(middle,), bias=None), made.name, r, p
        ),
        replace(
            made,
            operation=replace(operation, weights=(last,), **pointwise | {"bias": operation.bias}),
            source=r,
        ),
    ]


def _predicted(candidate: Sequence[Fused], rates: Rates) -> float:
    """Milliseconds at these rates on one thread."""
    seconds = 0.0
    made = candidate[-1]
    output = shape_of(made.node)
    read = shape_of(candidate[0].source)
    if output is None or read is None:
        return 0.0
    written = output[0] * output[2] * output[3]
    before = read[0] * read[2] * read[3]
    for one in candidate:
        kernels = one.operation.weights
        macs = [kernel.numel() for kernel in kernels]
        if len(kernels) == 3:
            rate = rates.of_groups(kernels[1].shape[1])
            seconds += (before * macs[0] + written * macs[2]) / rates.product
            seconds += written * macs[1] / rate
        elif one.operation.kernel_size == (1, 1):
            # In three passes what lies between them goes through memory.
            seconds += 1.3 * (written if one is made else before) * macs[0] / rates.product
        else:
            dense = one.operation.groups == 1
            rate = rates.dense if dense else rates.of_groups(kernels[0].shape[1]) / 1.3
            seconds += written * macs[0] / rate
    return seconds / 1e6


def _measured(
    candidates: Mapping[str, list[Fused]], example: Tensor, int8: bool
) -> dict[str, float]:
    """Milliseconds with torch's threads: medians of turns, candidate after candidate."""
    made = candidates["fused"][0]
    sources = [made.source] if made.residual is None else [made.source, made.residual]
    tensors = []
    for node in sources:
        made_of = torch.randn(shape_of(node) or (), device=example.device).to(example.dtype)
        tensors.append(made_of.contiguous(memory_format=torch.channels_last))
    calls: dict[str, Callable[[], object]] = {}
    for name, candidate in candidates.items():
        if int8:
            steps, weights = _in_8_bits(candidate[0])
        else:
            steps, weights = encode(candidate, sources, [made.node])
        program = steps.pack(weights, example.new_empty(0))
        calls[name] = partial(run, tensors, program, steps.text())
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for call in calls.values():
            call()
        end = time.perf_counter() + SECONDS * len(calls)
        while time.perf_counter() < end or len(times["fused"]) < 5:
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began)
    return {name: 1e3 * sorted(of)[len(of) // 2] for name, of in times.items()}


def _in_8_bits(made: Fused) -> tuple[Steps, list[Tensor]]:
    """A step alone in 8 bits, to be timed: its ranges are any."""
    kernels = made.operation.weights
    channels = torch.ones(len(kernels[1])) if len(kernels) == 3 else None
    lowered = with_weights(made, Int8(), channels=channels)
    inputs = len(made.reads())
    copies = [Step("quantise", i) for i in range(inputs)]
    step = lowered.step(inputs, 2 * inputs - 1 if inputs > 1 else -1, 0)
    held = (*[None] * inputs, *[Quantised(1 / 32, 128)] * inputs, None)
    return Steps((*copies, step), inputs, (2 * inputs,), held), lowered.weights()
