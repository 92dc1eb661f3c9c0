"""What a search may choose from."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from .choices import Choices
from .cost import Limit

#: Draws from the whole space before the next one is steered into the limits.
REJECTIONS = 100


@dataclass(frozen=True)
class Space:
    """Every combination of choices, and the limits of the budget.

    Attributes:
        choices: those of each decomposed layer, in network order.
        limits: all must hold.
    """

    choices: tuple[tuple[int, ...], ...]
    limits: tuple[Limit, ...] = ()

    @property
    def size(self) -> int:
        """How many configurations there are, within the limits or not."""
        return math.prod(map(len, self.choices))

    def allows(self, chosen: Sequence[int]) -> bool:
        return all(limit.allows(chosen) for limit in self.limits)

    def __iter__(self) -> Iterator[Choices]:
        """The combinations within the limits, in lexicographic order."""
        return filter(self.allows, product(*self.choices))

    def neighbours(self, chosen: Choices) -> list[Choices]:
        """The combinations within the limits that differ in one layer (section 3.4)."""
        found = [
            (*chosen[:i], choice, *chosen[i + 1 :])
            for i, own in enumerate(self.choices)
            for choice in own
            if choice != chosen[i]
        ]
        return [c for c in found if self.allows(c)]

    def draw(self, generator: random.Random) -> Choices:
        """A random combination within the limits.

        Uniform over all of them as long as they are not too rare; then layer by layer in random
        order, each from the choices that leave room for the others.

        Raises:
            ValueError: if none was found, which only several limits at once can cause.
        """
        for _ in range(REJECTIONS):
            drawn = tuple(map(generator.choice, self.choices))
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

    def _steered(self, generator: random.Random) -> Choices:
        choices = self.choices
        floats = tuple(tuple(choice for choice in own if choice > 0) for own in choices)
        # Costs may be others with none in 8 bits.
        if floats != choices and all(floats) and generator.random() < 0.5:
            choices = floats
        chosen = [0] * len(choices)
        room = [limit.most - limit.cost.least(choices) for limit in self.limits]
        for i in generator.sample(range(len(chosen)), len(chosen)):
            extra = [
                {choice: layer[choice] - min(layer[c] for c in choices[i]) for choice in choices[i]}
                for layer in (limit.cost.of(choices).per_layer[i] for limit in self.limits)
            ]
            fitting = [
                choice
                for choice in choices[i]
                if all(more[choice] <= left for more, left in zip(extra, room, strict=True))
            ]
            chosen[i] = generator.choice(fitting or choices[i])
            room = [left - more[chosen[i]] for more, left in zip(extra, room, strict=True)]
        return tuple(chosen)
