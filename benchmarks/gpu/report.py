"""The tables and the plot of a run on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measure import median
from .cases import OPERATIONS, SIZES
from .results import Entry

#: Maps by the size of their input, the largest first: name, least size.
MAPS = (("56 and larger", 56), ("9 to 55", 9), ("8 and smaller", 1))
#: What the CUDA kernels are meant to reach: least fraction of the copy's speed for groups of up to
#: 16, of 32 and of 64, on these maps.
#:
#: On small maps a copy takes about as long as its launch (512@7: 3 µs at 4.3 TB/s, and 2), rows at
#: the edges of a share are read twice (1.38 times the bytes read at 7×7) and every launch
#: assembles its weights (2000 clocks by the model): 5 of 6.7 µs are possible.
AIMS = {
    "forward": {16: (0.9, 0.8, 0.7), 32: (0.8, 0.65, 0.55), 64: (0.6, 0.48, 0.4)},
    "input gradient": {16: (0.9, 0.8, 0.7), 32: (0.8, 0.65, 0.55), 64: (0.6, 0.48, 0.4)},
    "weight gradient": {16: (0.75, 0.75, 0.6), 32: (0.6, 0.6, 0.5), 64: (0.4, 0.4, 0.35)},
}
RIVALS = ("Triton", "cuDNN", "expand + sum + cuDNN")


def maps_of(size: int) -> int:
    """Which of :data:`MAPS`."""
    return next(i for i, (_, least) in enumerate(MAPS) if size >= least)


def aim(size: int, group_size: int, operation: str) -> float:
    """What is to be reached on maps of a size."""
    return AIMS[operation][max(16, group_size)][maps_of(size)]


def markdown(facts: Mapping[str, Any], parts: Mapping[str, Sequence[Entry]]) -> str:
    """Everything there is so far: what failed first, then part by part."""
    lines = ["# On a GPU", "", *(f"- {name}: {value}" for name, value in facts.items())]
    for entry in parts.get("host", ()):
        if "microseconds" in entry:
            lines.append(f"- host time of a forward call: {entry['microseconds']:.1f} µs (aim: 5)")
    failed = [
        (part, entry) for part, entries in parts.items() for entry in entries if "error" in entry
    ]
    if failed:
        lines += ["", "## Failed", "", *row("part", "entry", "error"), *row(*["---"] * 3)]
        for part, entry in failed:
            lines += row(part, named(entry), entry["error"].replace("|", "/"))
    for part, tables in TABLES.items():
        measured = [entry for entry in parts.get(part, ()) if MEASURED[part] in entry]
        if measured:
            lines += tables(measured)
    return "\n".join(lines) + "\n"


#: What says which entry it is.
LABELS = ("shape", "what", "way", "group size", "operation", "configurations", "graphs")
LABELS += ("call", "by", "fault")


def named(entry: Entry) -> str:
    """What an entry is about."""
    return ", ".join(str(entry[label]) for label in LABELS if label in entry)


def kernels(entries: Sequence[Entry]) -> list[str]:
    """By operation, size of maps and group size, then every entry with the plan that ran."""
    lines = [
        "",
        "## Grouped convolution over a series",
        "",
        "bfloat16, channels-last, cold second-level cache, medians of interleaved calls. Times as "
        "fast: geometric mean / minimum over shapes. Of a copy: median fraction / minimum.",
        "",
        *row("operation", "maps", "group size", "shapes", "of a copy", "aim", *versus()),
        *row(*["---"] * 9),
    ]
    for operation in OPERATIONS:
        for i, (maps, least) in enumerate(MAPS):
            for size in SIZES:
                some = [
                    e["ratios"]
                    for e in entries
                    if (e["operation"], e["group size"], maps_of(e["size"])) == (operation, size, i)
                ]
                copies = [ratios["copy"] for ratios in some if "copy" in ratios]
                if copies:
                    means = [spread([r[rival] for r in some if rival in r]) for rival in RIVALS]
                    lines += row(
                        *(operation, maps, str(size), str(len(some))),
                        f"{median(copies):.2f} / {min(copies):.2f}",
                        f"{aim(least, size, operation):.2f}",
                        *means,
                    )
    heads = ("shape", "group size", "operation", "ms", "of a copy", *versus())
    heads += ("GB/s", "TFLOP/s", "apart, ms", "plan")
    lines += ["", *row(*heads), *row(*["---"] * len(heads))]
    for e in entries:
        ratios = {name: f"{ratio:.2f}" for name, ratio in e["ratios"].items()}
        apart = ("first pass", "second pass", "without warpgroups")
        lines += row(
            *(e["shape"], str(e["group size"]), e["operation"]),
            f"{e['milliseconds']['ours']:.3f}" + (" (wrong)" if "error" in e else ""),
            *(ratios.get(name, "–") for name in ("copy", "Triton")),
            f"{ratios.get('cuDNN', '–')} ({e['cuDNN format']})",
            ratios.get("expand + sum + cuDNN", "–"),
            f"{e['gbps']:.0f}",
            f"{e['gflops'] / 1e3:.1f}",
            ", ".join(
                f"{name} {e['milliseconds'][name]:.3f}" for name in apart if name in e["ratios"]
            )
            or "–",
            plan(e.get("plan")) or e["backend"],
        )
    return lines


def plan(facts: Mapping[str, Any] | None) -> str:
    """A plan of the CUDA library in a line."""
    if not facts:
        return ""
    parts = (f"{name} {facts[name]}" for name in ("atoms", "tiles", "teams", "stages", "columns"))
    grid = "×".join(map(str, facts["grid"]))
    shared = f"{facts['shared_bytes'] / 1024:.0f} KiB"
    return (
        f"{facts['kernel']}: {', '.join(parts)}, grid {grid}, {facts['threads']} threads, {shared}"
    )


def sweep(entries: Sequence[Entry]) -> list[str]:
    """Of each case: the model's choice, the fastest plan, and how far the model is off."""
    heads = ("shape", "group size", "operation", "plans", "chosen, µs", "model, µs")
    heads += ("fastest, µs", "model, µs", "ratio model : measured", "fastest plan")
    lines = [
        "",
        "## All plans",
        "",
        "Ratio: the model's microseconds over the measured, least to largest. Every plan is in "
        "gpu.json.",
        "",
        *row(*heads),
        *row(*["---"] * len(heads)),
    ]
    for e in entries:
        timed = [p for p in e["plans"] if "measured" in p]
        if not timed:
            continue
        best = min(timed, key=lambda p: p["measured"])
        chosen = [p for p in timed if p["chosen"]]
        ratios = [p["microseconds"] / p["measured"] for p in timed]
        lines += row(
            *(e["shape"], str(e["group size"]), e["operation"]),
            f"{len(timed)} of {len(e['plans'])}",
            *([f"{chosen[0][k]:.1f}" for k in ("measured", "microseconds")] if chosen else "––"),
            *(f"{best[k]:.1f}" for k in ("measured", "microseconds")),
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            plan(best),
        )
    return lines


def networks(entries: Sequence[Entry]) -> list[str]:
    """Whole layers and networks, each way that they can run."""
    heads = ("what", "batch", "way", "group size", "ms", "ms as a graph", "times as fast as dense")
    lines = ["", "## Layers and networks", "", *row(*heads), *row(*["---"] * len(heads))]
    for e in entries:
        dense = [
            d["milliseconds"]
            for d in entries
            if (d["what"], d["batch"], d["way"]) == (e["what"], e["batch"], "dense")
        ]
        graph = e.get("graph milliseconds")
        lines += row(
            *(e["what"], str(e["batch"]), e["way"], str(e["group size"] or "–")),
            f"{e['milliseconds']:.3f}",
            "–" if graph is None else f"{graph:.3f}",
            f"{dense[0] / e['milliseconds']:.2f}" if dense else "–",
        )
    return lines


def search(entries: Sequence[Entry]) -> list[str]:
    """All configurations of the paper's small network."""
    heads = ("configurations", "images", "graphs", "seconds (paper: 9, aim: 0.5)")
    lines = ["", "## Evaluation of configurations", "", *row(*heads), *row(*["---"] * len(heads))]
    for e in entries:
        graphs = "yes" if e["graphs"] else "no"
        lines += row(str(e["configurations"]), str(e["images"]), graphs, f"{e['seconds']:.3f}")
    return lines


def profile(entries: Sequence[Entry]) -> list[str]:
    """What Nsight Compute counted, kernel by kernel."""
    names = list(dict.fromkeys(name for e in entries for k in e["kernels"] for name in k))
    lines = ["", "## Counters", "", *row(*names), *row(*["---"] * len(names))]
    for e in entries:
        for k in e["kernels"]:
            lines += row(*(k.get(name, "–") for name in names))
    return lines


TABLES: dict[str, Callable[[Sequence[Entry]], list[str]]] = {
    "kernels": kernels,
    "sweep": sweep,
    "networks": networks,
    "search": search,
    "profile": profile,
}
#: What an entry of a part has if it was measured.
MEASURED = {
    "kernels": "ratios",
    "sweep": "plans",
    "networks": "milliseconds",
    "search": "seconds",
    "profile": "kernels",
}


def versus() -> list[str]:
    return [f"vs {rival}" for rival in RIVALS]


def row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(values):.2f} / {min(values):.2f}" if values else "–"


def plot(entries: Sequence[dict[str, Any]], path: Path) -> bool:
    """Fraction of a copy's speed by shape and group size; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    entries = [entry for entry in entries if "copy" in entry.get("ratios", ())]
    figure = Figure(figsize=(16, 10), layout="tight")
    labels = list(dict.fromkeys(e["shape"] for e in entries))
    for axis, operation in zip(figure.subplots(len(OPERATIONS), 1), OPERATIONS, strict=True):
        for i, size in enumerate(SIZES):
            some = {
                e["shape"]: e["ratios"]
                for e in entries
                if (e["operation"], e["group size"]) == (operation, size)
            }
            places = [labels.index(label) + 0.16 * i for label in some]
            axis.bar(
                places,
                [ratios["copy"] for ratios in some.values()],
                0.15,
                label=f"groups of {size}",
            )
            cudnn = [
                ratios["copy"] / ratios["cuDNN"] if "cuDNN" in ratios else float("nan")
                for ratios in some.values()
            ]
            axis.plot(places, cudnn, "k_", label="cuDNN" if i == 0 else None)
        axis.axhline(aim(56, 16, operation), color="k", linestyle="--", linewidth=0.5)
        axis.set_title(f"{operation}: fraction of a copy's speed")
        axis.set_xticks([x + 0.32 for x in range(len(labels))], labels)
    axis.legend(ncols=6)
    figure.savefig(path, dpi=80)
    return True
