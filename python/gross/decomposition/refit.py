"""The last pointwise of every decomposed layer, fitted to the responses of the dense network:
equation 9 of the ICLR draft in closed form, for Q alone.

With y a convolution's response in the dense network, and r the grouped convolution's output in the
supernet, all of whose layers are at one group size,

    Q = argmin E‖y − b − Q r‖² + λ‖Q − Q₀‖² = (E[(y − b) rᵀ] + λQ₀) (E[r rᵀ] + λ)⁻¹

The bias b stays, for all group sizes share it. A layer that is exact stays exact, as Q₀ is the
minimum of both terms.

Layers are fitted in the order in which the network calls them, each to what the refitted ones
before it give it, and one pass over the data does for all of them: a batch that reaches a layer is
added to its normal equations, and goes on from their solution for all batches so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gross_kernels import GroSSConv2d

from ..copying import plain_name
from ..supernet import decomposed_layers
from .calibration import Calibration, by_channel, evaluation, watched

#: λ over the mean of ``E[r²]``.
RIDGE = 1e-4


class LeastSquares:
    """``argmin_Q Σ‖t − Q r‖² + λ‖Q − Q₀‖²`` over all columns r and t added so far.

    Attributes:
        solution: Q, ``[C_out, width]`` in float64; Q₀ until :meth:`solve`.
    """

    def __init__(self, start: Tensor) -> None:
        self.start = self.solution = start.double()
        self.gram = self.start.new_zeros((start.shape[1],) * 2)
        self.cross = torch.zeros_like(self.start)
        self.squares = self.start.new_zeros(())

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add columns r ``[width, n]`` and t ``[C_out, n]``, in float64."""
        self.gram += inputs @ inputs.T
        self.cross += targets @ inputs.T
        self.squares += targets.norm().square()

    def solve(self) -> None:
        """Set the solution."""
        ridge = RIDGE * self.gram.diagonal().mean() + torch.finfo(self.gram.dtype).tiny
        gram = self.gram.clone()
        gram.diagonal().add_(ridge)
        right = self.cross + ridge * self.start
        self.solution = torch.cholesky_solve(right.T, torch.linalg.cholesky(gram)).T

    def residual(self) -> Tensor:
        """``Σ‖t − Q r‖²``."""
        product = self.solution * (self.solution @ self.gram - 2 * self.cross)
        return (self.squares + product.sum()).clamp_min(0)


def match_responses(
    model: nn.Module,
    supernet: nn.Module,
    calibration: Calibration,
    *,
    refit: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, tuple[float, ...]]:
    """Refit Q of every decomposed layer at every group size, and measure the response errors.

    A layer that lacks a group size stands at the next smaller one it has while others are fitted.
    One that is called more than once, and layers that share their terms, are fitted to all their
    responses.

    Args:
        model: the dense network.
        supernet: its decomposition. Its ``pointwise_out`` change; its configuration is the largest
            afterwards.
        refit: False measures alone.
        progress: called with a line about what is being done.

    Returns:
        For each layer that the data reach, ``‖y − ŷ‖/‖y‖`` at each group size, ŷ its output in the
        supernet.
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    # Layers of the kind that the model has already are not ours.
    layers = {
        name: layer
        for name, layer in decomposed_layers(supernet).items()
        if isinstance(modules[name], nn.Conv2d)
    }
    fits: dict[tuple[int, int], LeastSquares] = {}
    stand_ins = {name: _StandIn(layer, fits, refit) for name, layer in layers.items()}
    convolutions = {name: modules[name] for name in layers}
    responses: dict[str, list[Tensor]] = {name: [] for name in layers}
    sizes = sorted({size for layer in layers.values() for size in layer.group_sizes})

    def keep(name: str, input: Tensor, response: Tensor) -> None:
        responses[name].append(response)

    with evaluation(model), evaluation(supernet), ExitStack() as stack:
        for name, layer in layers.items():
            vars(layer)["forward"] = stand_ins[name]
            stack.callback(vars(layer).pop, "forward")
        for position, model_input in enumerate(calibration):
            for kept in responses.values():
                kept.clear()
            with watched(convolutions, keep):
                model_input.run(model)
            for size in sizes:
                progress(f"input {position}, group size {size}")
                for name, stand_in in stand_ins.items():
                    stand_in.begin(size, iter(responses[name]))
                model_input.run(supernet)
        for stand_in in stand_ins.values():
            stand_in.finish()
    return {name: each.errors() for name, each in stand_ins.items() if each.squares}


class _StandIn:
    """What computes a decomposed layer's output while it is refitted."""

    def __init__(
        self, layer: GroSSConv2d, fits: dict[tuple[int, int], LeastSquares], refit: bool
    ) -> None:
        self.layer = layer
        self.refit = refit
        self.squares: dict[int, Tensor] = {}  #: ``Σ‖y‖²`` by group size.
        self.stages: dict[int, nn.Sequential] = {}
        self.fits: dict[int, LeastSquares] = {}
        for size in layer.group_sizes:
            folded = layer.fold(size)
            self.stages[size] = folded[:2]
            # Layers that share Q share its fit.
            key = (id(layer.pointwise_out), size)
            start = folded.state_dict()["2.weight"][:, :, 0, 0]
            self.fits[size] = fits.setdefault(key, LeastSquares(start))

    def begin(self, size: int, responses: Iterator[Tensor]) -> None:
        """Get ready for a run of the network at a group size, in which the dense layer's responses
        were these."""
        smaller = [s for s in self.layer.group_sizes if s <= size]
        self.size = smaller[-1] if smaller else self.layer.group_sizes[0]
        self.fitted = self.size == size
        self.responses = responses

    def __call__(self, input: Tensor) -> Tensor:
        inner = self.stages[self.size](input)
        fit, bias = self.fits[self.size], self.layer.bias
        if self.fitted:
            response = by_channel(next(self.responses))
            target = response if bias is None else response - bias.double()[:, None]
            fit.add(by_channel(inner), target)
            if self.refit:
                fit.solve()
            self.squares[self.size] = self.squares.get(self.size, 0) + response.norm().square()
        return F.conv2d(inner, fit.solution[:, :, None, None].to(inner.dtype), bias)

    def finish(self) -> None:
        """Write the solutions to the layer, as a series."""
        before = torch.zeros_like(self.fits[self.size].solution)
        for term, fit in zip(self.layer.pointwise_out, self.fits.values(), strict=True):
            term.copy_((fit.solution - before)[:, :, None, None])
            before = fit.solution

    def errors(self) -> tuple[float, ...]:
        """The response error at each group size."""
        return tuple(
            (fit.residual() / self.squares[size]).sqrt().item() for size, fit in self.fits.items()
        )
