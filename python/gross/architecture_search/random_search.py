"""Random search: the baseline that every other method is shown beside (Li and Talwalkar, 2019)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from .choices import Choices
from .evaluations import Evaluations
from .space import Space


@dataclass(frozen=True)
class RandomSearch:
    """Distinct random configurations within the budget.

    Attributes:
        evaluations: how many, or all that there are.
    """

    name: ClassVar[str] = "random"

    evaluations: int = 500

    def __call__(self, space: Space, evaluations: Evaluations, generator: random.Random) -> None:
        drawn: dict[Choices, None] = {}
        repeats = 0
        # A space that has fewer is known by its repeats.
        while len(drawn) < self.evaluations and repeats < 100 + 10 * len(drawn):
            before = len(drawn)
            drawn[space.draw(generator)] = None
            repeats = 0 if len(drawn) > before else repeats + 1
        evaluations(drawn)
