"""From a trained network to a supernet: ``gross.decompose(model)``, and what it is made of.

The package is callable: calling it calls :func:`gross.decompose.convert.decompose`.
"""

import sys
from types import ModuleType
from typing import cast

from . import block_term, vbmf
from .block_term import BlockTerm, block_term_series
from .convert import DecomposedLayer, Decomposition, decompose

__all__ = [
    "BlockTerm",
    "DecomposedLayer",
    "Decomposition",
    "block_term",
    "block_term_series",
    "decompose",
    "vbmf",
]


class CallableModule(ModuleType):
    """This package, as a module that can be called."""

    __call__ = staticmethod(decompose)


sys.modules[__name__].__class__ = CallableModule
#: This package under its type, for ``import gross``.
package = cast(CallableModule, sys.modules[__name__])
