"""The graph of a deployed network: programs, and between them what no program knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from gross_kernels.program import Program, Quantised, Step, Steps

from .fusing import Fused
from .graph import type_of


def has_programs(network: nn.Module) -> bool:
    """Whether some of the network runs as programs."""
    return any(isinstance(module, Program) for module in network.modules())


class Deployed(fx.GraphModule):
    """A network with programs.

    Attributes:
        report: what runs how, a :class:`gross.deployment.Report`; it stays with copies.
    """

    report: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied = super().__deepcopy__(memo)
        copied.report = self.report
        return copied


def build(traced: fx.GraphModule, steps: Mapping[fx.Node, Fused]) -> fx.GraphModule:
    """The network with its steps in programs, as few as what stands between them allows.

    Two steps share a program unless a way from one to the other leads through something else: each
    node has as its stage the number of times that the longest way to it enters a step from
    outside."""
    stage: dict[fx.Node, int] = {}
    for node in live(traced, steps):
        before = reads(node, steps)
        inputs = node in steps
        stage[node] = max((stage[i] + (inputs and i not in steps) for i in before), default=0)
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    root: dict[str, Any] = {}
    for number in range(max(stage.values(), default=0) + 1):
        inside = [node for node, at in stage.items() if at == number and node in steps]
        if inside:
            _add_program(graph, made, root, [steps[node] for node in inside], stage, steps)
        for node, at in stage.items():
            if at == number and node not in steps:
                made[node] = graph.node_copy(node, lambda given: made[given])
                if node.op in ("call_module", "get_attr"):
                    root[str(node.target)] = attrgetter(str(node.target))(traced)
    graph.set_codegen(traced.graph._codegen)
    return Deployed(root, graph, class_name="Deployed")


def live(traced: fx.GraphModule, steps: Mapping[fx.Node, Fused]) -> list[fx.Node]:
    """The nodes that the output needs, in order, and all inputs; of a step what it reads, and not
    what it took in."""
    needed: set[fx.Node] = set()
    open_nodes = [node for node in traced.graph.nodes if node.op in ("output", "placeholder")]
    while open_nodes:
        node = open_nodes.pop()
        if node not in needed:
            needed.add(node)
            open_nodes += reads(node, steps)
    return [node for node in traced.graph.nodes if node in needed]


def reads(node: fx.Node, steps: Mapping[fx.Node, Fused]) -> list[fx.Node]:
    """The nodes that a node, or the step that writes it, reads."""
    return steps[node].reads() if node in steps else node.all_input_nodes


def _add_program(
    graph: fx.Graph,
    made: dict[fx.Node, fx.Node],
    root: dict[str, Any],
    inside: list[Fused],
    stage: dict[fx.Node, int],
    made_by: Mapping[fx.Node, Fused],
) -> None:
    """One program of these steps."""
    own = {one.node for one in inside}
    inputs = list(dict.fromkeys(i for one in inside for i in one.reads() if i not in own))
    returned = [
        one.node
        for one in inside
        if any(one.node in reads(user, made_by) for user in stage if user not in own)
    ]
    steps, weights = encode(inside, inputs, returned)
    if not weights:
        # Of no numbers, for the type that pooling alone is packed for.
        weights = [torch.empty(0, dtype=type_of(inputs[0]))]
    flat = [one.flat and one.operation.kind != "linear" for one in inside if one.node in returned]
    name = f"program_{sum(key.startswith('program_') for key in root)}"
    root[name] = Program(steps, weights, flat)
    call = graph.call_module(name, tuple(made[node] for node in inputs))
    for i, node in enumerate(returned):
        made[node] = graph.call_function(_item, (call, i))


def _item(values: tuple[Tensor, ...], index: int) -> Tensor:
    return values[index]


def encode(
    inside: Sequence[Fused], inputs: Sequence[fx.Node], returned: Sequence[fx.Node]
) -> tuple[Steps, list[Tensor]]:
    """Steps that read `inputs` and one another, and their weights."""
    numbers = {node: i for i, node in enumerate(inputs)}
    held: list[Quantised | None] = [None for _ in inputs]
    weights: list[Tensor] = []
    steps: list[Step] = []

    def add(step: Step, form: Quantised | None) -> int:
        steps.append(step)
        held.append(form)
        return len(held) - 1

    for one in inside:
        residual = -1 if one.residual is None else numbers[one.residual]
        if one.scales and 0 <= residual < len(inputs):
            # Steps in 8 bits add what the program itself has laid out.
            residual = add(Step("quantise", residual), None)
        step = one.step(numbers[one.source], residual, len(weights))
        weights += one.weights()
        numbers[one.node] = add(step, one.held)
    quantised = tuple(held) if any(held) else ()
    numbered = tuple(numbers[node] for node in returned)
    return Steps(tuple(steps), len(inputs), numbered, quantised), weights
