"""From a trained network to a supernet: ``gross.decompose(model)``, and what it is made of."""

from . import block_term, vbmf
from .block_term import BlockTerm, block_term_series
from .calibration import Calibration
from .convert import decompose
from .report import DecomposedLayer, Decomposition

__all__ = [
    "BlockTerm",
    "Calibration",
    "DecomposedLayer",
    "Decomposition",
    "block_term",
    "block_term_series",
    "decompose",
    "vbmf",
]
