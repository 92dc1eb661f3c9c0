"""The grouped convolution on a GPU, as dispatch serves it, beside the Triton kernels, cuDNN, expand
+ sum + cuDNN, and beside a copy of what must move: ``python -m benchmarks.gpu FOLDER`` writes
gpu.json, gpu.md and, where matplotlib is installed, a plot.

16-bit, channels-last, every call below autograd and from a cold second-level cache. Needs torch,
Triton and pytest-benchmark alone; the shapes are those of ``shapes.cores()`` at the widths that are
powers of two."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gross_kernels import explain, ops
from gross_kernels.backends import reference
from gross_kernels.dispatch import BACKENDS, serving
from gross_kernels.geometry import Geometry
from gross_kernels.series import Series, convolution_macs, restrict, sum_terms

from .measure import Call, check_close, machine, median, time_call


class Shape(NamedTuple):
    """A square 3×3 convolution with padding 1: images, channels, size of its input, stride."""

    batch: int
    channels: int
    size: int
    stride: int = 1

    @property
    def label(self) -> str:
        """As in ``shapes``: "64@56", "64@56/2"."""
        return f"{self.channels}@{self.size}" + (f"/{self.stride}" if self.stride > 1 else "")


#: The most telling first: a run that is short of time leaves out the last.
SHAPES = (
    *(Shape(128, 64, 56), Shape(128, 128, 28), Shape(128, 256, 14), Shape(128, 512, 7)),
    *(
        Shape(128, 64, 56, 2),
        Shape(256, 64, 32),
        Shape(256, 256, 8),
        Shape(128, 128, 56),
        Shape(128, 64, 112),
    ),
    *(
        Shape(128, 256, 28),
        Shape(128, 512, 14),
        Shape(256, 512, 4),
        Shape(128, 256, 14, 2),
        Shape(256, 64, 16),
    ),
    *(
        Shape(128, 128, 28, 2),
        Shape(256, 128, 16),
        Shape(256, 128, 8),
        Shape(256, 256, 4),
        Shape(128, 64, 224),
    ),
)
#: The paper's group sizes, and the largest that the CUDA kernels serve.
SIZES = (1, 4, 16, 32, 64)
#: As the backends' functions are called.
OPERATIONS = {
    "forward": "forward",
    "input gradient": "input_grad",
    "weight gradient": "weight_grad",
}
#: What the CUDA kernels are meant to reach: least fraction of the copy's speed for groups of up to
#: 16, of 32 and of 64, on maps of 56 and larger and on smaller ones.
AIMS = {
    "forward": {16: (0.88, 0.8), 32: (0.75, 0.65), 64: (0.58, 0.48)},
    "input gradient": {16: (0.88, 0.8), 32: (0.75, 0.65), 64: (0.58, 0.48)},
    "weight gradient": {16: (0.75, 0.75), 32: (0.6, 0.6), 64: (0.4, 0.4)},
}
LARGE = 56


def sizes(shape: Shape) -> tuple[int, ...]:
    """The group sizes that a shape can have."""
    return tuple(s for s in SIZES if s <= shape.channels)


def aim(size: int, group_size: int, operation: str) -> float:
    """What is to be reached on maps of a size."""
    return AIMS[operation][max(16, group_size)][size < LARGE]


def calls(
    shape: Shape, active: int, operation: str, dtype: torch.dtype, device: str
) -> dict[str, Call]:
    """Ours, its definition, and what it is compared with."""
    geometry = Geometry((shape.stride,) * 2, (1, 1))
    size = geometry.output_size((shape.size,) * 2, (3, 3))
    shapes = (
        (shape.batch, shape.channels, shape.size, shape.size),
        (shape.batch, shape.channels, *size),
    )
    input, grad = (
        torch.randn(each, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for each in shapes
    )
    terms = [torch.randn(shape.channels, s, 3, 3, device=device, dtype=dtype) for s in sizes(shape)]
    series = Series(terms, active)
    weight = sum_terms(series, shape.channels)
    needs = (operation == "input gradient", operation == "weight gradient", False)
    count = torch.tensor(active)

    def cudnn(weight: Tensor, input: Tensor = input, grad: Tensor = grad) -> Any:
        arguments = (
            input,
            weight,
            None,
            *geometry,
            False,
            (0, 0),
            shape.channels // weight.shape[1],
        )
        if operation == "forward":
            return torch.ops.aten.convolution(*arguments)
        return torch.ops.aten.convolution_backward(grad, *arguments, needs)

    def materialised() -> Any:
        result = cudnn(sum_terms(series, shape.channels))
        if operation == "weight gradient":
            return [restrict(result[1], term.shape[1], shape.channels) for term in terms[:active]]
        return result

    def ours() -> Any:
        if operation == "forward":
            return torch.ops.gross.series_conv2d(input, terms, count, None, *geometry)
        return torch.ops.gross.series_conv2d_backward(
            grad, input, terms, count, None, *geometry, needs
        )

    def definition() -> Any:
        arguments = (input, series, geometry)
        if operation == "forward":
            return reference.forward(*arguments)
        if operation == "input gradient":
            return reference.input_grad(grad, *arguments)
        return reference.weight_grad(grad, *arguments)[0]

    def triton() -> Any:
        arguments = (input, series, geometry)
        function = getattr(BACKENDS["triton"], OPERATIONS[operation])
        return function(*arguments) if operation == "forward" else function(grad, *arguments)

    chosen = serving(OPERATIONS[operation], input, series, geometry)
    # As many bytes read and written together as input and output have.
    half = torch.empty((input.nbytes + grad.nbytes) // 2, device=device, dtype=torch.uint8)
    target = torch.empty_like(half)
    contiguous = [tensor.contiguous() for tensor in (input, grad)]
    return {
        "ours": ours,
        "definition": definition,
        **({"Triton": triton} if chosen is BACKENDS["cuda"] and "triton" in BACKENDS else {}),
        "cuDNN channels-last": partial(cudnn, weight.contiguous(memory_format=torch.channels_last)),
        "cuDNN contiguous": partial(cudnn, weight, *contiguous),
        "expand + sum + cuDNN": materialised,
        "copy": partial(target.copy_, half),
    }


def measure(
    shape: Shape, active: int, operation: str, dtype: torch.dtype, device: str, rounds: int
) -> dict[str, Any]:
    """One entry: medians in milliseconds and, pairwise, how many times as fast ours is; checked
    against the definition first."""
    each = calls(shape, active, operation, dtype, device)
    definition = each.pop("definition")
    check_close(each["ours"](), definition())
    del definition
    if "Triton" in each:
        check_close(each["ours"](), each["Triton"]())
    for call in each.values():
        call()
    first = {name: time_call(call) for name, call in each.items()}
    # The slower of two layouts is not what a user would run.
    slower = max((name for name in first if name.startswith("cuDNN")), key=first.__getitem__)
    del each[slower]
    seconds: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(rounds):
        for name, call in each.items():
            seconds[name].append(time_call(call))
    names = {name: "cuDNN" if name.startswith("cuDNN") else name for name in each}
    ratios = {
        names[name]: median([b / a for a, b in zip(seconds["ours"], seconds[name], strict=True)])
        for name in each
    }
    geometry = Geometry((shape.stride,) * 2, (1, 1))
    size = geometry.output_size((shape.size,) * 2, (3, 3))
    return {
        "shape": shape.label,
        "batch": shape.batch,
        "size": shape.size,
        "group size": SIZES[active - 1],
        "operation": operation,
        "dtype": str(dtype).removeprefix("torch."),
        "macs": shape.batch * convolution_macs(shape.channels, SIZES[active - 1], (3, 3), size),
        "milliseconds": {names[name]: 1e3 * median(values) for name, values in seconds.items()},
        "cuDNN format": "contiguous" if slower.endswith("last") else "channels-last",
        "ratios": ratios,
    }


def host_microseconds(device: str, repeats: int = 2000) -> float:
    """Wall time of one forward call without gradients on a tiny tensor: what the host spends, as
    long as the GPU is faster."""
    input = torch.randn(1, 64, 4, 4, device=device, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    terms = [torch.randn(64, s, 3, 3, device=device, dtype=torch.bfloat16) for s in SIZES[:4]]
    arguments = (input, terms, torch.tensor(2), None, (1, 1), (1, 1), (1, 1))
    with torch.inference_mode():
        for _ in range(100):
            torch.ops.gross.series_conv2d(*arguments)
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            torch.ops.gross.series_conv2d(*arguments)
        elapsed = time.perf_counter() - begin
        synchronise(device)
    return 1e6 * elapsed / repeats


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run(
    shapes: Sequence[Shape],
    device: str,
    rounds: int,
    deadline: float,
    progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Entries, until the deadline (``time.monotonic``)."""
    for shape in shapes:
        for active in range(1, len(sizes(shape)) + 1):
            for operation in OPERATIONS:
                if time.monotonic() > deadline:
                    begin = f"{shape.label}, group size {SIZES[active - 1]}"
                    progress(f"out of time: everything from {begin} is left out")
                    return
                with torch.inference_mode():
                    yield measure(shape, active, operation, torch.bfloat16, device, rounds)
        progress(f"{shape.label} done")


def markdown(entries: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The comparison table: by operation, size of maps and group size, then every entry."""
    rivals = ("Triton", "cuDNN", "expand + sum + cuDNN")
    lines = [
        "# Grouped convolution over a series",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "- bfloat16, channels-last, cold second-level cache, medians of interleaved calls",
        "",
        "Times as fast: geometric mean / minimum over shapes. "
        "Of a copy: median fraction / minimum.",
        "",
        *row(
            "operation",
            "maps",
            "group size",
            "shapes",
            "of a copy",
            "aim",
            *(f"vs {rival}" for rival in rivals),
        ),
        *row(*["---"] * 9),
    ]
    for operation in OPERATIONS:
        for maps, large in ((f"{LARGE} and larger", True), ("smaller", False)):
            for size in SIZES:
                kind = (operation, size, large)
                some = [
                    e["ratios"]
                    for e in entries
                    if (e["operation"], e["group size"], e["size"] >= LARGE) == kind
                ]
                if some:
                    copies = [ratios["copy"] for ratios in some]
                    of_copy = f"{median(copies):.2f} / {min(copies):.2f}"
                    means = [
                        spread([ratios[rival] for ratios in some if rival in ratios])
                        for rival in rivals
                    ]
                    wanted = f"{aim(LARGE if large else 0, size, operation):.2f}"
                    lines += row(
                        operation, maps, str(size), str(len(some)), of_copy, wanted, *means
                    )
    lines += [
        "",
        *row(
            "shape",
            "group size",
            "operation",
            "ms",
            "of a copy",
            *(f"vs {rival}" for rival in rivals),
        ),
    ]
    lines += row(*["---"] * 8)
    for e in entries:
        ratios = {name: f"{ratio:.2f}" for name, ratio in e["ratios"].items()}
        lines += row(
            e["shape"],
            str(e["group size"]),
            e["operation"],
            f"{e['milliseconds']['ours']:.3f}",
            ratios["copy"],
            ratios.get("Triton", "–"),
            f"{ratios['cuDNN']} ({e['cuDNN format']})",
            ratios["expand + sum + cuDNN"],
        )
    return "\n".join(lines) + "\n"


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
            cudnn = [ratios["copy"] / ratios["cuDNN"] for ratios in some.values()]
            axis.plot(places, cudnn, "k_", label="cuDNN" if i == 0 else None)
        axis.axhline(aim(LARGE, 16, operation), color="k", linestyle="--", linewidth=0.5)
        axis.set_title(f"{operation}: fraction of a copy's speed")
        axis.set_xticks([x + 0.32 for x in range(len(labels))], labels)
    axis.legend(ncols=6)
    figure.savefig(path, dpi=80)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=240, help="leave out what does not fit (default: 240)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each (default: 15)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no GPU is available to torch; this measures GPUs alone")
    torch.backends.cudnn.benchmark = True
    write(options.folder, SHAPES, "cuda", options.rounds, time.monotonic() + options.seconds)


def write(folder: Path, shapes: Sequence[Shape], device: str, rounds: int, deadline: float) -> None:
    """Measure, and write gpu.json, gpu.md and gpu.png."""
    folder.mkdir(parents=True, exist_ok=True)
    sample = torch.empty(1, 64, 8, 8, device=device, dtype=torch.bfloat16).to(
        memory_format=torch.channels_last
    )
    facts = machine() | {
        "backend": explain(
            sample, [torch.empty(64, 4, 3, 3, device=device, dtype=torch.bfloat16)], padding=1
        ),
        "host microseconds for a forward call (aim: 15)": round(host_microseconds(device), 1),
        "CPU kernels": "loaded" if ops.load_error is None else "not loaded",
    }
    entries: list[dict[str, Any]] = []
    for entry in run(shapes, device, rounds, deadline, print):
        entries.append(entry)
        # After every entry, so that a run that is cut short leaves what it has.
        (folder / "gpu.json").write_text(json.dumps({"facts": facts, "entries": entries}, indent=1))
    if not entries:
        sys.exit("benchmarks.gpu: no time for a single entry")
    (folder / "gpu.md").write_text(markdown(entries, facts))
    if not plot(entries, folder / "gpu.png"):
        print("gpu.png is left out: matplotlib is not installed")
    print((folder / "gpu.md").read_text())


if __name__ == "__main__":
    main()
