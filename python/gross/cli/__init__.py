"""The ``gross`` command."""

from . import decompose as decompose
from . import search as search
from .app import app

__all__ = ["app"]
