"""From a supernet and a configuration to a network that is fast, and to files."""

from .exporting import export
from .files import load_program, save_program
from .plan import Report
from .precision import Int8

__all__ = ["Int8", "Report", "export", "load_program", "save_program"]
