"""What a training run shows on the error stream: a bar on a terminal, else one line an epoch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..extras import from_extra
from ..report import error_console


class Progress:
    """Shows nothing."""

    def step(self, done: int, line: str) -> None:
        """``done`` steps of the whole run, and how the training goes."""

    def epoch(self, line: str) -> None:
        """An epoch's results."""

    def say(self, line: str) -> None:
        """Something that the user should know."""


class Lines(Progress):
    """One line an epoch."""

    def __init__(self) -> None:
        self._console = error_console()

    def epoch(self, line: str) -> None:
        self.say(line)

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class Bar(Lines):
    """A bar under the lines, with the time that is left."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._console = bar.console
        self._bar = bar
        self._task = task

    def step(self, done: int, line: str) -> None:
        self._bar.update(self._task, completed=done, description=line)


@contextmanager
def shown(steps: int, quiet: bool) -> Iterator[Progress]:
    """The progress of a run of ``steps`` steps."""
    if quiet:
        yield Progress()
        return
    if not sys.stderr.isatty():
        yield Lines()
        return
    with from_extra():
        from rich import progress as rich

    columns = (
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.description}"),
    )
    with rich.Progress(*columns, console=error_console()) as bar:
        yield Bar(bar, bar.add_task("", total=steps))


def draws(expected: Mapping[str, Mapping[int, float]]) -> str:
    """The table of expected draws, one line a layer: "features.3  1: 100  2: 100"."""
    width = max(map(len, expected))
    lines = [
        f"  {name:{width}}  " + "  ".join(f"{size}: {count:.0f}" for size, count in counts.items())
        for name, counts in expected.items()
    ]
    return "\n".join(["expected draws of each group size:", *lines])
