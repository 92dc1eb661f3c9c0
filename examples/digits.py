"""From a trained network to a supernet, on real weights: the paper's 4-layer network on
scikit-learn's handwritten digits.

Trains the network for a few epochs, decomposes it once at all group sizes, and prints the accuracy
of every uniform configuration before any fine-tuning, beside its multiply-accumulates. Run: python
examples/digits.py"""

import gross
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

EPOCHS = 8
BATCH = 64
GROUP_SIZES = (1, 2, 4, 8, 16, 32)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1797 digits of 8×8 pixels as images [N, 3, 32, 32], and their labels: 1437 to train on and
    360 to test on."""
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    inputs = F.interpolate(inputs - inputs.mean(), size=(32, 32), mode="bilinear").repeat(
        1, 3, 1, 1
    )
    targets = torch.tensor(labels)
    order = torch.randperm(len(inputs))
    train, test = order[:1437], order[1437:]
    return inputs[train], targets[train], inputs[test], targets[test]


def train(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Stochastic gradient descent with momentum, the learning rate falling to zero."""
    steps = EPOCHS * (len(inputs) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in track(range(steps), description="training"):
        batch = torch.randint(len(inputs), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Percentage of right answers."""
    return 100 * (model.eval()(inputs).argmax(1) == targets).float().mean().item()


def main() -> None:
    """Train, decompose, and print the table."""
    torch.manual_seed(0)
    train_inputs, train_targets, test_inputs, test_targets = digits()
    input_size = gross.networks.input_size("4-layer")
    model = gross.networks.build("4-layer")
    train(model, train_inputs, train_targets)
    supernet = gross.decompose(model, **gross.networks.structure("4-layer"), input_size=input_size)

    table = Table(
        "group sizes",
        "MACs",
        "of the full network",
        "accuracy",
        title="Digits, before any fine-tuning",
    )
    full = gross.macs(model, input_size)
    counts = gross.macs(supernet, input_size)
    for size in GROUP_SIZES:
        configuration = (size,) * 3
        gross.set_configuration(supernet, configuration)
        macs = counts.with_configuration(configuration).total
        share = f"{100 * macs / full.total:.1f} %"
        correct = f"{accuracy(supernet, test_inputs, test_targets):.1f} %"
        table.add_row(" ".join(map(str, configuration)), f"{macs:,}", share, correct)
    table.add_section()
    table.add_row(
        "not decomposed",
        f"{full.total:,}",
        "",
        f"{accuracy(model, test_inputs, test_targets):.1f} %",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
