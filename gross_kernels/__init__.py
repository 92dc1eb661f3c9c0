"""Fused grouped convolutions over group-size series: the operator, its kernels and the layers built on it."""

from . import ops as ops
from .dispatch import use_backend
from .functional import explain, series_conv2d
from .layers import GroSSConv2d, SeriesConv2d
from .series import expand

__all__ = ["GroSSConv2d", "SeriesConv2d", "expand", "explain", "series_conv2d", "use_backend"]
