"""GroSS: train every grouped-convolution architecture of a network at once, and find the best one
under a budget."""

from . import data, networks
from .decomposition import decompose
from .macs import MacsReport, macs
from .storage import load, save
from .supernet import configuration, set_configuration
from .training import Sampler, finetune, train

__all__ = [
    "MacsReport",
    "Sampler",
    "configuration",
    "data",
    "decompose",
    "finetune",
    "load",
    "macs",
    "networks",
    "save",
    "set_configuration",
    "train",
]
