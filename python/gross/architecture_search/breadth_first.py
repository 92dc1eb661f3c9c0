"""Greedy breadth-first search, as in section 3.4 of the paper."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from .choices import Choices
from .evaluations import Evaluations
from .space import Space


@dataclass(frozen=True)
class BreadthFirst:
    """From a random configuration within the budget to its best neighbour, again and again.

    A neighbour differs in one layer. A run ends when no neighbour within the budget is more
    accurate. Neighbours beyond the budget cannot be chosen and are not evaluated.

    Attributes:
        runs: from so many starts.
        steps: the most moves of a run.
        starts: where the first runs start; the others start at random. The paper takes the ten
            best configurations of the search under the next smaller budget. A negative size is one
            in 8 bits.
    """

    name: ClassVar[str] = "breadth-first"

    runs: int = 20
    steps: int = 25
    starts: tuple[Choices, ...] = ()

    def __call__(self, space: Space, evaluations: Evaluations, generator: random.Random) -> None:
        starts = [c for c in self.starts if space.allows(c)][: self.runs]
        starts += [space.draw(generator) for _ in range(self.runs - len(starts))]
        for current in starts:
            evaluations([current])
            for _ in range(self.steps):
                neighbours = space.neighbours(current)
                evaluations(neighbours)
                best = max(neighbours, key=evaluations.rank, default=current)
                if evaluations.rank(best) <= evaluations.rank(current):
                    break
                current = best
