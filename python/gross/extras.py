"""The optional libraries: imported where they are used, with an error that says how to get them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def from_extra(extra: str = "gross") -> Iterator[None]:
    """Around an import of an optional library: if it is not installed, say which extra of this
    package brings it.

    Raises:
        ImportError: naming the missing module and ``pip install gross-kernels[extra]``.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is needed here and is not installed: pip install gross-kernels[{extra}]",
            name=error.name,
        ) from error
