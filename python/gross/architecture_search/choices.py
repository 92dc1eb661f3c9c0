"""What a search chooses for each layer: a group size, in float32 or in 8 bits.

Within a search a choice is an int: ``s`` is group size s in float32, ``−s`` the same in 8 bits. So
spaces, journals and methods are those of group sizes alone. A result has group sizes and, beside
them, the names of the layers in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..supernet import Configuration

if TYPE_CHECKING:
    from .evaluations import Evaluation

PRECISIONS = ("float32", "int8", "mixed")

#: One choice per decomposed layer, in network order.
Choices = tuple[int, ...]


def of_sizes(group_sizes: Sequence[int], precision: str) -> Choices:
    """What may be chosen for a layer of these group sizes."""
    floats, lowered = tuple(group_sizes), tuple(-size for size in group_sizes)
    return {"float32": floats, "int8": lowered, "mixed": floats + lowered}[precision]


def choices_of(evaluation: Evaluation, layers: Sequence[str]) -> Choices:
    """What the result of a search has as group sizes and names of layers; ``layers`` are all names,
    or none where no layer is in 8 bits."""
    names = layers or [""] * len(evaluation.configuration)
    return tuple(
        -size if name in evaluation.int8 else size
        for name, size in zip(names, evaluation.configuration, strict=True)
    )


def sizes(chosen: Choices) -> Configuration:
    """The group sizes alone."""
    return tuple(map(abs, chosen))


def in_8_bits(chosen: Choices) -> tuple[bool, ...]:
    """Which layers are in 8 bits."""
    return tuple(choice < 0 for choice in chosen)


def shown(chosen: Choices) -> str:
    """As text: ``(8, −4, 1)`` → "8 4i 1"."""
    return " ".join(str(choice) if choice > 0 else f"{-choice}i" for choice in chosen)
