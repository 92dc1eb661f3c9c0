"""Fused grouped convolutions over group-size series: the operator, its kernels and the layers built
on it."""

from . import ops as ops
from .dispatch import use_backend, use_fused, use_layer
from .functional import explain, series_conv2d
from .layers import GroSSConv2d, SeriesConv2d, pack
from .series import expand

__version__ = "0.1.0"

__all__ = [
    "GroSSConv2d",
    "SeriesConv2d",
    "__version__",
    "expand",
    "explain",
    "pack",
    "series_conv2d",
    "use_backend",
    "use_fused",
    "use_layer",
]
