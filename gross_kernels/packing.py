"""Packed weights: a layer's summed weights in the fused kernel's order, kept for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch
from .bottleneck import Weights
from .geometry import Geometry
from .library import transformed

_run = torch.ops.gross.bottleneck_packed.default


class Packed:
    """Summed weights in the fused kernel's order, and what they were made from.

    Attributes:
        weights, channels: the operator's ``packed``, and the first numbers of its ``shape``.
        dtype: of the inputs that they serve.
        sources, state: the parameters, kept so that no other object takes their identities, and
            what they were like.

    Args:
        weights: of the layer.
        like: a tensor of the inputs' dtype and device.

    Raises:
        RuntimeError: for weights whose changes cannot be seen.
    """

    def __init__(self, weights: Weights, like: Tensor) -> None:
        self.sources = _sources(weights)
        if any(source.is_inference() for source in self.sources):
            raise RuntimeError(
                "pack: got parameters made in inference mode, accepted are those whose changes "
                "torch counts"
            )
        if not all(isinstance(source, nn.Parameter) for source in self.sources):
            raise RuntimeError(
                "pack: got parameters that are computed at every call (pruned or parametrised), "
                "accepted are plain ones: make them permanent first, by "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations"
            )
        self.dtype = like.dtype
        self.state = _state(self.sources)
        group_size = weights.grouped[int(weights.active) - 1].shape[1]
        first, grouped, last = (terms[0].shape[0] for terms in weights.series)
        self.channels = (first, grouped, group_size, last)
        with torch.no_grad():
            self.weights = torch.ops.gross.bottleneck_pack(like, *weights)

    def serves(self, input: Tensor, weights: Weights) -> bool:
        """Whether the packed weights can be used for this call.

        Raises:
            RuntimeError: if a parameter has changed since they were made.
        """
        # A compiled graph could not see that a parameter has changed since. Packed weights are on
        # the CPU, and so then is the input.
        if (
            weights.gates is not None
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or dispatch.choose_layer("cpu").name != "fused"
            or _activation_dtype(input) != self.dtype
            or transformed()
        ):
            return False
        if _state(_sources(weights)) != self.state:
            raise RuntimeError(
                "pack: a parameter has changed since the layer was packed; call pack() again, or "
                "train() to drop the packed weights"
            )
        return True

    def __call__(
        self, input: Tensor, kernel_size: Sequence[int], geometry: Geometry, relu: bool
    ) -> Tensor:
        """The layer's output."""
        stride, padding, dilation = geometry
        shape = (*self.channels, *kernel_size, *stride, *padding, *dilation)
        return _run(input, self.weights, shape, relu)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a layer are not packed: their parameters are others."""
        return type(None), ()


def _sources(weights: Weights) -> list[Tensor]:
    first, grouped, last, bias, *_ = weights
    return [*first, *grouped, *last] if bias is None else [*first, *grouped, *last, bias]


def _state(parameters: list[Tensor]) -> list[tuple[int, int, int]]:
    """Which parameters they are, where their numbers are, and how often they have been written."""
    return [(id(parameter), parameter.data_ptr(), parameter._version) for parameter in parameters]


def _activation_dtype(input: Tensor) -> torch.dtype:
    """The dtype that a kernel on the CPU computes in: autocast casts the input."""
    if torch.is_autocast_enabled("cpu") and input.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return input.dtype
