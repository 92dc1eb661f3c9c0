"""Small networks drawn at random, and what they share with the tests of whole networks."""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable
from typing import Any

import gross
import torch
import torch.nn.functional as F
from gross.supernet import decomposed_layers
from torch import Tensor, nn

#: A module of the network by its number, or a function.
Part = int | Callable[[Tensor], Tensor]
Run = Callable[["Generated", list[Tensor]], Tensor]

#: Every way to write an activation: given the channels, what is called with the value.
ACTIVATIONS: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
    "nn.ReLU": lambda _: nn.ReLU(),
    "nn.ReLU in place": lambda _: nn.ReLU(inplace=True),
    "F.relu": lambda _: F.relu,
    "F.relu in place": lambda _: lambda x: F.relu(x, inplace=True),
    "torch.relu": lambda _: torch.relu,
    "torch.relu_": lambda _: torch.relu_,
    ".relu": lambda _: lambda x: x.relu(),
    ".relu_": lambda _: lambda x: x.relu_(),
    "nn.ReLU6": lambda _: nn.ReLU6(),
    "nn.Hardtanh": lambda _: nn.Hardtanh(0, 6),
    "F.relu6 in place": lambda _: lambda x: F.relu6(x, inplace=True),
    "nn.SiLU": lambda _: nn.SiLU(),
    "F.silu": lambda _: F.silu,
    "nn.PReLU": lambda _: nn.PReLU(),
    "nn.PReLU of channels": lambda channels: nn.PReLU(channels),
    "nn.LeakyReLU": lambda _: nn.LeakyReLU(0.2),
    "F.leaky_relu": lambda _: lambda x: F.leaky_relu(x, 0.3),
    "nn.Hardswish": lambda _: nn.Hardswish(),
    "torch.sigmoid": lambda _: torch.sigmoid,
    "none": lambda _: nn.Identity(),
}
ADDITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda a, b: a + b,
    "torch.add": torch.add,
    ".add": lambda a, b: a.add(b),
    "operator.iadd": operator.iadd,
    ".__iadd__": lambda a, b: a.__iadd__(b),
    ".add_": lambda a, b: a.add_(b),
    "alpha": lambda a, b: torch.add(a, b, alpha=2),
}


class Generated(nn.Module):
    """A network of random steps. Every value may be read by any later step, also after a step has
    written into it.

    Args:
        seed: of the drawing.
        dynamic: write its shape into its control flow, which ``torch.fx`` cannot trace.
    """

    def __init__(self, seed: int, dynamic: bool = False) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.dynamic = dynamic
        self.parts = nn.ModuleList()
        self.steps: list[Run] = []
        self.said: list[str] = []
        #: Channels and side of every value; the first is the input's.
        self.values = [(4, 8)]
        # The first convolution stays as it is.
        stem = self._keep(nn.Conv2d(4, 4, 3, padding=1))
        self.steps.append(lambda net, values: net.call(stem, values[0]))
        self.values.append((4, 8))
        for _ in range(self.random.randint(2, 7)):
            kinds = [
                self._convolution, self._convolution, self._normalised, self._activation,
                self._sum, self._sum, self._concatenation, self._pooling, self._dropout,
                self._shared,
            ]  # fmt: skip
            self._add(self.random.choice(kinds), self.random.randrange(len(self.values)))
        self.head = self._head()
        self.also = self.random.random() < 0.3
        del self.random

    def _add(self, kind: Callable[[int], Any], source: int) -> None:
        made = kind(source)
        if made is not None:
            run, value = made
            self.steps.append(run)
            self.values.append(value)
            self.said.append(f"{kind.__name__[1:]}({source})")

    def _keep(self, part: Any) -> Part:
        if not isinstance(part, nn.Module):
            return part
        self.parts.append(part)
        return len(self.parts) - 1

    def call(self, part: Part, value: Tensor) -> Tensor:
        return self.parts[part](value) if isinstance(part, int) else part(value)

    def _convolution(self, source: int, act: bool | None = None) -> Any:
        channels, side = self.values[source]
        choice = self.random.choice
        outputs, kernel, stride = choice([4, 8]), choice([1, 3, 3]), choice([1, 1, 2])
        padding = choice([0, kernel // 2, kernel // 2])
        if side + 2 * padding < kernel:
            return None
        bias = choice([True, False])
        conv = self._keep(nn.Conv2d(channels, outputs, kernel, stride, padding, bias=bias))
        rest = [self._keep(nn.BatchNorm2d(outputs))] if choice([True, False, True]) else []
        name = choice(list(ACTIVATIONS))
        rest.append(self._keep(ACTIVATIONS[name](outputs)))

        def run(net: Generated, values: list[Tensor]) -> Tensor:
            value = net.call(conv, values[source])
            for part in rest:
                value = net.call(part, value)
            return value

        return run, (outputs, (side + 2 * padding - kernel) // stride + 1)

    def _normalised(self, source: int) -> Any:
        """A batch norm before the convolution."""
        channels, _ = self.values[source]
        norm = self._keep(nn.BatchNorm2d(channels))
        made = self._convolution(source)
        if made is None:
            return None
        run, value = made

        def normalised(net: Generated, values: list[Tensor]) -> Tensor:
            given = net.call(norm, values[source])
            return run(net, [*values[:source], given, *values[source + 1 :]])

        return normalised, value

    def _activation(self, source: int) -> Any:
        channels, _ = self.values[source]
        act = self._keep(ACTIVATIONS[self.random.choice(list(ACTIVATIONS))](channels))
        return lambda net, values: net.call(act, values[source]), self.values[source]

    def _alike(self, source: int, by: slice = slice(None)) -> int:
        alike = [i for i, v in enumerate(self.values) if v[by] == self.values[source][by]]
        return self.random.choice(alike)

    def _sum(self, source: int) -> Any:
        # Not into the caller's input.
        names = list(ADDITIONS) if source else ["+", "torch.add", ".add"]
        add, other = ADDITIONS[self.random.choice(names)], self._alike(source)
        act = self._keep(ACTIVATIONS[self.random.choice(list(ACTIVATIONS))](self.values[source][0]))
        return (
            lambda net, values: net.call(act, add(values[source], values[other])),
            self.values[source],
        )

    def _concatenation(self, source: int) -> Any:
        other = self._alike(source, slice(1, 2))
        channels = self.values[source][0] + self.values[other][0]
        if channels > 32:
            return None
        return (
            lambda net, values: torch.cat([values[source], values[other]], 1),
            (channels, self.values[source][1]),
        )

    def _pooling(self, source: int) -> Any:
        channels, side = self.values[source]
        if side < 2:
            return None
        pool, after = self.random.choice(
            [
                (nn.MaxPool2d(2), side // 2),
                (lambda x: F.max_pool2d(x, 3, 1, 1), side),
                (nn.AvgPool2d(2), side // 2),
                (nn.AvgPool2d(3, 1, 1, count_include_pad=False), side),
                (lambda x: F.avg_pool2d(x, 3, 1, 1), side),
                (nn.MaxPool2d(2, ceil_mode=True), -(-side // 2)),
                (nn.AdaptiveAvgPool2d(side), side),
                (nn.AdaptiveAvgPool2d(2), 2),
                (lambda x: F.interpolate(x, scale_factor=2), 2 * side),
            ]
        )
        part = self._keep(pool)
        return lambda net, values: net.call(part, values[source]), (channels, after)

    def _dropout(self, source: int) -> Any:
        drop = self._keep(
            self.random.choice([nn.Dropout(), nn.Dropout2d(), lambda x: F.dropout(x, 0.5, False)])
        )
        return lambda net, values: net.call(drop, values[source]), self.values[source]

    def _shared(self, source: int) -> Any:
        """A module of before, once more."""
        channels, side = self.values[source]
        convs = [
            i
            for i, module in enumerate(self.parts)
            if isinstance(module, nn.Conv2d) and module.in_channels == channels
        ]
        if not convs:
            return None
        chosen = self.random.choice(convs)
        conv = self.parts[chosen]
        after = (side + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1
        if after < 1:
            return None
        return lambda net, values: net.call(chosen, values[source]), (conv.out_channels, after)

    def _head(self) -> Run:
        channels, side = self.values[-1]
        choice = self.random.randrange(6)
        inputs = channels * (side * side if choice >= 4 else 1)
        linear = self._keep(nn.Linear(inputs, 5, bias=bool(self.random.getrandbits(1))))
        flatten = (
            lambda x: nn.functional.adaptive_avg_pool2d(x, 1).flatten(1),
            lambda x: torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1),
            lambda x: x.mean((2, 3)),
            lambda x: x.mean([-1, -2], keepdim=True).view(x.size(0), -1),
            lambda x: x.reshape(x.shape[0], -1),
            lambda x: x.flatten(1),
        )[choice]
        return lambda net, values: net.call(
            linear, F.dropout(flatten(values[-1]), training=net.training)
        )

    def forward(self, input: Tensor) -> Any:
        if self.dynamic and input.shape[2] != 8:
            raise ValueError("accepted are images of 8×8")
        values = [input]
        for step in self.steps:
            values.append(step(self, values))
        output = self.head(self, values)
        return (output, values[1]) if self.also else output


def with_statistics(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, its batch norms as after training."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
            if isinstance(module, nn.PReLU):
                module.weight.uniform_(0.1, 0.5)
    return network.eval()


def supernet(network: nn.Module, group_sizes: tuple[int, ...] = (1, 4)) -> nn.Module:
    """All 3×3 convolutions but the first decomposed, in evaluation mode, at their last group
    sizes; of a network that has no other a copy."""
    network = with_statistics(network)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    if sum(m.kernel_size != (1, 1) and m.groups == 1 for m in convolutions) < 2:
        return copy.deepcopy(network)
    net = gross.decompose(network, group_sizes, keep_costlier=True, method="random", quiet=True)
    for layer in decomposed_layers(net).values():
        layer.group_size = layer.group_sizes[-1]
    return net.eval()
