"""How results are shown: large numbers in short, tables as text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from .extras import from_extra

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

#: Columns of a table that is turned into text, so that a report reads the same in a file as on a
#: wide terminal.
TEXT_WIDTH = 120


def short(number: int) -> str:
    """A count, in three significant digits where it has more: 64 → "64", 5127680 → "5.13M"."""
    if number < 1000:
        return str(number)
    value, units = float(number), ["", "k", "M", "G"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:#.3g}".rstrip(".") + units[0]


def size(shape: Iterable[int]) -> str:
    """A shape: (3, 224, 224) → "3×224×224"."""
    return "×".join(map(str, shape))


def errors_in_short(errors: Sequence[float] | None) -> str:
    """Relative errors in three decimals: (0.7484, 0.0) → ".748 .000"; nothing for None."""
    return " ".join(f"{error:.3f}".removeprefix("0") for error in errors or ())


def tracked(items: Sequence[T], title: str) -> Iterable[T]:
    """The items one after the other, with a bar on the error stream where that is a terminal."""
    from rich.progress import track

    console = error_console()
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)


def error_console() -> Console:
    """rich's console on the error stream, wide enough for a table where that is not a terminal."""
    with from_extra():
        from rich.console import Console
    return Console(stderr=True, width=None if sys.stderr.isatty() else TEXT_WIDTH)


def text(renderable: object) -> str:
    """What rich would print, as plain text."""
    with from_extra():
        from rich.console import Console
    console = Console(width=TEXT_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip("\n")
