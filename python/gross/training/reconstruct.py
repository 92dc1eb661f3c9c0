"""Response reconstruction (ICLR 2020 draft, section 3.3.2): the decomposed layers learn to give
what the convolutions gave that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..supernet import decomposed_layers


class ResponseLoss:
    """The loss of equation 9, ``Σ ‖A' - A‖_F / ‖A‖_F`` over the decomposed layers: of a supernet's
    layers the activations A', of the original network's convolutions A, both on the same batch, all
    layers at once.

    Each network runs on its own: a layer's input is what the supernet gives it. An activation is
    the layer's own output, before what follows it.

    Args:
        supernet: whose layers learn.
        original: the network before its decomposition; the layers have the same names in it.

    Raises:
        ValueError: if ``original`` lacks one of the layers.
    """

    def __init__(self, supernet: nn.Module, original: nn.Module) -> None:
        self.original = original
        self.names = list(decomposed_layers(supernet))
        self._activations: dict[tuple[str, bool], Tensor] = {}
        present = dict(original.named_modules())
        missing = [name for name in self.names if name not in present]
        if missing:
            raise ValueError(
                f"teacher: got {type(original).__name__} without {missing[0]!r}, accepted is the "
                "network before its decomposition"
            )
        self._hooks = [
            model.get_submodule(name).register_forward_hook(self._keeper((name, target)))
            for model, target in ((supernet, False), (original, True))
            for name in self.names
        ]

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        training = self.original.training
        with torch.no_grad():
            self.original.eval()(inputs)
        self.original.train(training)
        model(inputs)
        ratios = []
        for name in self.names:
            response = self._activations.pop((name, False)).float()
            target = self._activations.pop((name, True)).float()
            ratios.append((response - target).norm() / target.norm())
        return torch.stack(ratios).sum()

    def close(self) -> None:
        """Take the hooks off both networks."""
        for hook in self._hooks:
            hook.remove()

    def _keeper(self, key: tuple[str, bool]) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._activations[key] = output

        return keep
