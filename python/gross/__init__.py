"""GroSS: train every grouped-convolution architecture of a network at once, and find the best one
under a budget."""

from . import data, networks, structured
from .architecture_search import Budget, SearchResult, search
from .decomposition import decompose
from .deployment import export, load_program
from .devices import Graphed
from .evaluation import Accuracy, evaluate
from .latency import LatencyTable
from .macs import MacsReport, macs
from .storage import load, save
from .supernet import configuration, set_configuration
from .training import Sampler, finetune, train

__all__ = [
    "Accuracy",
    "Budget",
    "Graphed",
    "LatencyTable",
    "MacsReport",
    "Sampler",
    "SearchResult",
    "configuration",
    "data",
    "decompose",
    "evaluate",
    "export",
    "finetune",
    "load",
    "load_program",
    "macs",
    "networks",
    "save",
    "search",
    "set_configuration",
    "structured",
    "train",
]
