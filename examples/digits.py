"""The whole journey on real data, in minutes: the paper's 4-layer network on scikit-learn's
handwritten digits.

Train the network, decompose it, fine-tune all 252 configurations at once, search them under the
cost of each uniform configuration (section 3.4 of the paper), fine-tune what was found and what it
was compared with, export, and measure. Everything goes into ``runs/digits``; a journey that was
stopped goes on from there. Run: python examples/digits.py"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import gross
import torch
from gross.architecture_search import report as evidence
from gross.data import Data
from gross.deployment import save_program
from gross.latency import milliseconds
from gross.report import short
from gross.supernet import Configuration
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

FOLDER = Path("runs/digits")
#: The uniform configurations that the searches must not exceed.
BASES = tuple((size,) * 3 for size in (4, 8, 16, 32))
#: The search whose result is exported.
EXPORTED = (8, 8, 8)
BATCH = 16

console = Console()


def announce(stage: str) -> None:
    console.rule(f"{time.strftime('%H:%M:%S')}  {stage}", align="left")


def train(data: Data) -> nn.Module:
    """The network before its decomposition."""
    announce("1 of 6: train the 4-layer network")
    torch.manual_seed(0)
    net = gross.networks.build("4-layer").to(memory_format=torch.channels_last)
    gross.train(net, data, directory=FOLDER / "dense", resume=True, batch_size=32, epochs=12)
    return net


def decompose(net: nn.Module, data: Data) -> nn.Module:
    """The supernet before its fine-tuning."""
    announce("2 of 6: decompose every convolution but the first, at every group size")
    saved = FOLDER / "decomposed.safetensors"
    if not saved.exists():
        structure = gross.networks.structure("4-layer")
        gross.save(gross.decompose(net, **structure, input_size=data.input_size), saved)
    return gross.load(saved).to(memory_format=torch.channels_last)


def finetune(decomposed: nn.Module, data: Data) -> nn.Module:
    """The supernet, all configurations trained together."""
    announce("3 of 6: fine-tune all 252 configurations at once")
    supernet = copy.deepcopy(decomposed)
    gross.finetune(supernet, data, directory=FOLDER / "supernet", resume=True, epochs=15)
    gross.save(supernet, FOLDER / "supernet.safetensors")
    return supernet


def search(supernet: nn.Module, data: Data) -> list[gross.SearchResult]:
    """Exhaustive and breadth-first search under each base; the exhaustive results."""
    announce("4 of 6: search under the cost of each uniform configuration")
    exhaustive: list[gross.SearchResult] = []
    smaller = None
    for base in BASES:
        journal = FOLDER / "search.journal"
        # What one search has evaluated the next ones find in the journal.
        best = gross.search(supernet, data.validation, base, "exhaustive", journal=journal)
        smaller = gross.search(supernet, data.validation, base, journal=journal, smaller=smaller)
        console.print(best, smaller)
        exhaustive.append(best)
    return exhaustive


def finetune_alone(
    decomposed: nn.Module, data: Data, configurations: Sequence[Configuration]
) -> dict[Configuration, nn.Module]:
    """Each configuration, individually fine-tuned from the decomposition."""
    announce("5 of 6: fine-tune each found configuration, and its base, on its own")
    networks = {}
    for c in configurations:
        networks[c] = copy.deepcopy(decomposed)
        run = FOLDER / "-".join(map(str, c))
        arguments = {"configuration": c, "directory": run, "resume": True, "quiet": True}
        history = gross.finetune(networks[c], data, **arguments, epochs=15)
        console.print(f"{c}: {history.epochs[-1]['accuracy']:.2f} % of the validation images")
    return networks


def export(
    net: nn.Module,
    networks: dict[Configuration, nn.Module],
    searches: list[gross.SearchResult],
    data: Data,
) -> None:
    """Export the found configuration and its base, and measure them beside the full network."""
    announce("6 of 6: export, and measure on this machine")
    result = searches[BASES.index(EXPORTED)]
    images, labels = data.test.tensors()
    candidates = {"full network": (net.eval(), None)}
    for name, c in (("base", EXPORTED), ("found", result.configuration)):
        fast = gross.export(networks[c], c, example=images[:BATCH])
        candidates[name] = (fast, c)
    save_program(candidates["found"][0], images[:BATCH], FOLDER / "found.pt2")
    table = Table(
        *("", "group sizes", "MACs", "test accuracy", f"ms for {BATCH} images"),
        box=SIMPLE_HEAD,
        title="Digits, individually fine-tuned, exported",
    )
    durations = milliseconds([model for model, _ in candidates.values()], images[:BATCH])
    for (name, (model, c)), duration in zip(candidates.items(), durations, strict=True):
        with torch.inference_mode():
            accuracy = 100 * (model(images).argmax(1) == labels).float().mean().item()
        table.add_row(
            name,
            "" if c is None else " ".join(map(str, c)),
            short(gross.macs(net if c is None else networks[c], data.input_size).total),
            f"{accuracy:.1f} %",
            f"{duration:.3f}",
        )
    console.print(table)


def main() -> None:
    """The six stages."""
    began = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    data = gross.data.load("digits")
    console.print(str(data))
    net = train(data)
    decomposed = decompose(net, data)
    supernet = finetune(decomposed, data)
    searches = search(supernet, data)
    compared = list(dict.fromkeys([*BASES, *(result.configuration for result in searches)]))
    networks = finetune_alone(decomposed, data, compared)
    accuracies = [gross.Accuracy(data.validation)(networks[c]) for c in compared]
    true = dict(zip(compared, accuracies, strict=True))
    export(net, networks, searches, data)
    evidence.write(FOLDER, searches, true=true)
    report = (FOLDER / "report.md").read_text(encoding="utf-8")
    console.print(report, highlight=False, markup=False)
    seconds = time.perf_counter() - began
    console.print(f"plot: {FOLDER / 'search.png'}; {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
