"""What follows a sum before it is stored: ``act(sum + bias + residual)``, or ``act(sum + bias) +
residual``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "relu", "prelu", "relu6", "silu")


class Epilogue(NamedTuple):
    """What is added to a sum, and what becomes of it.

    Attributes:
        bias: one number per output channel, or None.
        residual: of the output's shape and dtype, or None.
        activation: one of :data:`ACTIVATIONS`.
        slopes: of "prelu", one number per output channel or one for all; None of the others.
        residual_last: whether the residual is added after the activation.
    """

    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"
    slopes: Tensor | None = None
    residual_last: bool = False

    def check(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Raise ValueError for what does not fit an output of this shape and dtype."""
        channels = shape[1]
        if self.activation not in ACTIVATIONS:
            listed = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation: got {self.activation!r}, accepted are {listed}")
        if self.bias is not None and self.bias.shape != (channels,):
            raise ValueError(f"bias: got {tuple(self.bias.shape)}, accepted is {(channels,)}")
        slopes = None if self.slopes is None else tuple(self.slopes.shape)
        if self.activation == "prelu" and slopes not in ((1,), (channels,)):
            raise ValueError(f"slopes: got {slopes}, accepted are (1,) and {(channels,)}")
        residual = self.residual
        if residual is not None and (residual.shape != tuple(shape) or residual.dtype != dtype):
            raise ValueError(
                f"residual: got {tuple(residual.shape)} of {residual.dtype}, accepted is "
                f"{tuple(shape)} of {dtype}"
            )

    def of(self, value: Tensor) -> Tensor:
        """The definition, in PyTorch's own operators, of a sum ``[N, C, …]``."""
        if self.bias is not None:
            value = value + self.bias.to(value.dtype).view(1, -1, *[1] * (value.dim() - 2))
        if self.residual is not None and not self.residual_last:
            value = value + self.residual
        value = self._activated(value)
        return value + self.residual if self.residual is not None and self.residual_last else value

    def _activated(self, value: Tensor) -> Tensor:
        if self.activation == "relu":
            return F.relu(value)
        if self.activation == "relu6":
            return F.relu6(value)
        if self.activation == "silu":
            return F.silu(value)
        if self.activation == "prelu" and self.slopes is not None:
            return F.prelu(value, self.slopes.to(value.dtype))
        return value
