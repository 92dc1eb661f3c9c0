"""What a search shows on the error stream: evaluations done, the best so far, the time left."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..extras import from_extra
from ..report import error_console

#: Called with the evaluations that are done, those that are asked for, and the best score.
Show = Callable[[int, int, float], None]


@contextmanager
def shown(name: str, quiet: bool) -> Iterator[Show]:
    """A bar, on a terminal alone."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total, best: None
        return
    with from_extra():
        from rich import progress as rich
    columns = (
        rich.TextColumn(name),
        rich.BarColumn(),
        rich.TextColumn("{task.completed:.0f} of {task.total:.0f} evaluations{task.description}"),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=error_console()) as bar:
        task = bar.add_task("", total=1)

        def show(done: int, total: int, best: float) -> None:
            text = f", best {best:.2f}" if math.isfinite(best) else ""
            bar.update(task, completed=done, total=total, description=text)

        yield show
