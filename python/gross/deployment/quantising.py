"""Steps in 8 bits: ranges from calibration data, weights, and which steps stay in float32.

The float network runs over the calibration data again and again. First the channels of each value
are brought closer to one another where the weights before and after can undo it
(:func:`_equalise`). Then every value's range is found, and of a layer that of every channel of r,
what its grouped convolution writes. Then the mean error that each step's weights cause goes into
its bias. At last every step is tried in 8 bits alone, and those that cost the network's output the
most for what they compute stay in float32 until its error is within the bound."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from gross_kernels.program import Quantised

from ..report import tracked
from .equalising import equalise
from .fusing import Fused
from .graph import Operation, shape_of, tensors_of
from .observing import first, observe, run
from .plan import Loss
from .precision import Int8
from .programs import build, live
from .rounding import refusal, summed, with_weights

#: Images on which biases are corrected and errors measured.
IMAGES = 16
_POOLING = ("max_pool", "mean_pool", "mean")


@dataclass
class Lowered:
    """A network's steps, those that shall in 8 bits.

    Attributes:
        steps: as :func:`gross.deployment.programs.build` takes them.
        losses: of each step that has weights.
        error: of the network's output, relative, root mean square.
    """

    steps: dict[fx.Node, Fused]
    losses: dict[fx.Node, Loss]
    error: float


def quantise(
    traced: fx.GraphModule,
    steps: Mapping[fx.Node, Fused],
    batches: Sequence[Tensor],
    settings: Int8,
) -> Lowered:
    """Bring into 8 bits what the bounds allow.

    Args:
        traced: the network; values that are needed in 8 bits and as floats get a node more.
        steps: of the network in float32; left as they are.
        batches: images to calibrate on.

    Raises:
        ValueError: if a value of the network is not finite on the calibration data, or what shall
            stay in float32 is no step of it.
    """
    _check_names(steps, settings)
    steps = equalise(traced, steps, batches, settings)
    seen = observe(traced, steps, batches)
    held = {node: each.form(settings) for node, each in seen.values.items()}
    losses: dict[fx.Node, Loss] = {}
    lowered: dict[fx.Node, Fused] = {}
    for node, moments in seen.moments.items():
        made, value, channels = steps[node], seen.values[node], seen.channels.get(node)
        dead = 0 if channels is None else int((channels == 0).sum())
        losses[node] = Loss(value.low, value.high, dead=dead, reason=_refusal(made, settings))
        if not losses[node].reason:
            lowered[node] = with_weights(made, settings, moments, channels)
    few = first(batches, IMAGES)
    own = _correct(traced, steps, lowered, held, few)
    trial = _Trial(traced, dict(steps), held, few)
    for node in tracked(list(lowered), "8 bits"):
        alone = trial.error(trial.network({node: lowered[node]}))
        losses[node] = replace(losses[node], own=own[node], output=alone)
    chosen = dict(lowered)
    while True:
        network = trial.network(chosen)
        error = trial.error(network)
        reason = _excess(error, network, trial.float_network, settings)
        if not reason or not chosen:
            return Lowered(trial.laid_out(chosen), losses, error)
        worst = max(chosen, key=lambda node: losses[node].output ** 2 / _products(chosen[node]))
        losses[worst] = replace(losses[worst], reason=reason)
        del chosen[worst]


def _check_names(steps: Mapping[fx.Node, Fused], settings: Int8) -> None:
    names = [made.name for made in steps.values() if made.is_weighted]
    for name in settings.float32:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or names[:3]
            raise ValueError(
                f"float32: got {name!r}, accepted are names of layers, convolutions and linear "
                f"layers, such as {near}"
            )


def _refusal(made: Fused, settings: Int8) -> str:
    return "as asked for" if made.name in settings.float32 else refusal(made)


def _excess(error: float, network: nn.Module, before: nn.Module, settings: Int8) -> str:
    """Which bound does not hold; empty if both do."""
    if not error <= settings.most_error:
        return "the output's error"
    if settings.metric is None:
        return ""
    with torch.no_grad():
        lost = float(settings.metric(before)) - float(settings.metric(network))
    return "" if lost <= settings.most_loss else "the metric"


def _products(made: Fused) -> int:
    """Multiply–accumulates of a step for an output pixel, times the pixels."""
    shape = shape_of(made.node) or ()
    return sum(kernel.numel() for kernel in made.operation.weights) * math.prod(shape[2:])


# Biases -------------------------------------------------------------------------------------------


@torch.no_grad()
def _correct(
    traced: fx.GraphModule,
    steps: Mapping[fx.Node, Fused],
    lowered: Mapping[fx.Node, Fused],
    held: Mapping[fx.Node, Quantised],
    batches: Sequence[Tensor],
) -> dict[fx.Node, float]:
    """Add to each bias, in place, what the step's output lacks in 8 bits on average; the relative
    errors of the outputs before that which follows them, root mean square."""
    means: dict[fx.Node, Tensor] = {}
    squares: dict[fx.Node, list[float]] = {}
    images = sum(map(len, batches))

    def see(made: Fused, source: Tensor, output: Tensor) -> None:
        node = made.node
        if node not in lowered:
            return
        wanted = summed(made, source)
        lacking = (wanted - summed(lowered[node], source, held[made.source])).transpose(0, 1)
        lacking = lacking.flatten(1)
        means[node] = means.get(node, 0) + lacking.mean(1) * (len(source) / images)
        found = squares.setdefault(node, [0.0, 0.0])
        found[0] += float((lacking - lacking.mean(1, keepdim=True)).square().sum())
        found[1] += float(wanted.square().sum())

    for batch in batches:
        run(traced, steps, batch, see)
    for node, lacking in means.items():
        operation = lowered[node].operation
        bias = lacking if operation.bias is None else operation.bias + lacking
        lowered[node].operation = replace(operation, bias=bias.float())
    return {node: math.sqrt(error / max(all_, 1e-30)) for node, (error, all_) in squares.items()}


# The network --------------------------------------------------------------------------------------


class _Trial:
    """The network with some of its steps in 8 bits.

    Args:
        held: how each value is held where it is in 8 bits.
        batches: images to compare outputs on.
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        steps: dict[fx.Node, Fused],
        held: Mapping[fx.Node, Quantised],
        batches: Sequence[Tensor],
    ) -> None:
        self.traced, self.steps, self.held, self.batches = traced, steps, held, batches
        self.copies: dict[fx.Node, fx.Node] = {}
        self.float_network = self.network({})
        self.expected = self._outputs(self.float_network)

    def network(self, chosen: dict[fx.Node, Fused]) -> nn.Module:
        return build(self.traced, self.laid_out(chosen)).eval()

    @torch.no_grad()
    def _outputs(self, network: nn.Module) -> list[Tensor]:
        found = [tensor for batch in self.batches for tensor in tensors_of(network(batch))]
        return [tensor.double() for tensor in found if tensor.is_floating_point()]

    def error(self, network: nn.Module) -> float:
        """Of its output, relative, root mean square."""
        pairs = list(zip(self._outputs(network), self.expected, strict=True))
        lost = sum(float((found - wanted).square().sum()) for found, wanted in pairs)
        return math.sqrt(lost / max(sum(float(w.square().sum()) for _, w in pairs), 1e-30))

    def laid_out(self, chosen: dict[fx.Node, Fused]) -> dict[fx.Node, Fused]:
        """All steps. Pooling runs in 8 bits where its source is held so. A step's output is held
        in 8 bits where all that read it can; where a step in 8 bits reads floats, a copy is
        made."""
        steps = {node: replace(made, held=None) for node, made in self.steps.items()} | chosen
        nodes = live(self.traced, steps)
        outside = {read for node in nodes if node not in steps for read in node.all_input_nodes}
        held: set[fx.Node] = set()
        for node in nodes:
            if node not in steps:
                continue
            made = steps[node]
            pooling = made.operation.kind in _POOLING
            as_source = [steps[other] for other in nodes if node in _source(other, steps)]
            as_residual = [other for other in nodes if node in _residual(other, steps)]
            if (
                (node in chosen or (pooling and made.source in held))
                and node not in outside
                and all(o.node in chosen or o.operation.kind in _POOLING for o in as_source)
                and all(other in chosen for other in as_residual)
            ):
                held.add(node)
                # A maximum is one of the values that it is of.
                same = made.operation.kind == "max_pool"
                form = steps[made.source].held if same else self.held[node]
                steps[node] = replace(made, held=form)
        for node in [node for node in nodes if node in chosen]:
            made = steps[node]
            if made.source not in held:
                copy = self._copy(made.source)
                form = self.held[made.source]
                operation = Operation("quantise", (made.source,))
                steps[copy] = Fused(operation, made.name, copy, made.source, held=form)
                steps[node] = replace(made, source=copy)
        return steps

    def _copy(self, node: fx.Node) -> fx.Node:
        """A node for a value's copy in 8 bits."""
        if node not in self.copies:
            with self.traced.graph.inserting_after(node):
                self.copies[node] = self.traced.graph.call_function(_in_eight_bits)
        return self.copies[node]


def _in_eight_bits() -> None:
    """Stands in a graph for a value's copy in 8 bits, which only programs see."""


def _source(node: fx.Node, steps: Mapping[fx.Node, Fused]) -> list[fx.Node]:
    return [steps[node].source] if node in steps else []


def _residual(node: fx.Node, steps: Mapping[fx.Node, Fused]) -> list[fx.Node | None]:
    return [steps[node].residual] if node in steps else []
