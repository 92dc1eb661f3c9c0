"""Tables and plots of what the benchmarks measured: ``python -m benchmarks.report FILE.json``.

The file is what ``pytest benchmarks/ --benchmark-only --benchmark-json FILE.json`` writes;
everything shown is in its entries' ``extra_info``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from gross.report import short
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from . import goals

Entry = dict[str, Any]
#: The machine's best rate by precision, as :func:`measure.best_product` has it.
Best = dict[str, dict[str, Any]]
#: Width of a plot and height of its panels, in inches.
WIDTH, HEIGHT = 18.0, 3.0
#: Heading of a column: mean GFLOP/s of ours over the machine's best; of operations one after
#: another.
SHARE = "of the best product"


def summary(entries: Sequence[Entry]) -> str:
    """Markdown: the machine, and one table of ratios for each suite, precision and batch. Above 1
    ours is faster.

    Where :mod:`benchmarks.goals` has a goal, it follows the figure in brackets, with "reached" or
    "missed"."""
    suites = {
        "grouped convolution": (_core_table, _of("dtype", "memory_format")),
        "GroSSConv2d": (_layer_table, _of("narrow", "dtype", "memory_format", "batch")),
        "int8 layer": (_int8_layer_table, _of("narrow", "batch")),
        "int8 convolution": (_int8_convolution_table, _of("suite")),
        "structured": (_structured_table, _of("dtype", "memory_format", "operation")),
        "networks": (_network_table, _of("dtype", "memory_format", "batch")),
    }
    best = best_products(entries)
    parts = [_machine(entries[0], best)]
    for suite, (table, key) in suites.items():
        found = [entry for entry in entries if entry["suite"] == suite]
        parts += [table(group, best) for group in _groups(found, key)]
    return "\n\n".join(parts)


def deployment(entries: Sequence[Entry]) -> str:
    """Markdown: exported networks against the fastest runtime on the dense and on the folded
    network, and what a program costs beside its arithmetic."""
    parts = []
    for precision in ("float32", "int8"):
        rows = []
        for entry in entries:
            if entry.get("precision") != precision:
                continue
            ours = next(iter(entry["milliseconds"]))
            cells = [f"{entry['subject']}, {entry['batch']}", f"{entry['mac_ratio']:.2f}"]
            cells.append(f"{entry['milliseconds'][ours]:.3g}")
            for kind in ("dense", "folded"):
                found = entry["ratios"].items()
                others = {one: r for one, r in found if one.startswith(kind) and "ours" not in one}
                best = min(others, key=lambda one: others[one])
                wanted = goals.deployment(entry["subject"], kind, entry["mac_ratio"], precision)
                cells.append(f"{others[best]:.2f} ({best}; {wanted.mark([others[best]])})")
            own = {one: r for one, r in entry["ratios"].items() if "ours" in one and one != ours}
            cells.append("; ".join(f"{ratio:.2f} {one}" for one, ratio in own.items()))
            rows.append(cells)
        header = ["network, batch", "fewer MACs", "ms", "to dense", "to folded", "to ours"]
        title = f"Exported networks, {precision}: times as fast as the fastest runtime"
        parts += [_markdown(title, header, rows)] if rows else []
    parts += [
        f"A program's call takes {entry['call']:.1f} µs, each step {entry['step']:.1f} µs beside "
        "its arithmetic."
        for entry in entries
        if "call" in entry
    ]
    missing = sorted({title for entry in entries for title in entry.get("missing", ())})
    if missing:
        parts.append(f"Not installed, and so not compared: {', '.join(missing)}.")
    return "\n\n".join(parts)


def details(entries: Sequence[Entry]) -> str:
    """Markdown: every entry, with the quartiles of its ratios."""
    best = best_products(entries)
    rows = [
        [
            entry["subject"],
            str(entry["setting"]),
            entry["operation"],
            str(entry["batch"]),
            f"{entry['dtype']} {entry['memory_format']}",
            short(entry["macs"]),
            f"{entry['milliseconds']['ours']:.3g}",
            f"{entry['gflops']:.0f}",
            _share([entry], best),
            f"{entry['gbps']:.1f}",
            "; ".join(
                f"{name} ({entry['fastest'][name]}) {_with_quartiles(ratio)}"
                for name, ratio in entry["ratios"].items()
            ),
        ]
        for entry in entries
    ]
    header = [
        "what",
        "group size",
        "operation",
        "batch",
        "precision",
        "MACs",
        "ms",
        "GFLOP/s",
        SHARE,
        "GB/s",
        "times as fast as",
    ]
    return _markdown("Every entry: medians, ratios with quartiles", header, rows)


def plots(entries: Sequence[Entry]) -> dict[str, Figure]:
    """One figure for each suite, operation and precision, by file name: a panel for each shape or
    network, in it the time of ours and of every baseline as bars, and the MACs as dots, for each
    group size or configuration."""
    best = best_products(entries)
    figures = {}
    for group in _groups(entries, _of("suite", "operation", "dtype", "memory_format")):
        first = group[0]
        panels = _groups(group, _of("subject", "batch"))
        columns = 2 if first["suite"] == "networks" else 4
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(WIDTH, rows * HEIGHT), layout="tight")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, points in zip(axes, panels, strict=False):
            _draw(axis, points)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="upper left", ncols=3)
        run = f"{first['suite']}, {first['operation']}, {_precision(group)}"
        figure.suptitle(f"{run}; {_machine(first, best)}; dots: MACs, dashed: those of dense")
        figures[f"{run.replace(', ', '-').replace(' ', '_')}.png"] = figure
    return figures


def efficiency(entry: Entry) -> float:
    """η: how many times as fast as dense, over how many times fewer MACs."""
    return _ratio(entry, "dense") * entry["macs"] / entry["dense_macs"]


def efficiency_unpacked(entry: Entry) -> float:
    """η of the layer that sums its weights at every call."""
    return efficiency(entry) / _ratio(entry, "unpacked")


def best_products(entries: Sequence[Entry]) -> Best:
    """The machine's best rate in each precision. Every entry brings what it saw; ``median`` is far
    below ``gflops`` where other work disturbed the run."""
    products = {}
    for group in _groups(entries, _of("dtype")):
        seen = sorted(
            (entry["best_product"] for entry in group), key=lambda product: product["gflops"]
        )
        products[group[0]["dtype"]] = seen[-1] | {
            "median": statistics.median(each["gflops"] for each in seen)
        }
    return products


def _ratio(entry: Entry, baseline: str) -> float:
    return entry["ratios"][baseline]["median"]


def _figure(
    entries: Sequence[Entry], name: str, value: Callable[[Entry], float] | None = None
) -> str:
    """Geometric mean and minimum of ``value``, by default the ratio to the baseline ``name``, and
    the goal of ``name``; nothing for no entries."""
    if not entries:
        return ""
    values = [value(entry) if value else _ratio(entry, name) for entry in entries]
    goal = goals.goal(name, entries[0])
    return f"{statistics.geometric_mean(values):.2f} / {min(values):.2f}" + (
        f" ({goal.mark(values)})" if goal else ""
    )


def _share(entries: Sequence[Entry], best: Best) -> str:
    """Geometric mean of the entries' GFLOP/s over the machine's best."""
    shares = (entry["gflops"] / best[entry["dtype"]]["gflops"] for entry in entries)
    return f"{statistics.geometric_mean(shares):.2f}"


def _core_table(entries: Sequence[Entry], best: Best) -> str:
    columns = [("library", op) for op in goals.OPERATIONS]
    columns += [("materialised", op) for op in ("forward", "weight gradient")]
    rows = []
    for group in _groups(entries, _of("setting")):
        by_operation = {op: [e for e in group if e["operation"] == op] for op in goals.OPERATIONS}
        cells = [
            _figure([e for e in by_operation[op] if name in e["ratios"]], name)
            for name, op in columns
        ]
        shares = ", ".join(_share(found, best) if found else "–" for found in by_operation.values())
        rows.append(
            [str(group[0]["setting"]), str(len({e["subject"] for e in group})), *cells, shares]
        )
    title = (
        f"Grouped convolution, {_precision(entries)}: times as fast, "
        "geometric mean / minimum over shapes"
    )
    header = ["group size", "shapes", *(f"{op} vs {name}" for name, op in columns), SHARE]
    return _markdown(title, header, rows)


def _layer_table(entries: Sequence[Entry], best: Best) -> str:
    rows = []
    for group in _groups(entries, _of("operation", "setting")):
        unpacked = [e for e in group if "unpacked" in e["ratios"]]
        rows.append(
            [
                group[0]["operation"],
                str(group[0]["setting"]),
                str(len(group)),
                f"{statistics.geometric_mean([e['dense_macs'] / e['macs'] for e in group]):.2f}",
                _figure(group, "dense"),
                _figure(group, "η", efficiency),
                _figure(unpacked, "η unpacked", efficiency_unpacked),
                _figure(group, "fold"),
                _share(group, best),
            ]
        )
    what = "GroSSConv2d with a narrow bottleneck" if entries[0]["narrow"] else "GroSSConv2d"
    run = f"{_precision(entries)}, batch {entries[0]['batch']}"
    title = f"{what}, {run}: times as fast, geometric mean / minimum over layers"
    header = [
        "operation",
        "group size",
        "layers",
        "MAC ratio",
        "vs dense",
        "η",
        "η unpacked",
        "vs fold",
        SHARE,
    ]
    return _markdown(title, header, rows)


def _int8_layer_table(entries: Sequence[Entry], best: Best) -> str:
    columns = ("dense", "fold", "float32")
    rows = [
        [
            str(group[0]["setting"]),
            str(len(group)),
            f"{statistics.geometric_mean([e['dense_macs'] / e['macs'] for e in group]):.2f}",
            *(_figure(group, name) for name in columns),
            _share(group, best),
        ]
        for group in _groups(entries, _of("setting"))
    ]
    what = "Layers with a narrow bottleneck" if entries[0]["narrow"] else "Layers"
    title = (
        f"{what} in 8 bits, batch {entries[0]['batch']}: times as fast, "
        "geometric mean / minimum over layers"
    )
    header = ["group size", "layers", "MAC ratio", "vs dense", "vs fold", "vs our float32", SHARE]
    return _markdown(title, header, rows)


def _int8_convolution_table(entries: Sequence[Entry], best: Best) -> str:
    rows = [
        [
            str(group[0]["batch"]),
            str(len(group)),
            *(_figure(group, name) for name in ("library", "float32")),
            _share(group, best),
        ]
        for group in _groups(entries, _of("batch"))
    ]
    title = (
        "Dense convolutions in 8 bits: times as fast, geometric mean / minimum over convolutions"
    )
    header = ["batch", "convolutions", "vs library", "vs our float32", SHARE]
    return _markdown(title, header, rows)


def _network_table(entries: Sequence[Entry], best: Best) -> str:
    rows = []
    for e in entries:
        goal = goals.goal("dense", e)
        rows.append(
            [
                e["subject"],
                e["setting"],
                e["operation"],
                f"{e['milliseconds']['ours']:.1f}",
                f"{e['dense_macs'] / e['macs']:.2f}",
                _with_quartiles(e["ratios"]["dense"])
                + (f" ({goal.mark([_ratio(e, 'dense')])})" if goal else ""),
                f"{efficiency(e):.2f}",
                f"{_ratio(e, 'fold'):.2f}",
                _share([e], best),
            ]
        )
    title = f"Networks, {_precision(entries)}, batch {entries[0]['batch']}: times as fast"
    header = [
        "network",
        "configuration",
        "operation",
        "ms",
        "MAC ratio",
        "vs dense",
        "η",
        "vs fold",
        SHARE,
    ]
    return _markdown(title, header, rows)


def _structured_table(entries: Sequence[Entry], best: Best) -> str:
    """What is counted beside what is measured; packed is ours packed beside dense packed, and the
    pooling's share is what the layer takes beyond the small convolution alone."""
    rows = []
    for e in entries:
        ratios = e["ratios"]
        packed = pooling = ""
        if "ours packed" in ratios:
            packed = f"{_ratio(e, 'dense packed') / _ratio(e, 'ours packed'):.2f}"
        if "convolution" in ratios:
            pooling = f"{1 - _ratio(e, 'convolution'):.0%}"
        rows.append(
            [
                e["subject"],
                str(e["setting"]),
                str(e["batch"]),
                f"{e['milliseconds']['ours']:.3g}",
                f"{e['dense_macs'] / e['macs']:.2f}",
                f"{e['dense_additions'] / e['additions']:.2f}",
                _with_quartiles(ratios["dense"]),
                packed,
                pooling,
            ]
        )
    title = f"Structured, {entries[0]['operation']}, {_precision(entries)}: times as fast as dense"
    header = [
        "what",
        "c n",
        "batch",
        "ms",
        "fewer multiplications",
        "fewer additions",
        "vs dense",
        "both packed",
        "pooling",
    ]
    return _markdown(title, header, rows)


def _draw(axis: Any, entries: Sequence[Entry]) -> None:
    names = list(dict.fromkeys(name for entry in entries for name in entry["milliseconds"]))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(entries))]
        axis.bar(places, [e["milliseconds"].get(name, 0.0) for e in entries], width, label=name)
    axis.set_title(f"{entries[0]['subject']}, batch {entries[0]['batch']}", fontsize="small")
    axis.set_xticks(range(len(entries)), [_tick(e["setting"]) for e in entries], fontsize="x-small")
    axis.set_ylabel("ms")
    macs = axis.twinx()
    macs.plot(range(len(entries)), [e["macs"] / 1e9 for e in entries], "k.")
    if "dense_macs" in entries[0]:
        macs.axhline(entries[0]["dense_macs"] / 1e9, color="k", linestyle="--", linewidth=0.5)
    macs.set_ylim(bottom=0)
    macs.set_ylabel("10⁹ MACs")


def _tick(setting: int | str) -> str:
    """A group size; of a configuration "4s" where it is uniform, else four sizes a line."""
    sizes = str(setting).split()
    if len(sizes) > 1 and len(set(sizes)) == 1:
        return f"{sizes[0]}s"
    return "\n".join(" ".join(sizes[i : i + 4]) for i in range(0, len(sizes), 4))


def _of(*keys: str) -> Callable[[Entry], tuple]:
    return lambda entry: tuple(entry[key] for key in keys)


def _groups(entries: Iterable[Entry], key: Callable[[Entry], tuple]) -> list[list[Entry]]:
    """Entries of equal key together, groups in the order of their keys, entries of a group in their
    own order."""
    return [list(group) for _, group in groupby(sorted(entries, key=key), key)]


def _machine(entry: Entry, best: Best) -> str:
    memory = (
        "freed memory kept, no fresh pages"
        if entry["keeps_memory"]
        else "memory freed to the system"
    )
    products = ", ".join(
        f"{value['gflops']:.0f} GFLOP/s in {dtype} "
        f"({value['by']}; median of entries {value['median']:.0f})"
        for dtype, value in best.items()
    )
    return (
        f"{entry['device']}; {entry['threads']} threads; torch {entry['torch']}; {memory}; "
        f"best product {products}"
    )


def _with_quartiles(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"


def _precision(entries: Sequence[Entry]) -> str:
    return f"{entries[0]['dtype']} {entries[0]['memory_format']}"


def _markdown(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    table = Table(*header, box=box.MARKDOWN)
    for row in rows:
        table.add_row(*row)
    console = Console(width=1000, color_system=None, markup=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines() if line.strip()]
    return "\n".join([f"**{title}**", "", *lines])


def _read(file: Path) -> list[Entry]:
    try:
        content = json.loads(file.read_text())
        entries = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"file: {file} is not what --benchmark-json writes: {error!r}") from error
    entries = [entry for entry in entries if "ratios" in entry]
    if not entries:
        raise ValueError(f"file: {file} has no entries of these benchmarks")
    return entries


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def write(
    file: Annotated[
        Path, typer.Argument(help="what pytest --benchmark-json wrote", exists=True, dir_okay=False)
    ],
    output: Annotated[
        Path | None, typer.Option(help="folder for the report; by default named as FILE")
    ] = None,
) -> None:
    """Write summary.md and the plots as PNG files."""
    entries = _read(file)
    output = file.with_suffix("") if output is None else output
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "summary.md", f"{summary(entries)}\n\n{details(entries)}\n".encode())
    figures = plots(entries)
    for name, figure in figures.items():
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        _write(output / name, buffer.getvalue())
    typer.echo(f"{output}: summary.md and {len(figures)} plots")


if __name__ == "__main__":
    typer.run(write)
