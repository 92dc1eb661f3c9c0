"""What a search found."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..deployment.precision import Int8
from ..report import short, text
from ..supernet import Configuration
from ..training.run import replace
from .choices import choices_of, shown
from .evaluations import Evaluation

if TYPE_CHECKING:
    from rich.table import Table

#: Raised when results can no longer be read as they were.
FORMAT = 1


@dataclass(frozen=True)
class SearchResult:
    """What a search found. Printable; a JSON file with :meth:`save` and :meth:`load`.

    Attributes:
        configuration, score: the best within the budget.
        method, seed: of the search.
        limits: the budget in numbers, by cost.
        fixed: what every configuration costs, whatever its group sizes, by cost.
        evaluations: everything that the search asked for, in order.
        base: the base configuration's evaluation, where the budget is one.
        random: the best of as many random configurations, the baseline; None where the search is
            exhaustive or random itself.
        seconds: that this search spent on evaluations; those read from a journal cost nothing.
        provenance: time, versions, fingerprints.
        int8: the decomposed layers that are in 8 bits, by name.
        layers: all decomposed layers, by name, in network order.
    """

    configuration: Configuration
    score: float
    method: str
    seed: int
    limits: Mapping[str, float]
    fixed: Mapping[str, float]
    evaluations: tuple[Evaluation, ...]
    base: Evaluation | None
    random: Evaluation | None
    seconds: float
    provenance: Mapping[str, Any] = field(default_factory=dict)
    int8: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    @property
    def precision(self) -> str | Int8:
        """What was found, as :func:`gross.export` takes it: in 8 bits exactly these layers, and
        all that is no decomposed layer if there are any."""
        if not self.int8:
            return "float32"
        floats = tuple(name for name in self.layers if name not in self.int8)
        return Int8(most_error=sys.float_info.max, float32=floats)

    @property
    def found(self) -> Evaluation:
        """The evaluation of what was found."""
        wanted = (self.configuration, self.int8)
        return next(e for e in self.evaluations if (e.configuration, e.int8) == wanted)

    def shown(self, evaluation: Evaluation) -> str:
        """The configuration of one of the evaluations as text; "4i" is group size 4 in 8 bits."""
        return shown(choices_of(evaluation, self.layers))

    def best(self, count: int) -> tuple[Evaluation, ...]:
        """The evaluations with the best scores that the search saw, best first."""
        scored = [e for e in self.evaluations if e.score is not None]
        return tuple(sorted(scored, key=_score, reverse=True)[:count])

    def top(self, count: int) -> tuple[Configuration, ...]:
        """The group sizes of :meth:`best`."""
        return tuple(e.configuration for e in self.best(count))

    def front(self, cost: str = "macs") -> tuple[Evaluation, ...]:
        """The evaluations that none is better and cheaper than, cheapest first.

        Raises:
            ValueError: for a cost that is not known.
        """
        if cost not in self.fixed:
            raise ValueError(f"cost: got {cost!r}, accepted are {', '.join(map(repr, self.fixed))}")
        scored = [e for e in self.evaluations if e.score is not None]
        front: list[Evaluation] = []
        for e in sorted(scored, key=lambda e: (e.costs[cost], -_score(e))):
            if not front or _score(e) > _score(front[-1]):
                front.append(e)
        return tuple(front)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result as JSON, in place of a file that is there."""
        save([self], path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SearchResult:
        """Read what :meth:`save` wrote; ValueError for any other file."""
        (result,) = load(path)
        return result

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        failed = sum(e.score is None for e in self.evaluations)
        title = f"{self.method}, {len(self.evaluations)} evaluations in {self.seconds:.1f} s"
        table = Table(title=title + (f", {failed} failed" if failed else ""), box=SIMPLE_HEAD)
        table.add_column("")
        table.add_column("configuration")
        for name in self.found.costs:
            table.add_column(name, justify="right")
        table.add_column("score", justify="right")
        rows = (("base", self.base), ("found", self.found), ("random search", self.random))
        for name, e in rows:
            if e is not None:
                table.add_row(
                    name,
                    self.shown(e),
                    *map(_price, e.costs.values()),
                    "failed" if e.score is None else f"{e.score:.2f}",
                )
        return table

    def __str__(self) -> str:
        return text(self)


def save(results: Sequence[SearchResult], path: str | os.PathLike[str]) -> None:
    """Write the results of searches as one JSON file, in place of a file that is there."""
    content = {"format": FORMAT, "searches": [asdict(result) for result in results]}
    replace(Path(path), json.dumps(content))


def load(path: str | os.PathLike[str]) -> list[SearchResult]:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: if the file is something else.
        FileNotFoundError: if there is none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"accepted is format {FORMAT}")
        return [_result(search) for search in content["searches"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not the result of a search: {error}") from error


def _result(content: dict[str, Any]) -> SearchResult:
    for name in ("base", "random"):
        content[name] = None if content[name] is None else _evaluation(content[name])
    content["evaluations"] = tuple(map(_evaluation, content["evaluations"]))
    for name in ("configuration", "int8", "layers"):
        content[name] = tuple(content.get(name, ()))
    return SearchResult(**content)


def _score(evaluation: Evaluation) -> float:
    assert evaluation.score is not None
    return evaluation.score


def _evaluation(content: Mapping[str, Any]) -> Evaluation:
    lists = {name: tuple(content.get(name, ())) for name in ("configuration", "int8")}
    return Evaluation(**{**content, **lists})


def _price(value: float) -> str:
    return short(round(value)) if value >= 1000 else f"{value:.3g}"
