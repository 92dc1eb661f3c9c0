"""Checks the zoo: each network in a process of its own, with a limit. See ``--help``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import gross
import torch
from checks import CHECKS, DenseTooError, NothingToDecomposeError, Subject
from networks import NETWORKS, Network
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.modules.conv import _ConvNd

#: What each heading of the table says, in its order.
HEADINGS = ("network", "convolutions", "1×1", "grouped", "decomposed", "MACs", "s = 4", "failed")
#: How much of a failure's message the table shows.
MESSAGE = 160


@dataclass
class Result:
    """What became of one network.

    Attributes:
        network: its name.
        package: where it is from.
        convolutions, pointwise, grouped: how many the dense network has; 1×1 ones without groups,
            and ones with groups.
        decomposed: how many became layers.
        converted: whether that took ``convert=``.
        macs: of the dense network, for its example.
        macs_at_size: with every layer at ``checks.SIZE`` or the nearest group size below; None
            where nothing is decomposed.
        failed: what went wrong, by check.
        dense_too: what the dense network itself cannot do, by check.
        seconds: what all of it took.
    """

    network: str
    package: str
    convolutions: int = 0
    pointwise: int = 0
    grouped: int = 0
    decomposed: int = 0
    converted: bool = False
    macs: int = 0
    macs_at_size: int | None = None
    failed: dict[str, str] = field(default_factory=dict)
    dense_too: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def check(network: Network) -> Result:
    """Every check of one network, in this process."""
    begin = time.monotonic()
    result = Result(network.name, network.package)
    try:
        result.converted = network.convert() is not None
        _count(result, network)
        subject = Subject.of(network)
        result.decomposed = len(vars(subject.supernet)["decomposition_report"].layers)
        result.macs_at_size = gross.macs(subject.supernet, example=subject.example).total
        for name, function in CHECKS.items():
            try:
                function(subject)
            except DenseTooError as reason:
                result.dense_too[name] = str(reason)
            except Exception as error:
                result.failed[name] = _message(error)
    except NothingToDecomposeError:
        pass
    except Exception as error:
        result.failed["decompose"] = _message(error)
    result.seconds = time.monotonic() - begin
    return result


def _count(result: Result, network: Network) -> None:
    """The dense network's convolutions and MACs."""
    torch.manual_seed(0)
    dense = network.make().eval()
    for layer in dense.modules():
        if isinstance(layer, _ConvNd):
            result.convolutions += 1
            result.grouped += layer.groups > 1
            pointwise = isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) == (1, 1)
            result.pointwise += pointwise and layer.groups == 1
    result.macs = gross.macs(dense, example=network.example()).total


def _message(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"


def check_apart(network: Network, limit: float) -> Result:
    """Every check of one network, in another process that ends after ``limit`` seconds."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--here", str(network)]
    result = Result(network.name, network.package)
    try:
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        result.failed["process"] = f"not done after {limit:.0f} s"
        return result
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [""]
        result.failed["process"] = f"ended with status {ran.returncode}: {lines[-1]}"
        return result
    return Result(**json.loads(ran.stdout.splitlines()[-1]))


# What is shown ----------------------------------------------------------------------------------


def row(result: Result) -> tuple[str, ...]:
    """A network's row of the table."""
    failed = [f"{name}: {message[:MESSAGE]}" for name, message in result.failed.items()]
    dense_too = [f"{name} (dense too)" for name in result.dense_too]
    at_size = "" if result.macs_at_size is None else f"{result.macs_at_size / result.macs:.2f}"
    return (
        result.network + (" (convert)" if result.converted else ""),
        str(result.convolutions),
        str(result.pointwise),
        str(result.grouped),
        str(result.decomposed),
        f"{result.macs / 1e6:,.1f} M",
        at_size,
        "; ".join([*failed, *dense_too]),
    )


def shown(results: Iterable[Result]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("network", "failed") else "right")
    for result in results:
        table.add_row(*row(result))
    return table


def page(results: list[Result], command: str) -> str:
    """The table as a page of the documentation."""
    packages = list(dict.fromkeys(result.package for result in results))
    decomposed = [result for result in results if result.decomposed]
    failures = sum(bool(result.failed) for result in results)
    lines = [
        "# Networks",
        "",
        f"What `gross.decompose` makes of {len(results)} networks that people have: of "
        f"{len(decomposed)} it",
        f"decomposes convolutions, {failures} failed a check.",
        "",
        "- **convolutions** of the dense network: all, those of 1×1, those with groups, and those",
        "  that are decomposed at the default settings. The rest are the first one, transposed or",
        "  one-dimensional ones, and those of which no group size is cheaper. Where it says",
        "  (convert), `convert=` made plain convolutions of the network's own first.",
        "- **MACs** are the whole dense network's, for the small input that is checked; **s = 4**",
        "  is the share of them with every layer at group size 4, or the nearest one below that it",
        "  has.",
        '- **failed** names the checks that failed; "dense too" is what the dense network itself',
        "  cannot do.",
        "",
        "Each is checked, with random weights: at the exact size the outputs are the dense",
        "network's within 1e-5 of the largest; a configuration changes them and comes back bit for",
        "bit; gradients are the dense network's; MACs are what torch's own counter counts; a file,",
        "`copy.deepcopy` and `pickle` give it back bit for bit; in bfloat16 the error is at most",
        "twice that of plain convolutions and a unit in the last place; channels-last, `pack`,",
        "`torch.fx`, `torch.export` (or `torch.jit.trace`) and the network that is deployed",
        "compute the same.",
    ]
    for package in packages:
        lines += ["", f"## {package}", "", "| " + " | ".join(HEADINGS) + " |"]
        lines += ["|---|" + "---:|" * (len(HEADINGS) - 2) + "---|"]
        for result in results:
            if result.package == package:
                cells = (cell.replace("|", "\\|") for cell in row(result))
                lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    lines += [
        "",
        "## Where this is from",
        "",
        *textwrap.wrap(
            f"`{command}` made this page, on {_processor()}, one thread a network, with Python "
            f"{platform.python_version()}, {versions}.",
            100,
            break_on_hyphens=False,
        ),
    ]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {os.cpu_count()} processors"


# The command ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/check_zoo.sh",
        description="Checks networks of torchvision, timm, segmentation_models_pytorch, "
        "transformers, diffusers, monai and kornia at small inputs with random weights, each in a "
        "process of its own. Prints a table; ends with status 1 if anything failed.",
    )
    parser.add_argument("parts", nargs="*", help="parts of names, package:network; default all")
    parser.add_argument("--jobs", type=int, default=2, help="networks at a time (default 2)")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one (default 900)")
    parser.add_argument("--write", type=Path, help="write the table to this file, as Markdown")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--here", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        torch.set_num_threads(1)
        network = next(each for each in NETWORKS if str(each) == options.here)
        print(json.dumps(dataclasses.asdict(check(network))))
        return
    parts = options.parts or [""]
    chosen = [each for each in NETWORKS if any(part in str(each) for part in parts)]
    if not chosen:
        sys.exit(f"check_zoo: got {parts}, accepted are parts of the names that --list prints")
    if options.list:
        print(*chosen, sep="\n")
        return
    missing = sorted({each.package for each in chosen if find_spec(each.package) is None})
    if missing:
        sys.exit(
            f"check_zoo: not installed in {sys.executable}: {', '.join(missing)}; "
            'pip install --editable ".[zoo]"'
        )
    console = Console(stderr=True)
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(partial(check_apart, limit=options.limit), chosen):
            results.append(result)
            outcome = ", ".join(result.failed) or ("ok" if result.decomposed else "nothing to do")
            console.print(
                f"{len(results)}/{len(chosen)} {result.package}:{result.network} "
                f"{result.seconds:.0f} s: {outcome}",
                highlight=False,
            )
    Console(width=None if sys.stdout.isatty() else 200).print(shown(results))
    if options.write:
        part = options.write.with_suffix(".part")
        part.write_text(page(results, " ".join(["scripts/check_zoo.sh", *sys.argv[1:]])))
        part.replace(options.write)
    sys.exit(any(result.failed for result in results))


if __name__ == "__main__":
    main()
