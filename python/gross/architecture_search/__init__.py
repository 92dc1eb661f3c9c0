"""Search: the best configuration of a supernet under a budget, by four methods, with evidence."""

from .breadth_first import BreadthFirst
from .cost import Budget, Cost, costs_of
from .evaluations import Evaluation
from .evolution import Evolution
from .exhaustive import Exhaustive
from .individual import Study, study
from .random_search import RandomSearch
from .ranking import agreement, average_precision
from .result import SearchResult
from .searching import search

__all__ = [
    "BreadthFirst",
    "Budget",
    "Cost",
    "Evaluation",
    "Evolution",
    "Exhaustive",
    "RandomSearch",
    "SearchResult",
    "Study",
    "agreement",
    "average_precision",
    "costs_of",
    "search",
    "study",
]
