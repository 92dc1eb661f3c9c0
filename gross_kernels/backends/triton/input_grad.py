"""Input gradient: the correlation of the output's gradient with the transposed weights, on the
forward's kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .forward import run


def input_grad(
    grad: Tensor,
    input: Tensor,
    terms: Sequence[Tensor],
    active: int,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient with respect to the input, of the input's shape, dtype and memory format."""
    return run(grad, input, terms[:active], gates, stride, padding, dilation)
