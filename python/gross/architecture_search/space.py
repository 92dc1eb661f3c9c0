"""The configurations that a search may choose from."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ..supernet import Configuration
from .cost import Limit

#: Draws from the whole space before the next one is steered into the limits.
REJECTIONS = 100


@dataclass(frozen=True)
class Space:
    """Every combination of group sizes, and the limits of the budget.

    Attributes:
        group_sizes: those of each decomposed layer, in network order.
        limits: all must hold.
    """

    group_sizes: tuple[tuple[int, ...], ...]
    limits: tuple[Limit, ...] = ()

    @property
    def size(self) -> int:
        """How many configurations there are, within the limits or not."""
        return math.prod(map(len, self.group_sizes))

    def allows(self, configuration: Sequence[int]) -> bool:
        return all(limit.allows(configuration) for limit in self.limits)

    def __iter__(self) -> Iterator[Configuration]:
        """The configurations within the limits, in lexicographic order."""
        return filter(self.allows, product(*self.group_sizes))

    def neighbours(self, configuration: Configuration) -> list[Configuration]:
        """The configurations within the limits that differ in one layer (section 3.4)."""
        found = [
            (*configuration[:i], size, *configuration[i + 1 :])
            for i, sizes in enumerate(self.group_sizes)
            for size in sizes
            if size != configuration[i]
        ]
        return [c for c in found if self.allows(c)]

    def draw(self, generator: random.Random) -> Configuration:
        """A random configuration within the limits.

        Uniform over all of them as long as they are not too rare; then layer by layer in random
        order, each from the sizes that leave room for the others.

        Raises:
            ValueError: if none was found, which only several limits at once can cause.
        """
        for _ in range(REJECTIONS):
            drawn = tuple(map(generator.choice, self.group_sizes))
            if self.allows(drawn):
                return drawn
        for _ in range(REJECTIONS):
            steered = self._steered(generator)
            if self.allows(steered):
                return steered
        raise ValueError(
            "budget: no configuration was found that is within all of "
            + ", ".join(f"{limit.most:,.6g} {limit.cost.name}" for limit in self.limits)
        )

    def _steered(self, generator: random.Random) -> Configuration:
        chosen = [0] * len(self.group_sizes)
        room = [limit.most - limit.cost.smallest for limit in self.limits]
        for i in generator.sample(range(len(chosen)), len(chosen)):
            extra = [
                {size: cost - min(layer.values()) for size, cost in layer.items()}
                for layer in (limit.cost.per_layer[i] for limit in self.limits)
            ]
            fitting = [
                size
                for size in self.group_sizes[i]
                if all(more[size] <= left for more, left in zip(extra, room, strict=True))
            ]
            chosen[i] = generator.choice(fitting or self.group_sizes[i])
            room = [left - more[chosen[i]] for more, left in zip(extra, room, strict=True)]
        return tuple(chosen)
