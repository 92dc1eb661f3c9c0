"""Evidence: the paper's tables and figures from searches and a study, as Markdown, PNG and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..extras import from_extra
from ..report import short
from ..supernet import Configuration
from ..training.run import replace
from .evaluations import Evaluation
from .individual import STRATEGIES, Study
from .ranking import REMOVED
from .result import SearchResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Row:
    """One row of the paper's Tables 2 to 4.

    Attributes:
        kind: "baseline", "found" or "random".
        shown: the configuration as text; "4i" is group size 4 in 8 bits.
        milliseconds: predicted, where a latency table was given.
        gross, true: accuracy in the supernet and after individual fine-tuning, in percent.
        gained: of the true accuracies, else of the supernet's, over the baseline.
        macs_cut, grouped_cut: by how many percent fewer MACs than the baseline, in all and in the
            grouped convolutions alone.
    """

    kind: str
    configuration: Configuration
    shown: str
    macs: float
    milliseconds: float | None
    gross: float | None
    true: float | None
    gained: float | None = None
    macs_cut: float | None = None
    grouped_cut: float | None = None


def rows(
    searches: Sequence[SearchResult], true: Mapping[Configuration, float] | None = None
) -> list[Row]:
    """The rows of Table 2: each search's baseline, what was found, and what random search found.

    Args:
        searches: results whose budgets are base configurations have baselines.
        true: accuracies after individual fine-tuning, where they are known.
    """
    true = true or {}
    table = []
    if any("macs" not in result.fixed for result in searches):
        raise ValueError("searches: got one without MACs, accepted are those given an input_size")
    for result in searches:
        base = result.base
        if base is not None:
            table.append(_row("baseline", base, true, result))
        table.append(_row("found", result.found, true, result))
        if result.random is not None:
            table.append(_row("random", result.random, true, result))
    return table


def _row(
    kind: str,
    evaluation: Evaluation,
    true: Mapping[Configuration, float],
    result: SearchResult,
) -> Row:
    c, price, own = evaluation.configuration, evaluation.costs["macs"], evaluation.score
    text, time = result.shown(evaluation), evaluation.costs.get("milliseconds")
    # Individual fine-tuning was in float32.
    known = {} if evaluation.int8 else true
    row = Row(kind, c, text, price, time, own, known.get(c))
    base, fixed = result.base, result.fixed["macs"]
    if base is None or kind == "baseline":
        return row
    before, after = base.score, own
    if c in known and base.configuration in true:
        before, after = true[base.configuration], known[c]
    price_before = base.costs["macs"]
    return replace_fields(
        row,
        gained=None if before is None or after is None else after - before,
        macs_cut=100 * (1 - price / price_before),
        grouped_cut=100 * (1 - (price - fixed) / (price_before - fixed)),
    )


def write(
    folder: str | os.PathLike[str],
    searches: Sequence[SearchResult] = (),
    study: Study | None = None,
    *,
    true: Mapping[Configuration, float] | None = None,
) -> list[Path]:
    """Write ``report.md``, ``report.json`` and the figures into a folder, which is made.

    ``search.png`` is Figure 3 or 4: accuracy against MACs of every evaluation, the front,
    circles for the baselines and stars for what was found. ``study.png`` is Figure 5.

    Args:
        folder: where to write; files of these names are replaced.
        searches, study: what there is to show.
        true: accuracies after individual fine-tuning, beside those of the study.

    Returns:
        The files.

    Raises:
        ValueError: if there is nothing to report.
    """
    if not searches and study is None:
        raise ValueError("searches: got none, accepted is at least one, or a study")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    text = ["# Search report\n"]
    content: dict[str, Any] = {}
    if searches:
        table = rows(searches, {**(study.true if study else {}), **(true or {})})
        content["searches"] = [asdict(row) for row in table]
        _draw(target / "search.png", 1, lambda axes: draw_searches(axes[0], searches))
        text += [search_table(table), *map(_line, searches), "\n![searches](search.png)\n"]
    if study is not None:
        agreements = {name: study.agreement(name) for name in STRATEGIES}
        content["agreement"] = {
            name: {**asdict(found), "mean": found.mean} for name, found in agreements.items()
        }
        content["points"] = [asdict(point) for point in study.points]
        _draw(target / "study.png", len(STRATEGIES), lambda axes: draw_study(axes, study))
        text += [_study_table(study), "\n![study](study.png)\n"]
    replace(target / "report.md", "\n".join(text))
    replace(target / "report.json", json.dumps(content, indent=1))
    return sorted(path for path in target.iterdir() if path.suffix in (".md", ".json", ".png"))


def search_table(table: Sequence[Row]) -> str:
    """The rows as a Markdown table, with milliseconds if any row has them."""
    timed = any(row.milliseconds is not None for row in table)
    headings = ["", "configuration", "MACs", *["ms"] * timed, "GroSS", "true"]
    headings += ["Δ acc.", "Δ MACs", "Δ G.conv"]
    lines = [_cells(headings), _cells(["---", "---", *["---:"] * (len(headings) - 2)])]
    for row in table:
        numbers = (row.gross, row.true, row.gained)
        cuts = (row.macs_cut, row.grouped_cut)
        lines.append(
            _cells(
                [
                    row.kind,
                    row.shown,
                    short(round(row.macs)),
                    *["" if row.milliseconds is None else f"{row.milliseconds:.3g}"] * timed,
                    *("" if n is None else f"{n:.2f}" for n in numbers[:2]),
                    "" if row.gained is None else _signed(row.gained),
                    *("" if cut is None else f"{_signed(-cut)} %" for cut in cuts),
                ]
            )
        )
    return "\n".join(lines)


def _study_table(study: Study) -> str:
    drawn = sum(point.drawn for point in study.points)
    lines = [
        f"\n{drawn} random configurations, individually fine-tuned for {study.schedule[0]} and "
        f"{study.schedule[1]} epochs.\n",
        _cells(["ranked by", "all", *(f"{n} ↓" for n in REMOVED[1:]), "mean", "τ", "ρ"]),
        _cells(["---", *["---:"] * (len(REMOVED) + 3)]),
    ]
    for name, title in STRATEGIES.items():
        found = study.agreement(name)
        precisions = [found.precision.get(removed) for removed in REMOVED]
        lines.append(
            _cells(
                [
                    title,
                    *("" if p is None else f"{100 * p:.1f}" for p in precisions),
                    f"{100 * found.mean:.1f}",
                    f"{found.kendall:.2f}",
                    f"{found.spearman:.2f}",
                ]
            )
        )
    return "\n".join(lines)


def _line(result: SearchResult) -> str:
    return (
        f"\n{result.method}, seed {result.seed}: {len(result.evaluations)} evaluations, "
        f"{result.seconds:.1f} s"
    )


def _signed(value: float) -> str:
    """A change: 0.3 → "+0.30", -0.3 → "−0.30", with the minus sign and nothing before a zero."""
    rounded = f"{value:+.2f}"
    return "0.00" if float(rounded) == 0 else rounded.replace("-", "−")


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw_searches(axes: Axes, searches: Sequence[SearchResult]) -> None:
    """Figures 3 and 4: scores in the supernet, in the paper accuracies, against MACs, or against
    milliseconds where every search is limited in them. A configuration has the colour of the first
    search that evaluated it."""
    cost = "milliseconds" if all("milliseconds" in r.limits for r in searches) else "macs"
    drawn: set[tuple[Configuration, tuple[str, ...]]] = set()
    for i, result in enumerate(searches):
        colour = f"C{i}"
        scored = [e for e in result.evaluations if e.score is not None]
        new = [e for e in scored if (e.configuration, e.int8) not in drawn]
        drawn.update((e.configuration, e.int8) for e in new)
        axes.scatter(*_coordinates(new, cost), s=8, alpha=0.4, color=colour)
        front = _coordinates(result.front(cost), cost)
        axes.step(*front, where="post", color=colour, linewidth=0.8)
        limit = ""
        if cost in result.limits:
            most, unit = result.limits[cost], _UNITS[cost]
            limit = f" within {most / unit.size:.3g}{unit.symbol}"
        for e, marker, name in ((result.base, "o", "baseline"), (result.found, "*", "found")):
            if e is not None and e.score is not None:
                axes.scatter(
                    *_coordinates([e], cost),
                    s=120,
                    marker=marker,
                    color=colour,
                    edgecolors="black",
                    zorder=3,
                    label=f"{name}{limit}: {result.shown(e)}",
                )
    axes.set_xlabel(_UNITS[cost].label)
    axes.set_ylabel("score in the supernet")
    axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


class _Unit(NamedTuple):
    """What an axis counts in."""

    size: float
    symbol: str
    label: str


_UNITS = {
    "macs": _Unit(1e6, "M", "MACs (millions)"),
    "milliseconds": _Unit(1.0, " ms", "milliseconds (predicted)"),
}


def _coordinates(evaluations: Iterable[Evaluation], cost: str) -> tuple[list[float], list[float]]:
    """Costs in their units, and scores."""
    size = _UNITS[cost].size
    scored = [(e.costs[cost] / size, e.score) for e in evaluations if e.score is not None]
    return [x for x, _ in scored], [y for _, y in scored]


def draw_study(axes: Sequence[Axes], study: Study) -> None:
    """Figure 5: accuracy in three search spaces against true accuracy."""
    drawn = [point for point in study.points if point.drawn]
    true = [point.true for point in drawn]
    for part, (name, title) in zip(axes, STRATEGIES.items(), strict=True):
        found = [getattr(point, name) for point in drawn]
        part.scatter(true, found, s=14)
        ends = [min(*true, *found), max(*true, *found)]
        part.plot(ends, ends, color="grey", linewidth=0.8, linestyle="--")
        part.set_title(f"{title}, τ = {study.agreement(name).kendall:.2f}", fontsize="small")
        part.set_xlabel("true accuracy (%)")
        part.set_ylabel("accuracy in the search space (%)")


def _draw(path: Path, parts: int, draw: Any) -> None:
    """One figure, written in place of the file at once."""
    with from_extra("search"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(6 if parts == 1 else 4 * parts, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    draw([figure.add_subplot(1, parts, i + 1) for i in range(parts)])
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.png")
    try:
        figure.savefig(part, dpi=150)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
