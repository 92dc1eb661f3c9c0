"""From scratch to a supernet in which every configuration is trained: the 4-layer network on
scikit-learn's handwritten digits.

Trains the network, decomposes it at all group sizes at once, fine-tunes all configurations
together, and prints what each uniform one costs and gives before and after. Run: python
examples/digits.py"""

import gross
import torch
from gross.training import accuracy
from rich.console import Console
from rich.table import Table

GROUP_SIZES = (1, 2, 4, 8, 16, 32)


def main() -> None:
    """Train, decompose, fine-tune, and print the table."""
    torch.manual_seed(0)
    data = gross.data.load("digits")
    percentage = accuracy(data.test)
    model = gross.networks.build("4-layer")
    gross.train(model, data)
    supernet = gross.decompose(
        model, **gross.networks.structure("4-layer"), input_size=data.input_size
    )

    def accuracies() -> list[float]:
        found = []
        for size in GROUP_SIZES:
            gross.set_configuration(supernet.eval(), (size,) * 3)
            found.append(percentage(supernet))
        return found

    before = accuracies()
    gross.finetune(supernet, data)
    after = accuracies()

    full, counts = gross.macs(model, data.input_size), gross.macs(supernet, data.input_size)
    table = Table("group sizes", "MACs", "of the full network", "decomposed", "fine-tuned")
    table.title = "Digits: accuracy on the test images"
    for size, first, last in zip(GROUP_SIZES, before, after, strict=True):
        macs = counts.with_configuration((size,) * 3).total
        share = f"{100 * macs / full.total:.1f} %"
        table.add_row(
            f"{size} {size} {size}", f"{macs:,}", share, f"{first:.1f} %", f"{last:.1f} %"
        )
    table.add_section()
    whole = f"{percentage(model.eval()):.1f} %"
    table.add_row("not decomposed", f"{full.total:,}", "", whole, "")
    Console().print(table)


if __name__ == "__main__":
    main()
