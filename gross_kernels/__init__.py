"""Fused grouped convolutions over group-size series, and structured convolutions: the operators,
their kernels and the layers built on them."""

from . import ops as ops
from .composite import CompositeBasis, StructuredBasis
from .dispatch import use_backend, use_fused, use_layer
from .functional import explain, series_conv2d
from .layers import GroSSConv2d, SeriesConv2d, pack
from .series import expand
from .structured import StructuredConv2d, StructuredConv3d, StructuredLinear

__version__ = "0.1.0"

__all__ = [
    "CompositeBasis",
    "GroSSConv2d",
    "SeriesConv2d",
    "StructuredBasis",
    "StructuredConv2d",
    "StructuredConv3d",
    "StructuredLinear",
    "__version__",
    "expand",
    "explain",
    "pack",
    "series_conv2d",
    "use_backend",
    "use_fused",
    "use_layer",
]
