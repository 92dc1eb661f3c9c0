"""Exhaustive search (section 3.4): every configuration within the budget."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import ClassVar

from .evaluations import Evaluations
from .space import Space

#: Configurations by which the time of a search that is too large is estimated.
TRIAL = 4


@dataclass(frozen=True)
class Exhaustive:
    """Evaluate everything.

    Attributes:
        limit: the most configurations that the space may have.
    """

    name: ClassVar[str] = "exhaustive"

    limit: int = 4096

    def __call__(self, space: Space, evaluations: Evaluations, generator: random.Random) -> None:
        """Raises ValueError for a space beyond the limit, with the time that it would take."""
        if space.size > self.limit:
            began = time.perf_counter()
            evaluations(space.draw(generator) for _ in range(TRIAL))
            days = (time.perf_counter() - began) / TRIAL * space.size / 86400
            raise ValueError(
                f"method: got an exhaustive search of {space.size:,} configurations, which takes "
                f"about {days:,.1f} days; accepted are at most {self.limit:,}: search breadth-first"
            )
        evaluations(space)
