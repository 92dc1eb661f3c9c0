"""A small data set and networks that train on it in a second."""

from collections.abc import Callable

import pytest
import torch
from gross.data import Augmentation, Data, Images
from gross.decomposition import decompose
from torch import nn


def coloured_squares(count: int) -> Images:
    """Images of two classes that a convolution tells apart: bright above, or bright below."""
    pixels = torch.randint(100, (count, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(count) % 2
    for image, label in zip(pixels, labels, strict=True):
        image[:, 4 * label : 4 * label + 4] += 100
    return Images(pixels, labels, augmentation=Augmentation(1, True))


@pytest.fixture
def squares() -> Data:
    """48 images to train on, in three batches of 16."""
    return Data(
        "squares",
        coloured_squares(48),
        coloured_squares(20),
        coloured_squares(20),
        ("above", "below"),
        (3, 8, 8),
    )


@pytest.fixture
def make_network() -> Callable[[], nn.Sequential]:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(512, 2),
        )

    return make


@pytest.fixture
def make_supernet(make_network: Callable[[], nn.Sequential]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return decompose(make_network(), (1, 2, 4), sweeps=3, quiet=True)

    return make
