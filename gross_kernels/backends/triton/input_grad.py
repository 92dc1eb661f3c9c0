"""Input gradient: the correlation of the output's gradient with the transposed weights, on the
forward's kernels."""

from __future__ import annotations

from torch import Tensor

from ...geometry import Geometry
from ...series import Series
from .forward import run


def input_grad(grad: Tensor, input: Tensor, series: Series, geometry: Geometry) -> Tensor:
    """Gradient with respect to the input, of the input's shape, dtype and memory format."""
    return run(grad, input, series, geometry)
