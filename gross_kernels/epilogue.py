"""What follows a sum before it is stored: ``act(sum + bias + residual)``, or ``act(sum + bias) +
residual``."""

from __future__ import annotations

from typing import NamedTuple

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
