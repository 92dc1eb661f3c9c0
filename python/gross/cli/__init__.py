"""The ``gross`` command."""

from . import decompose as decompose
from .app import app

__all__ = ["app"]
