"""The graph of a deployed network: programs, and between them what no program knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from gross_kernels.program import Step, Steps, define, from_text, run

from .fusing import Fused


class Program(nn.Module):
    """Steps of a network that run in one call.

    Args:
        steps: without weights.
        weights: of the steps, plain: they are this module's buffers, in ``state_dict`` and in what
            ``torch.export`` writes. Packed for this processor they are kept beside.
        flat: which outputs are ``[N, C]`` to the rest of the network though the program returns
            ``[N, C, 1, 1]``.

    On the CPU without gradients this is ``gross::program_run``; with gradients, on other devices
    and for inputs of another dtype than the weights' it is the same in PyTorch's own operators.
    """

    def __init__(self, steps: Steps, weights: Sequence[Tensor], flat: Sequence[bool]) -> None:
        super().__init__()
        self.text = steps.text()
        self.flat = tuple(flat)
        for i, weight in enumerate(weights):
            self.register_buffer(f"weight_{i}", weight.detach().clone().contiguous())
        self._pack()

    @property
    def steps(self) -> Steps:
        return from_text(self.text)

    def _weights(self) -> list[Tensor]:
        return list(self._buffers.values())  # type: ignore[arg-type]

    def _pack(self) -> None:
        """Put the weights into this processor's order; called whenever they have changed."""
        weights = self._weights()
        like = weights[0] if weights else torch.empty(0)
        self._packed: Tensor | None = None
        if like.device.type == "cpu":
            self._packed = self.steps.pack(weights, like.new_empty(0))

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
            weights = self._weights()
            packed = self.steps.pack(weights, weights[0].new_empty(0))
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


def has_programs(network: nn.Module) -> bool:
    """Whether some of the network runs as programs."""
    return any(isinstance(module, Program) for module in network.modules())


def build(traced: fx.GraphModule, steps: dict[fx.Node, Fused]) -> fx.GraphModule:
    """The network with its steps in programs, as few as what stands between them allows.

    Two steps share a program unless a way from one to the other leads through something else: each
    node has as its stage the number of times that the longest way to it enters a step from
    outside."""
    stage: dict[fx.Node, int] = {}
    reads = {node: _reads(made) for node, made in steps.items()}
    for node in _live(traced, steps):
        if node in steps:
            stage[node] = max(stage[i] + (i not in steps) for i in reads[node])
        else:
            stage[node] = max((stage[i] for i in node.all_input_nodes), default=0)
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    root: dict[str, Any] = {}
    for number in range(max(stage.values(), default=0) + 1):
        inside = [node for node, at in stage.items() if at == number and node in steps]
        if inside:
            _add_program(graph, made, root, [steps[node] for node in inside], stage, reads)
        for node, at in stage.items():
            if at == number and node not in steps:
                made[node] = graph.node_copy(node, lambda given: made[given])
                if node.op in ("call_module", "get_attr"):
                    root[str(node.target)] = _attribute(traced, str(node.target))
    graph.set_codegen(traced.graph._codegen)
    return fx.GraphModule(root, graph, class_name="Deployed")


def _live(traced: fx.GraphModule, steps: dict[fx.Node, Fused]) -> list[fx.Node]:
    """The nodes that the output needs, in order, and all inputs; of a step what it reads, and not
    what it took in."""
    needed: set[fx.Node] = set()
    open_nodes = [node for node in traced.graph.nodes if node.op in ("output", "placeholder")]
    while open_nodes:
        node = open_nodes.pop()
        if node not in needed:
            needed.add(node)
            open_nodes += _reads(steps[node]) if node in steps else node.all_input_nodes
    return [node for node in traced.graph.nodes if node in needed]


def _reads(made: Fused) -> list[fx.Node]:
    return [made.source] if made.residual is None else [made.source, made.residual]


def _attribute(traced: fx.GraphModule, path: str) -> Any:
    found: Any = traced
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _add_program(
    graph: fx.Graph,
    made: dict[fx.Node, fx.Node],
    root: dict[str, Any],
    inside: list[Fused],
    stage: dict[fx.Node, int],
    reads: dict[fx.Node, list[fx.Node]],
) -> None:
    """One program of these steps."""
    own = {one.node for one in inside}
    inputs = list(dict.fromkeys(i for one in inside for i in _reads(one) if i not in own))
    returned = [
        one.node
        for one in inside
        if any(user in stage and user not in own for user in _readers(one.node, stage, reads))
    ]
    steps, weights = encode(inside, inputs, returned)
    flat = [one.flat and one.operation.kind != "linear" for one in inside if one.node in returned]
    name = f"program_{sum(key.startswith('program_') for key in root)}"
    root[name] = Program(steps, weights, flat)
    call = graph.call_module(name, tuple(made[node] for node in inputs))
    for i, node in enumerate(returned):
        made[node] = graph.call_function(_item, (call, i))


def _readers(
    node: fx.Node, stage: dict[fx.Node, int], reads: dict[fx.Node, list[fx.Node]]
) -> list[fx.Node]:
    return [
        other
        for other in stage
        if node in (reads[other] if other in reads else other.all_input_nodes)
    ]


def _item(values: tuple[Tensor, ...], index: int) -> Tensor:
    return values[index]


def encode(
    inside: Sequence[Fused], inputs: Sequence[fx.Node], returned: Sequence[fx.Node]
) -> tuple[Steps, list[Tensor]]:
    """Steps that read `inputs` and one another, and their weights."""
    numbers = {node: i for i, node in enumerate(inputs)}
    weights: list[Tensor] = []
    steps: list[Step] = []
    for one in inside:
        residual = -1 if one.residual is None else numbers[one.residual]
        steps.append(one.step(numbers[one.source], residual, len(weights)))
        weights += one.weights()
        numbers[one.node] = len(inputs) + len(steps) - 1
    return Steps(tuple(steps), len(inputs), tuple(numbers[node] for node in returned)), weights
