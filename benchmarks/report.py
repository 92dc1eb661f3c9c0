"""Tables and plots of what the benchmarks measured: ``python -m benchmarks.report FILE.json``.

The file is what ``pytest benchmarks/ --benchmark-only --benchmark-json FILE.json`` writes; everything shown is in its
entries' ``extra_info``.
"""

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

Entry = dict[str, Any]
#: Width of a plot and height of its panels, in inches.
WIDTH, HEIGHT = 18.0, 3.0


def summary(entries: Sequence[Entry]) -> str:
    """Markdown: the machine, and one table of ratios for each suite, precision and batch. Above 1 ours is faster."""
    suites = {"grouped convolution": _core_table, "GroSSConv2d": _layer_table, "networks": _network_table}
    parts = [_machine(entries[0])]
    for suite, table in suites.items():
        found = [entry for entry in entries if entry["suite"] == suite]
        key = (
            _of("dtype", "memory_format") if suite == "grouped convolution" else _of("dtype", "memory_format", "batch")
        )
        for group in _groups(found, key):
            parts.append(table(group))
    return "\n\n".join(parts)


def details(entries: Sequence[Entry]) -> str:
    """Markdown: every entry, with the quartiles of its ratios."""
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
            f"{entry['gbps']:.1f}",
            "; ".join(
                f"{name} ({entry['fastest'][name]}) {_with_quartiles(ratio)}" for name, ratio in entry["ratios"].items()
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
        "GB/s",
        "times as fast as",
    ]
    return _markdown("Every entry: medians, ratios with quartiles", header, rows)


def plots(entries: Sequence[Entry]) -> dict[str, Figure]:
    """One figure for each suite, operation and precision, by file name: a panel for each shape or network, in it the
    time of ours and of every baseline as bars, and the MACs as dots, for each group size or configuration."""
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
        figure.suptitle(f"{run}; {_machine(first)}; dots: MACs, dashed: those of dense")
        figures[f"{run.replace(', ', '-').replace(' ', '_')}.png"] = figure
    return figures


def geometric_mean_and_minimum(values: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(values):.2f} / {min(values):.2f}" if values else ""


def efficiency(entry: Entry) -> float:
    """η: how many times as fast as dense, over how many times fewer MACs."""
    return entry["ratios"]["dense"]["median"] * entry["macs"] / entry["dense_macs"]


def _core_table(entries: Sequence[Entry]) -> str:
    columns = [("library", op) for op in ("forward", "input gradient", "weight gradient")]
    columns += [("materialised", op) for op in ("forward", "weight gradient")]
    rows = []
    for group in _groups(entries, _of("setting")):
        cells = [
            geometric_mean_and_minimum(
                [e["ratios"][name]["median"] for e in group if e["operation"] == op and name in e["ratios"]]
            )
            for name, op in columns
        ]
        rows.append([str(group[0]["setting"]), str(len({e["subject"] for e in group})), *cells])
    title = f"Grouped convolution, {_precision(entries)}: times as fast, geometric mean / minimum over shapes"
    return _markdown(title, ["group size", "shapes", *(f"{op} vs {name}" for name, op in columns)], rows)


def _layer_table(entries: Sequence[Entry]) -> str:
    rows = []
    for group in _groups(entries, _of("operation", "setting")):
        dense, fold = ([e["ratios"][name]["median"] for e in group] for name in ("dense", "fold"))
        rows.append(
            [
                group[0]["operation"],
                str(group[0]["setting"]),
                str(len(group)),
                f"{statistics.geometric_mean([e['dense_macs'] / e['macs'] for e in group]):.2f}",
                geometric_mean_and_minimum(dense),
                geometric_mean_and_minimum([efficiency(e) for e in group]),
                geometric_mean_and_minimum(fold),
            ]
        )
    run = f"{_precision(entries)}, batch {entries[0]['batch']}"
    title = f"GroSSConv2d, {run}: times as fast, geometric mean / minimum over layers"
    return _markdown(title, ["operation", "group size", "layers", "MAC ratio", "vs dense", "η", "vs fold"], rows)


def _network_table(entries: Sequence[Entry]) -> str:
    rows = [
        [
            e["subject"],
            e["setting"],
            e["operation"],
            f"{e['milliseconds']['ours']:.1f}",
            f"{e['dense_macs'] / e['macs']:.2f}",
            _with_quartiles(e["ratios"]["dense"]),
            f"{efficiency(e):.2f}",
            f"{e['ratios']['fold']['median']:.2f}",
        ]
        for e in entries
    ]
    title = f"Networks, {_precision(entries)}, batch {entries[0]['batch']}: times as fast"
    header = ["network", "configuration", "operation", "ms", "MAC ratio", "vs dense", "η", "vs fold"]
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
    """Entries of equal key together, groups in the order of their keys, entries of a group in their own order."""
    return [list(group) for _, group in groupby(sorted(entries, key=key), key)]


def _machine(entry: Entry) -> str:
    return f"{entry['device']}; {entry['threads']} threads; torch {entry['torch']}"


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
    file: Annotated[Path, typer.Argument(help="what pytest --benchmark-json wrote", exists=True, dir_okay=False)],
    output: Annotated[Path | None, typer.Option(help="folder for the report; by default named as FILE")] = None,
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
