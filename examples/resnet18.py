"""ResNet-18 at every group size, on photographs: what the series convolutions cost, beside what a
user would write; and the network that is deployed, beside the dense one.

Every 3×3 convolution after the first becomes a ``GroSSConv2d`` with group sizes 1, 4, 16 and 32.
The network then runs forward and backward at each of its four uniform configurations, in turn with
the baseline: expand the terms, sum them, call ``F.conv2d``. Then the configuration of all 4 is
exported. Weights are random: the differences of the outputs mean something, the outputs do not."""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from gross import decompose, export
from gross.deployment.comparing import comparison
from gross.macs import macs
from gross.report import short
from gross.supernet import decomposed_layers, dense_network, set_configuration
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms.functional import normalize

from gross_kernels import use_backend

GROUP_SIZES = (1, 4, 16, 32)
SIZE = 224
DEPLOYED = 4
#: Ours and the baseline alternate; the first pair warms up and is not counted.
PAIRS = 6
HEADINGS = (
    "group\nsize",
    "MACs",
    "parameters",
    "forward",
    "backward",
    "baseline\nforward",
    "baseline\nbackward",
    "ratio",
    "outputs\ndiffer\nby",
)


def photographs() -> tuple[Tensor, Tensor]:
    """The four corners, 224×224 each, of scikit-learn's two photographs, normalised as for
    ImageNet: images ``[8, 3, 224, 224]``, and which photograph each is from ``[8]``."""
    crops, labels = [], []
    for label, photograph in enumerate(load_sample_images().images):
        image = torch.tensor(photograph).permute(2, 0, 1) / 255
        for rows in (slice(SIZE), slice(-SIZE, None)):
            for columns in (slice(SIZE), slice(-SIZE, None)):
                crops.append(image[:, rows, columns])
                labels.append(label)
    images = normalize(torch.stack(crops), mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(labels)


def step(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, float, float]:
    """Forward and backward of one batch: the logits, and the milliseconds of each."""
    network.zero_grad()
    begin = time.perf_counter()
    logits = network(images)
    middle = time.perf_counter()
    F.cross_entropy(logits, labels).backward()
    end = time.perf_counter()
    return logits.detach(), 1e3 * (middle - begin), 1e3 * (end - middle)


def parameters(network: nn.Module) -> int:
    """Of the network at its configuration, once every series is summed."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    layers = decomposed_layers(network).values()
    return count(network) + sum(count(layer.fold()) - count(layer) for layer in layers)


def main() -> None:
    torch.manual_seed(0)
    images, labels = photographs()
    network = decompose(resnet18(weights=None), GROUP_SIZES, method="random", quiet=True)
    network = network.to(memory_format=torch.channels_last)
    layers = decomposed_layers(network)
    table = Table(
        title=f"ResNet-18, batch {len(images)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        caption="Medians in ms. Ratio: baseline over ours, forward and backward together, "
        "median of the pairs.",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    with Progress(transient=True) as progress:
        task = progress.add_task("forward and backward", total=len(GROUP_SIZES) * PAIRS)
        for group_size in GROUP_SIZES:
            set_configuration(network, [group_size] * len(layers))
            times = []
            for _ in range(PAIRS):
                ours, *ours_ms = step(network, images, labels)
                with use_backend("reference"):
                    baseline, *baseline_ms = step(network, images, labels)
                times.append((*ours_ms, *baseline_ms))
                progress.advance(task)
            counted = times[1:]
            table.add_row(
                str(group_size),
                short(macs(network, images.shape[1:]).total),
                short(parameters(network)),
                *(f"{statistics.median(column):.0f}" for column in zip(*counted, strict=True)),
                f"{statistics.median((c + d) / (a + b) for a, b, c, d in counted):.2f}",
                f"{(ours - baseline).abs().max():.1e}",
            )
    Console().print(table)
    deploy(network.eval(), images)


def deploy(network: nn.Module, images: Tensor) -> None:
    """Export all layers at one group size, and compare with the dense network."""
    configuration = [DEPLOYED] * len(decomposed_layers(network))
    for batch in (1, len(images)):
        example = images[:batch]
        candidates = {
            "dense": dense_network(network, configuration),
            "decomposed, plain": export(network, configuration, example=example, kernels=False),
            "decomposed, exported": export(network, configuration, example=example),
        }
        rows = comparison(candidates, example)
        table = Table(
            *("network", "MACs", "ms", "times as fast", "outputs differ by"),
            title=f"ResNet-18 at group size {DEPLOYED}, deployed, batch {batch}",
            box=box.SIMPLE_HEAD,
        )
        for row in rows:
            table.add_row(
                row["network"],
                short(row["macs"]),
                f"{row['milliseconds']:.1f}",
                f"{rows[0]['milliseconds'] / row['milliseconds']:.2f}",
                f"{row['difference']:.1e}",
            )
        Console().print(table)


if __name__ == "__main__":
    main()
