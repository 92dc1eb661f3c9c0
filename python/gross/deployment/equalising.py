"""A value's channels brought closer to one another, before it is held in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from .fusing import Fused
from .observing import Range, first, run
from .plan import parts
from .precision import Int8
from .programs import live, reads
from .rounding import refusal, summed, with_weights

#: How much of the differences between a value's channels goes into the weights that read it.
EQUALISED = (0.5, 0.75, 1.0)
#: Images on which that is chosen.
EQUALISED_ON = 2
#: Activations of which a · f(x) = f(a · x) for a > 0.
_HOMOGENEOUS = ("none", "relu", "prelu")


@torch.no_grad()
def equalise(
    traced: fx.GraphModule,
    steps: Mapping[fx.Node, Fused],
    batches: Sequence[Tensor],
    settings: Int8,
) -> dict[fx.Node, Fused]:
    """The same network with channels that are closer in range: what a step writes is divided by a
    number for each channel, and the weights that read it are multiplied by them. Which numbers
    shall be is tried on the sums of the steps that read."""
    largest: dict[fx.Node, Tensor] = {}

    def note(made: Fused, source: Tensor, output: Tensor) -> None:
        found = output.transpose(0, 1).flatten(1).abs().amax(1)
        largest[made.node] = torch.maximum(largest.get(made.node, found), found)

    for batch in batches:
        run(traced, steps, batch, note)
    readers = {node: _readers(traced, steps, node) for node in largest}
    wrote = {reader: node for node, some in readers.items() for reader in some}
    factors = {
        node: [torch.ones_like(largest[node])]
        + [_factors(largest[node], [steps[r] for r in some], part) for part in EQUALISED]
        for node, some in readers.items()
        if some
    }
    errors = {node: torch.zeros(len(some)) for node, some in factors.items()}

    def attempt(made: Fused, source: Tensor, output: Tensor) -> None:
        node = wrote.get(made.node)
        if node is None:
            return
        part = _first_part(made)
        wanted = summed(part, source)
        for i, by in enumerate(factors[node]):
            scaled = source / by.view(1, -1, *[1] * (source.dim() - 2))
            lowered = with_weights(_multiplied(part, by), settings)
            found = summed(lowered, scaled, Range().see(scaled).form(settings))
            errors[node][i] += (found - wanted).square().sum() / wanted.square().sum()

    for batch in first(batches, EQUALISED_ON):
        run(traced, steps, batch, attempt)
    equal = dict(steps)
    for node, some in factors.items():
        by = some[int(errors[node].argmin())]
        equal[node] = _divided(equal[node], by)
        for reader in readers[node]:
            equal[reader] = _multiplied(equal[reader], by)
    return equal


def _readers(
    traced: fx.GraphModule, steps: Mapping[fx.Node, Fused], node: fx.Node
) -> list[fx.Node]:
    """The steps whose weights read what this one writes, directly or through pooling; none where
    something else reads it, or its channels cannot be scaled."""
    made = steps[node]
    if not made.is_weighted or made.activation not in _HOMOGENEOUS or made.residual is not None:
        return []
    found: list[fx.Node] = []
    open_nodes = [node]
    while open_nodes:
        read = open_nodes.pop()
        for user in live(traced, steps):
            if read not in reads(user, steps):
                continue
            other = steps.get(user)
            if other is None or other.residual is read or refusal(other):
                return []
            if other.is_weighted:
                found.append(user)
            elif other.activation in _HOMOGENEOUS and other.residual is None:
                open_nodes.append(user)
            else:
                return []
    return found


def _factors(largest: Tensor, readers: Sequence[Fused], part: float) -> Tensor:
    """One number for each channel: its magnitude to the power ``part``, over that of the weights
    that read it to the power of what is left. Channels without any keep what they have."""
    weights = torch.zeros_like(largest)
    for made in readers:
        columns = made.operation.weights[0].abs().amax((0, 2, 3)).view(-1, len(largest)).amax(0)
        weights = torch.maximum(weights, columns)
    by = largest.clamp_min(1e-30) ** part / weights.clamp_min(1e-30) ** (1 - part)
    known = (largest > 0) & (weights > 0)
    if not bool(known.any()):
        return torch.ones_like(largest)
    by = by / by[known].log().mean().exp()
    return torch.where(known, by.clamp(1e-3, 1e3), 1.0)


def _first_part(made: Fused) -> Fused:
    """Of a layer its first pointwise, which reads the source."""
    return made if made.operation.kind != "layer" else parts(made, (made.node, made.node))[0]


def _divided(made: Fused, by: Tensor) -> Fused:
    """The step with its output's channels divided."""
    operation = made.operation
    last = operation.weights[-1] / by.view(-1, 1, 1, 1)
    bias = None if operation.bias is None else operation.bias / by
    operation = replace(operation, weights=(*operation.weights[:-1], last), bias=bias)
    return replace(made, operation=operation)


def _multiplied(made: Fused, by: Tensor) -> Fused:
    """The step as it is for a source whose channels were divided; a linear layer reads the
    channels of one pixel after the other."""
    first, *others = made.operation.weights
    first = first * by.repeat(first.shape[1] // len(by)).view(1, -1, 1, 1)
    return replace(made, operation=replace(made.operation, weights=(first, *others)))
