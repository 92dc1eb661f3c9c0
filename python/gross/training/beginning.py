"""The frozen beginning of a network, in pieces of the batch that stay in the cache.

A supernet's first convolution is rarely decomposed, so by default it does not train: only its
output is wanted, none of what a backward pass would read. On the 4-layer network that output is the
largest tensor of the step, 33 MB, of which pooling leaves a quarter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

#: What gives each image what it gives it alone. Batch norms are not among them: they may train.
BY_IMAGE = (
    nn.Conv2d,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.Identity,
)
#: So many numbers the largest tensor of a piece has at most, 4 MB of them, and one image at least.
PIECE = 2**20


@contextmanager
def in_pieces(model: nn.Module) -> Iterator[None]:
    """Within, the frozen modules at the beginning of every ``nn.Sequential`` of ``model`` run on a
    few images at a time, on the CPU, where the input needs no gradient. The values are the same up
    to the rounding of other batch sizes."""
    with ExitStack() as stack:
        for module in model.modules():
            if type(module) is nn.Sequential and "forward" not in vars(module):
                frozen = list(takewhile(_frozen, module))
                if any(type(each) is nn.Conv2d for each in frozen):
                    vars(module)["forward"] = _Pieces(module, frozen)
                    stack.callback(vars(module).pop, "forward")
        yield


def _frozen(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return type(module) in BY_IMAGE and not trained and not any(hooks)


class _Pieces:
    """The forward of an ``nn.Sequential`` whose first modules are frozen."""

    def __init__(self, sequential: nn.Sequential, frozen: list[nn.Module]) -> None:
        self.frozen = frozen
        self.others = list(sequential)[len(frozen) :]
        self.images: dict[tuple[int, ...], int] = {}  #: of a piece, by the shape of an input.

    def __call__(self, input: Any) -> Any:
        output = self._beginning(input) if self._applies(input) else _run(self.frozen, input)
        return _run(self.others, output)

    def _applies(self, input: Any) -> bool:
        return (
            isinstance(input, Tensor)
            and input.device.type == "cpu"
            and input.dim() == 4
            and not input.requires_grad
            and not torch_module._has_any_global_hook()
        )

    @torch.no_grad()
    def _beginning(self, input: Tensor) -> Tensor:
        shape = tuple(input.shape[1:])
        if shape not in self.images:
            tensors = [input[:1]]
            for module in self.frozen:
                tensors.append(module(tensors[-1].clone()))
            self.images[shape] = max(1, PIECE // max(map(Tensor.numel, tensors)))
        pieces = [_run(self.frozen, piece) for piece in input.split(self.images[shape])]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _run(modules: list[nn.Module], input: Any) -> Any:
    for module in modules:
        input = module(input)
    return input
