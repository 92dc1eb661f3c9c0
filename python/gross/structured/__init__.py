"""Structured convolutions in any network: a regulariser for its training, and its conversion
afterwards."""

from .convert import decompose
from .regularization import Regularizer, regularizer
from .report import StructuredDecomposition, StructuredLayer

__all__ = [
    "Regularizer",
    "StructuredDecomposition",
    "StructuredLayer",
    "decompose",
    "regularizer",
]
