"""From a graph's operations to steps of programs: batch norms folded, activations and residual
additions taken into what they follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from gross_kernels.pooling import SumPool2d
from gross_kernels.program import Quantised, Step

from .graph import Operation, read, shape_of, type_of

#: Kinds that have weights, and so take a norm.
_WEIGHTED = ("layer", "convolution", "linear")


@dataclass
class Fused:
    """An operation with all that follows it until its output is stored.

    Attributes:
        operation: with the norms folded into its weights.
        name: where the network has it.
        node: the graph's node whose value it writes.
        source, residual: the nodes that it reads.
        followed_by: what it took in, for the report.
        flat: whether the graph's value has no pixels, ``[N, C]``.
        scales: of weights in 8 bits, as a step has them; empty for floats.
        held: how its output is held, None for numbers.
    """

    operation: Operation
    name: str
    node: fx.Node
    source: fx.Node
    activation: str = "none"
    slopes: Tensor | None = None
    residual: fx.Node | None = None
    residual_last: bool = False
    followed_by: list[str] = field(default_factory=list)
    flat: bool = False
    scales: tuple[Tensor, ...] = ()
    held: Quantised | None = None

    def reads(self) -> list[fx.Node]:
        return [self.source] if self.residual is None else [self.source, self.residual]

    @property
    def is_weighted(self) -> bool:
        return self.operation.kind in _WEIGHTED

    def weights(self) -> list[Tensor]:
        """All numbers that its step reads: kernels, their scales, bias, slopes."""
        others = [t for t in (self.operation.bias, self.slopes) if t is not None]
        return [*self.operation.weights, *self.scales, *others] if self.is_weighted else others

    def step(self, source: int, residual: int, first: int) -> Step:
        """Its step in a program.

        Args:
            source, residual: numbers of the values that it reads.
            first: number of its first weight; the others follow as :meth:`weights` has them.
        """
        operation = self.operation
        common: dict[str, Any] = {
            "source": source,
            "residual": residual,
            "activation": self.activation,
            "residual_last": self.residual_last,
            "kernel_size": operation.kernel_size,
            "stride": operation.stride,
            "padding": operation.padding,
            "dilation": operation.dilation,
        }
        if not self.is_weighted:
            return Step(operation.kind, **common)
        kernels = operation.weights
        middle = kernels[1] if operation.kind == "layer" else kernels[0]
        scales = first + len(kernels)
        after = scales + len(self.scales)
        return Step(
            operation.kind,
            in_channels=kernels[0].shape[1] * (1 if len(kernels) == 3 else operation.groups),
            width=(middle.shape[1] * operation.groups, middle.shape[0]),
            group_size=middle.shape[1],
            out_channels=kernels[-1].shape[0],
            weights=first,
            scales=scales if self.scales else -1,
            bias=-1 if operation.bias is None else after,
            slopes=-1 if self.slopes is None else after + (operation.bias is not None),
            **common,
        )


def fuse(traced: fx.GraphModule) -> tuple[dict[fx.Node, Fused], dict[str, str]]:
    """The graph's steps by the node whose value each writes; and the operations that stay as they
    are, by name, with the reason."""
    fusing = _Fusing(traced)
    for node in list(traced.graph.nodes):
        fusing.take(node)
    return fusing.steps, fusing.left


class _Fusing:
    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.steps: dict[fx.Node, Fused] = {}
        self.left: dict[str, str] = {}
        #: Norms that the convolution after them takes in.
        self.before: dict[fx.Node, Operation] = {}

    def _why_unknown(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self.traced.get_submodule(str(node.target))
            if isinstance(module, SumPool2d) and module.kernels:
                return "a sum-pooling, which is an operator of its own between programs"
        return "no program knows it"

    def take(self, node: fx.Node) -> None:
        """Read one node; those before it have been read."""
        if node.op in ("placeholder", "get_attr", "output"):
            return
        operation = read(self.traced, node)
        if operation is None:
            if shape_of(node) is not None:
                self.left[_name(node)] = self._why_unknown(node)
            return
        kind = operation.kind
        if kind in ("identity", "same_size"):
            if kind == "identity" or self._feeds_linear(node):
                node.replace_all_uses_with(operation.inputs[0])
                self.traced.graph.erase_node(node)
            else:
                self.left[_name(node)] = "adaptive pooling to another size than 1"
        elif kind == "norm":
            self._norm(node, operation)
        elif kind == "activation":
            self._activation(node, operation)
        elif kind == "add":
            self._add(node, operation)
        elif kind == "flat_mean":
            if all(self._reads_linear(user) for user in node.users):
                operation.kind = "mean"
                self._start(node, operation, flat=True)
            else:
                self.left[_name(node)] = "a mean without dimensions of size 1"
        elif kind != "flatten":
            self._start(node, operation)

    def _feeds_linear(self, node: fx.Node) -> bool:
        flattened = [user for user in node.users if _kind(self.traced, user) == "flatten"]
        return len(flattened) == len(node.users) and all(
            self._reads_linear(user)
            for flat in flattened
            for user in flat.users
            if _kind(self.traced, user) != "identity"
        )

    def _reads_linear(self, node: fx.Node) -> bool:
        kind = _kind(self.traced, node)
        if kind in ("identity", "flatten"):
            return all(self._reads_linear(user) for user in node.users)
        return kind == "linear"

    def _start(self, node: fx.Node, operation: Operation, flat: bool = False) -> None:
        """A step that begins with this node."""
        source = operation.inputs[0]
        shape = shape_of(source)
        if operation.kind == "linear":
            read_by = self._linear(operation, source)
            if read_by is None:
                self.left[_name(node)] = "a linear layer of more than [N, C]"
                return
            source = read_by
        elif shape is None or len(shape) != 4:
            self.left[_name(node)] = "its input is no [N, C, H, W]"
            return
        if source in self.before:
            _fold_before(operation, self.before[source])
            source = self.before[source].inputs[0]
        made = Fused(operation, _name(node), node, source, flat=flat or operation.kind == "linear")
        if operation.kind == "layer":
            made.activation = operation.activation
        self.steps[node] = made

    def _linear(self, operation: Operation, source: fx.Node) -> fx.Node | None:
        """What a linear layer reads: where that is a flattened image, the image, pixel by pixel,
        with the weight in that order."""
        shape = shape_of(source)
        weight = operation.weights[0]
        if shape is None or len(shape) != 2:
            return None
        flattened = read(self.traced, source)
        if flattened is not None and flattened.kind == "flatten":
            image = flattened.inputs[0]
            size = shape_of(image)
            # The order of pixels in memory is known of what a program itself writes.
            if size is not None and len(size) == 4 and image in self.steps:
                weight = weight.reshape(-1, *size[1:]).permute(0, 2, 3, 1).flatten(1)
                source = image
        operation.weights = (weight[:, :, None, None],)
        return source

    def _before(self, node: fx.Node) -> Fused | None:
        """The step whose value this node alone reads."""
        made = self.steps.get(node)
        return made if made is not None and len(node.users) == 1 else None

    def _norm(self, node: fx.Node, operation: Operation) -> None:
        scale, shift = operation.weights
        made = self._before(operation.inputs[0])
        if (
            made is not None
            and made.is_weighted
            and made.activation == "none"
            and made.residual is None
        ):
            _fold_after(made.operation, scale, shift)
            self._absorb(made, node, "batch norm")
            return
        users = list(node.users)
        after = read(self.traced, users[0]) if len(users) == 1 else None
        # Padding would come between the norm's shift and the kernel.
        if after is not None and after.kind in ("layer", "convolution") and after.padding == (0, 0):
            self.before[node] = operation
            return
        # Alone, a convolution of single channels, which takes in what follows: a program runs it
        # faster than PyTorch a batch norm, and is not interrupted.
        dtype = type_of(node)
        kernel = scale.to(dtype).view(-1, 1, 1, 1)
        alone = Operation(
            "convolution", operation.inputs, (kernel,), shift.to(dtype), groups=len(kernel)
        )
        self._start(node, alone)

    def _activation(self, node: fx.Node, operation: Operation) -> None:
        made = self._before(operation.inputs[0])
        if made is None or made.activation != "none" or made.residual_last:
            self.left[_name(node)] = "what it follows is no step of a program"
            return
        if operation.activation == "prelu":
            if not made.is_weighted:
                self.left[_name(node)] = "PReLU after pooling"
                return
            (slopes,) = operation.weights
            last = made.operation.weights[-1]
            made.slopes = slopes.to(last).expand(last.shape[0]).contiguous()
        made.activation = operation.activation
        self._absorb(made, node, operation.activation)

    def _add(self, node: fx.Node, operation: Operation) -> None:
        left, right = operation.inputs
        shapes = {(shape_of(value), type_of(value)) for value in (left, right, node)}
        candidates = [
            (made, other)
            for one, other in ((left, right), (right, left))
            if (made := self._before(one)) is not None and made.residual is None and not made.flat
        ]
        if left is right or len(shapes) != 1 or len(shape_of(node) or ()) != 4 or not candidates:
            self.left[_name(node)] = "a sum that follows no step of a program"
            return
        # A layer's kernel, and a pointwise convolution's, adds while the sums are in registers.
        made, other = min(candidates, key=lambda pair: _preference(pair[0]))
        made.residual = other
        made.residual_last = made.activation != "none"
        self._absorb(made, node, "sum")

    def _absorb(self, made: Fused, node: fx.Node, what: str) -> None:
        del self.steps[made.node]
        made.node = node
        made.followed_by.append(what)
        self.steps[node] = made


def _preference(made: Fused) -> int:
    pointwise = made.operation.kernel_size == (1, 1) and made.operation.kind == "convolution"
    return 0 if made.operation.kind == "layer" else 1 if pointwise else 2


def _kind(traced: fx.GraphModule, node: fx.Node) -> str | None:
    operation = read(traced, node)
    return None if operation is None else operation.kind


def _name(node: fx.Node) -> str:
    """The module whose call the node is, also in a graph of ``torch.export``; else the node's own
    name."""
    stack = [*(node.meta.get("nn_module_stack") or {}).values()]
    if stack:
        path, kind = stack[-1]
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        if name.startswith(("torch.nn.modules.", "gross_kernels.layers.")):
            return path
    return str(node.target) if node.op == "call_module" else node.name


def _fold_after(operation: Operation, scale: Tensor, shift: Tensor) -> None:
    """act(scale · (W x + b) + shift): the norm goes into the last kernel and the bias."""
    last = operation.weights[-1]
    by_output = scale.view(-1, *[1] * (last.dim() - 1))
    operation.weights = (*operation.weights[:-1], (last.double() * by_output).to(last.dtype))
    bias = 0 if operation.bias is None else operation.bias.double() * scale
    operation.bias = (bias + shift).to(last.dtype)


def _fold_before(operation: Operation, norm: Operation) -> None:
    """W (scale · x + shift), without padding: the norm goes into the first kernel, and what W makes
    of the shift into the bias."""
    scale, shift = norm.weights
    first = operation.weights[0].double()
    groups = operation.groups if operation.kind == "convolution" else 1
    inputs = first.shape[1]
    by_input = torch.stack([scale.view(groups, inputs), shift.view(groups, inputs)])
    # Of each output, the inputs of its group.
    rows = by_input.repeat_interleave(first.shape[0] // groups, 1)[..., None, None]
    moved = (first * rows[1]).sum((1, 2, 3))
    for i, kernel in enumerate(operation.weights[1:]):
        taps = kernel.double().sum((2, 3))
        if i == 0:  # grouped
            parts = moved.view(operation.groups, -1).repeat_interleave(
                taps.shape[0] // operation.groups, 0
            )
            moved = (taps * parts).sum(1)
        else:
            moved = taps @ moved
    dtype = operation.weights[0].dtype
    operation.weights = ((first * rows[0]).to(dtype), *operation.weights[1:])
    bias = moved if operation.bias is None else operation.bias.double() + moved
    operation.bias = bias.to(dtype)
