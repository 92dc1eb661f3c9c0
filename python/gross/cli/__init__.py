"""The ``gross`` command."""

from ..extras import from_extra

# The libraries of the command line are imported in here, and nowhere outside.
with from_extra():
    from . import decompose as decompose
    from . import train as train
    from .app import app

__all__ = ["app"]
