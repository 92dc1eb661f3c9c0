"""The paper's networks, the structures of their decompositions, and its published results.

Sections and tables are those of "GroSS: Group-Size Series Decomposition for Grouped Architecture
Search" (ECCV 2020) and its appendix."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import nn

from gross_kernels import GroSSConv2d

from . import weights as weight_files
from .arguments import check_choice, check_int, check_path
from .extras import from_extra

#: The group sizes of VGG-16 and ResNet-18 (section 4.3).
FOUR_SIZES = (1, 4, 16, 32)
#: The convolutions of VGG-16 in ``features``, the first left out; those of the CIFAR-10 variant
#: have the same names.
VGG16_LAYERS = tuple(f"features.{i}" for i in (2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28))
#: The convolutions of ResNet-18 larger than 1×1, the first left out.
RESNET18_LAYERS = tuple(
    f"layer{i}.{j}.conv{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)
)
#: Appendix, Table 3: width of the bottleneck (in, out) and group sizes of VGG-16's convolutions.
NARROW = {
    "features.2": ((11, 18), (11,)),
    "features.5": ((10, 24), (5, 10)),
    "features.7": ((28, 28), (1, 7, 14, 28)),
    "features.10": ((36, 48), (3, 9, 18)),
    "features.12": ((60, 48), (15, 30, 60)),
    "features.14": ((64, 56), (16, 32, 64)),
    "features.17": ((64, 100), (16, 32, 64)),
    "features.19": ((116, 100), (29, 58, 116)),
    "features.21": ((132, 132), (3, 33, 66)),
    "features.24": ((224, 224), (7, 28, 56, 112)),
    "features.26": ((224, 224), (7, 28, 56, 112)),
    "features.28": ((224, 224), (7, 28, 56, 112)),
}


class Structure(TypedDict):
    """How the paper decomposes a network: arguments of :func:`gross.decompose`, by qualified
    name."""

    group_sizes: dict[str, tuple[int, ...]]
    width: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Network:
    """One of the paper's networks.

    Attributes:
        make: the network for a number of classes, freshly initialised.
        input_size: channels, height and width of an input.
        num_classes: of the paper's data set.
        structure: the paper's group sizes, and widths where they are not the number of input
            channels.
        dense: name of the network before its decomposition, where ``make`` gives a supernet.
    """

    make: Callable[[int], nn.Module]
    input_size: tuple[int, int, int]
    num_classes: int
    structure: Structure
    dense: str | None = None


@dataclass(frozen=True)
class Published:
    """One row of the paper's Tables 2 to 4, as printed.

    Attributes:
        network: a name that :func:`build` takes.
        configuration: one group size per decomposed layer; None for the network before its
            decomposition.
        macs: multiply–accumulates; 5.13M is 5.13e6.
        gross_accuracy, true_accuracy: top-1 in percent, in the supernet and fine-tuned on its own.
        baseline: the configuration that the row is compared with; None for rows that are not
            compared.
        macs_cut, grouped_cut: by how many percent the row has fewer MACs than its baseline, in all
            and in the grouped convolutions alone (the column "G.Conv"); None where not printed.
    """

    network: str
    configuration: tuple[int, ...] | None
    macs: float
    gross_accuracy: float | None
    true_accuracy: float
    baseline: tuple[int, ...] | None = None
    macs_cut: float | None = None
    grouped_cut: float | None = None


#: VBMF chose (16, 8, 16); rows whose configuration the paper does not print (VBMF on VGG-16) are
#: left out. Table 4 prints one number per row, in the column "G.Conv". ResNet-18's configuration of
#: 715M MACs is the one of the authors' released settings: the printed one has 819M by the counting
#: rule.
PUBLISHED = (
    Published("4-layer", None, 5.13e6, None, 83.99),
    Published("4-layer", (32, 32, 32), 5.09e6, 82.55, 83.70),
    Published("4-layer", (32, 16, 64), 5.09e6, 82.87, 84.05, (32, 32, 32), 0.00, 0.00),
    Published("4-layer", (16, 16, 16), 3.47e6, 82.22, 82.94),
    Published("4-layer", (16, 8, 16), 3.33e6, 81.76, 82.83, (16, 16, 16), 4.25, 9.09),
    Published("4-layer", (8, 16, 64), 3.33e6, 82.66, 83.88, (16, 16, 16), 4.25, 9.09),
    Published("4-layer", (8, 8, 8), 2.66e6, 81.44, 82.86),
    Published("4-layer", (2, 16, 32), 2.59e6, 82.12, 83.50, (8, 8, 8), 2.77, 9.09),
    Published("4-layer", (4, 4, 4), 2.26e6, 80.66, 82.37),
    Published("4-layer", (1, 8, 16), 2.22e6, 81.32, 82.45, (4, 4, 4), 1.63, 9.09),
    Published("4-layer", (1, 1, 1), 1.95e6, 79.34, 81.70),
    Published("vgg16-cifar", None, 314e6, None, 91.52),
    Published("vgg16-cifar", (32,) * 12, 121e6, 90.97, 91.57),
    Published(
        "vgg16-cifar",
        (32, 4, 16, 32, 16, 16, 32, 16, 4, 16, 32, 1),
        103e6,
        91.31,
        91.41,
        (32,) * 12,
        14.6,
        33.7,
    ),
    Published("vgg16-cifar", (16,) * 12, 94.6e6, 91.13, 91.19),
    Published(
        "vgg16-cifar",
        (4, 4, 16, 32, 16, 16, 1, 32, 4, 32, 16, 1),
        86.7e6,
        91.28,
        91.31,
        (16,) * 12,
        8.36,
        30.2,
    ),
    Published("vgg16-cifar", (4,) * 12, 74.9e6, 90.43, 90.90),
    Published(
        "vgg16-cifar",
        (1, 1, 1, 16, 16, 4, 1, 1, 4, 4, 1, 4),
        74.1e6,
        90.97,
        91.14,
        (4,) * 12,
        1.11,
        12.6,
    ),
    Published("vgg16-cifar", (1,) * 12, 70.0e6, 90.24, 90.66),
    Published("vgg16", None, 15.49e9, None, 71.59),
    Published("vgg16", (16,) * 12, 4.75e9, 70.25, 70.77),
    Published(
        "vgg16",
        (1, 32, 32, 32, 16, 1, 32, 16, 32, 4, 32, 16),
        4.70e9,
        70.40,
        70.82,
        (16,) * 12,
        None,
        3.65,
    ),
    Published("vgg16", (4,) * 12, 3.78e9, 69.73, 70.51),
    Published(
        "vgg16",
        (1, 1, 4, 4, 4, 4, 32, 16, 1, 1, 32, 1),
        3.78e9,
        69.97,
        70.63,
        (4,) * 12,
        None,
        1.69,
    ),
    Published("vgg16", (1,) * 12, 3.54e9, 68.98, 70.28),
    Published(
        "vgg16-narrow", (11, 10, 14, 9, 15, 16, 16, 29, 33, 56, 56, 56), 1.16e9, 62.64, 66.85
    ),
    Published(
        "vgg16-narrow",
        (11, 10, 14, 9, 15, 32, 64, 58, 3, 56, 7, 7),
        1.16e9,
        63.11,
        67.22,
        (11, 10, 14, 9, 15, 16, 16, 29, 33, 56, 56, 56),
        None,
        4.89,
    ),
    Published("resnet18", None, 1.82e9, None, 69.76),
    Published("resnet18", (16,) * 16, 738e6, 60.77, 65.80),
    Published(
        "resnet18",
        (1, 1, 32, 1, 32, 4, 32, 16, 16, 32, 32, 32, 32, 4, 4, 16),
        715e6,
        61.25,
        65.84,
        (16,) * 16,
        None,
        3.18,
    ),
    Published("resnet18", (4,) * 16, 586e6, 60.02, 65.46),
    Published(
        "resnet18",
        (1, 4, 4, 1, 16, 4, 1, 4, 32, 4, 4, 4, 16, 4, 4, 4),
        585e6,
        60.31,
        65.44,
        (4,) * 16,
        None,
        0.88,
    ),
    Published("resnet18", (1,) * 16, 547e6, 58.61, 65.16),
)


def build(
    name: str, *, num_classes: int | None = None, weights: str | os.PathLike[str] | None = None
) -> nn.Module:
    """One of the paper's networks (appendix, A.1), in training mode.

    "4-layer" and "vgg16-cifar" are initialised as A.2 says: convolutions by He's rule in "fan out"
    mode for ReLU, fully-connected layers from a normal distribution of variance 0.01, biases 0.
    "vgg16" (without batch norm) and "resnet18" are torchvision's, with its initialisation where no
    weights are given. "vgg16-narrow" is VGG-16 in the structure of the appendix's Table 3: already
    a supernet, whose bottlenecks are drawn so that the variance of their outputs is that of the
    convolutions they stand for.

    Args:
        name: "4-layer", "vgg16-cifar", "vgg16", "resnet18" or "vgg16-narrow".
        num_classes: outputs of the classifier; by default 10 for CIFAR-10's networks and 1000 for
            ImageNet's.
        weights: path of a local ``.pth`` or ``.safetensors`` file with this network's state dict,
            such as torchvision's.

    Returns:
        The network; its input has the shape ``[N, *input_size(name)]``, its output ``[N,
        num_classes]``.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for an unknown name, or weights that are broken or do not fit.
        FileNotFoundError: if there is no such weight file.
        ImportError: if torchvision is needed and missing.
    """
    network = NETWORKS[_check_name(name)]
    if num_classes is None:
        num_classes = network.num_classes
    num_classes = check_int("num_classes", num_classes, least=1)
    tensors = None if weights is None else weight_files.read(check_path("weights", weights))
    model = network.make(num_classes)
    if tensors is not None:
        weight_files.load(model, tensors, weights)
    return model


def input_size(name: str) -> tuple[int, int, int]:
    """Channels, height and width of a network's input: (3, 32, 32) or (3, 224, 224).

    Raises:
        ValueError: for an unknown name.
    """
    return NETWORKS[_check_name(name)].input_size


def structure(name: str) -> Structure:
    """How the paper decomposes a network, as arguments of :func:`gross.decompose`.

    ``decompose(build("vgg16", weights=path), **structure("vgg16-narrow"))`` decomposes trained
    weights into the structure of Table 3.

    Raises:
        ValueError: for an unknown name.
    """
    return NETWORKS[_check_name(name)].structure


def _check_name(name: str) -> str:
    return check_choice("name", name, NETWORKS)


def _features(stages: tuple[tuple[int, ...], ...]) -> nn.Sequential:
    """3×3 convolutions of these widths, each with a ReLU, and a 2×2 max pooling after each
    stage."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in stages:
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _cifar_network(stages: tuple[tuple[int, ...], ...], hidden: int, num_classes: int) -> nn.Module:
    """A network for 32×32 images whose classifier is ``fc(hidden → hidden)``, ``fc(hidden →
    num_classes)``."""
    model = nn.Sequential(
        OrderedDict(
            features=_features(stages),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Linear(hidden, num_classes),
            ),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(0.01))
        else:
            continue
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    return model


def _four_layer(num_classes: int) -> nn.Module:
    return _cifar_network(((32,), (32,), (64,), (64,)), 256, num_classes)


def _vgg16_cifar(num_classes: int) -> nn.Module:
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    return _cifar_network(stages, 512, num_classes)


def _vgg16(num_classes: int) -> nn.Module:
    with from_extra():
        from torchvision.models import vgg16
    return vgg16(weights=None, num_classes=num_classes)


def _resnet18(num_classes: int) -> nn.Module:
    with from_extra():
        from torchvision.models import resnet18
    return resnet18(weights=None, num_classes=num_classes)


def _vgg16_narrow(num_classes: int) -> nn.Module:
    from .decomposition import decompose

    model = decompose(_vgg16(num_classes), **structure("vgg16-narrow"), method="random", quiet=True)
    for layer in model.modules():
        if isinstance(layer, GroSSConv2d):
            # A fresh layer's outputs have a third of the variance of its inputs; under He's rule in
            # fan-out mode, 2·C_in/C_out times.
            scale = math.sqrt(6 * layer.in_channels / layer.out_channels)
            with torch.no_grad():
                for term in layer.pointwise_out:
                    term.mul_(scale)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return model


def _equal_width(layers: tuple[str, ...], group_sizes: tuple[int, ...]) -> Structure:
    return {"group_sizes": dict.fromkeys(layers, group_sizes), "width": {}}


#: What :func:`build` takes, by name.
NETWORKS = {
    "4-layer": Network(
        _four_layer,
        (3, 32, 32),
        10,
        {
            # All powers of two up to the width (section 4.3): 6·6·7 = 252 configurations.
            "group_sizes": {
                "features.3": (1, 2, 4, 8, 16, 32),
                "features.6": (1, 2, 4, 8, 16, 32),
                "features.9": (1, 2, 4, 8, 16, 32, 64),
            },
            "width": {},
        },
    ),
    "vgg16-cifar": Network(_vgg16_cifar, (3, 32, 32), 10, _equal_width(VGG16_LAYERS, FOUR_SIZES)),
    "vgg16": Network(_vgg16, (3, 224, 224), 1000, _equal_width(VGG16_LAYERS, FOUR_SIZES)),
    "resnet18": Network(_resnet18, (3, 224, 224), 1000, _equal_width(RESNET18_LAYERS, FOUR_SIZES)),
    "vgg16-narrow": Network(
        _vgg16_narrow,
        (3, 224, 224),
        1000,
        {
            "group_sizes": {name: sizes for name, (_, sizes) in NARROW.items()},
            "width": {name: width for name, (width, _) in NARROW.items()},
        },
        dense="vgg16",
    ),
}
