"""Structural regularisation on the paper's 4-layer network: how much accuracy a network keeps when
its convolutions become structured, with and without the regulariser in its training, and with and
without fine-tuning afterwards.

Run: python examples/structured.py --data folder:cifar10 --epochs 7 --fine 2 --seeds 0 1"""

from __future__ import annotations

import argparse
import copy
import statistics

import gross
import torch
from gross.training import accuracy
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

console = Console()
ROWS = (
    "dense", "decomposed", "fine-tuned", "regularised", "decomposed, regularised",
    "fine-tuned, regularised",
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nRun")[0])
    parser.add_argument("--data", default="digits", help="as gross train takes it")
    parser.add_argument("--epochs", type=int, default=12, help="of training")
    parser.add_argument("--fine", type=int, default=2, help="epochs of fine-tuning")
    parser.add_argument("--weight", type=float, default=0.5, help="λ of the regulariser")
    parser.add_argument("--channels", type=float, default=1.0, help="share of channels, c / C")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args()


def run(given: argparse.Namespace, data: gross.data.Data, seed: int) -> dict[str, float]:
    """Test accuracy in percent, by row."""
    measure = accuracy(data.test)
    structure = (given.channels, 2)
    found: dict[str, float] = {}

    def test(row: str, net: torch.nn.Module) -> None:
        with torch.inference_mode():
            found[row] = measure(copy.deepcopy(net).eval())
        console.print(f"seed {seed}: {row} {found[row]:.2f} %")

    for ending in ("", ", regularised"):
        torch.manual_seed(seed)
        net = gross.networks.build("4-layer").to(memory_format=torch.channels_last)
        penalty = None
        if ending:
            penalty = gross.structured.regularizer(net, structure, weight=given.weight)
        gross.train(net, data, epochs=given.epochs, regularizer=penalty, seed=seed, quiet=True)
        test("regularised" if ending else "dense", net)
        small = gross.structured.decompose(
            net, structure, input_size=data.input_size, quiet=bool(ending) or seed > 0
        )
        console.print([round(layer.residual, 3) for layer in small.structured_report.layers])
        test(f"decomposed{ending}", small)
        gross.train(
            small, data, epochs=given.fine, seed=seed, quiet=True, **{"optimizer.lr": 0.005}
        )
        test(f"fine-tuned{ending}", small)
    return found


def main() -> None:
    given = arguments()
    data = gross.data.load(given.data)
    runs = [run(given, data, seed) for seed in given.seeds]
    table = Table("network", "test accuracy, %", "seeds", box=SIMPLE_HEAD)
    for row in ROWS:
        values = [each[row] for each in runs]
        seeds = " ".join(f"{value:.2f}" for value in values)
        table.add_row(row, f"{statistics.mean(values):.2f}", seeds)
    console.print(table)


if __name__ == "__main__":
    main()
