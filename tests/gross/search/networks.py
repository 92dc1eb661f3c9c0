"""Small supernets that the tests of the search share."""

import gross
import torch
from gross.supernet import configuration, decomposed_layers
from torch import nn


def supernet(layers: int = 4, group_sizes: tuple[int, ...] = (1, 2, 4, 8)) -> nn.Module:
    """A chain of decomposed convolutions with a classifier for images of 3×8×8."""
    torch.manual_seed(0)
    body = [part for _ in range(layers) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        *body,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    net = gross.decompose(
        model, group_sizes, keep_costlier=True, method="random", quiet=True
    ).eval()
    with torch.no_grad():
        for layer in decomposed_layers(net).values():
            for term in layer.pointwise_out:
                # Else the last bias alone decides.
                term.mul_(4)
    return net


def rugged(model: nn.Module) -> float:
    """A metric with many local maxima, known from the configuration alone."""
    return sum(((i + 2) * s * s + 5 * s) % 13 for i, s in enumerate(configuration(model)))
