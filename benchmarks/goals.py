"""What the CPU kernels must reach on two threads. The tables mark it; no test fails, because
machines are noisy."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """The least geometric mean over the shapes of a row and, unless None, the least value of any
    one of them."""

    mean: float
    minimum: float | None = None

    def mark(self, values: Sequence[float]) -> str:
        """The goal and whether ``values`` reach it: "≥ 0.95 / 0.80 reached"."""
        reached = statistics.geometric_mean(values) >= self.mean and min(values) >= (
            self.minimum or 0.0
        )
        least = "" if self.minimum is None else f" / {self.minimum:.2f}"
        return f"≥ {self.mean:.2f}{least} {'reached' if reached else 'missed'}"


#: No grouped convolution may fall further behind the library.
LEAST = 0.85
#: Times as fast as the library in float32, channels-last: forward, input gradient, weight gradient,
#: by group size.
GROUPED = {
    1: (1.1, 1.5, 1.1),
    2: (6.0, 6.0, 4.0),
    4: (3.5, 3.5, 2.8),
    8: (1.8, 1.8, 1.6),
    16: (1.05, 1.05, 1.05),
    32: (0.97, 0.97, 0.97),
    64: (0.97, 0.97, 0.97),
}
OPERATIONS = ("forward", "input gradient", "weight gradient")
#: The layer's η, and its speed against three convolutions: by operation, batch, figure and group
#: size.
LAYER = {
    ("inference", 16, "η"): {1: Goal(0.90, 0.75)} | dict.fromkeys((4, 16, 32), Goal(0.95, 0.80)),
    ("inference", 1, "η"): {1: Goal(0.80, 0.65)} | dict.fromkeys((4, 16, 32), Goal(0.85, 0.70)),
    ("inference", 16, "fold"): {4: Goal(1.7)},
    ("inference", 1, "fold"): {4: Goal(1.6)},
    ("training", 16, "η"): {4: Goal(0.8)},
}
#: Layers in 8 bits against PyTorch's in 8 bits, and against our own in float32: by batch, figure
#: and group size.
LAYER_IN_8_BITS = {
    (16, "dense"): {4: Goal(2.0)},
    (16, "fold"): {4: Goal(1.3)},
    (16, "float32"): {4: Goal(1.5)},
    (1, "fold"): {4: Goal(1.3)},
}
#: A dense convolution in 8 bits: not slower than PyTorch's, and worth its 8 bits.
CONVOLUTION_IN_8_BITS = {"library": Goal(1.0, LEAST), "float32": Goal(2.0)}
#: Times as fast as the dense network in inference, batch 16, every group size 4.
NETWORK = {
    "vgg16": Goal(3.0),
    "vgg16-cifar": Goal(4.5),
    "resnet18": Goal(2.6),
    "4-layer": Goal(1.8),
}


#: Exported networks that must only not be slower than a runtime.
NOT_SLOWER = ("resnet50", "4-layer")


def deployment(network: str, kind: str, mac_ratio: float, precision: str = "float32") -> Goal:
    """Of an exported network against the fastest runtime on the "dense" or the "folded" one."""
    if network in NOT_SLOWER:
        return Goal(1.0)
    return Goal(1.3 if kind == "folded" or precision == "int8" else 0.9 * mac_ratio)


def goal(figure: str, entry: Mapping[str, Any]) -> Goal | None:
    """The goal of a row, of which ``entry`` is one, for "η" or for its ratio to the baseline
    ``figure``."""
    if entry["device_type"] != "cpu":
        return None
    precision = (entry["dtype"], entry["memory_format"])
    main = precision == ("float32", "channels_last")
    if entry["suite"] == "grouped convolution" and figure == "library":
        # Other precisions, and sizes that are no power of two, must only not be slower.
        means = GROUPED.get(entry["setting"]) if main else None
        return Goal(means[OPERATIONS.index(entry["operation"])] if means else 1.0, LEAST)
    if entry["suite"] == "GroSSConv2d" and main and not entry["narrow"]:
        return LAYER.get((entry["operation"], entry["batch"], figure), {}).get(entry["setting"])
    if entry["suite"] == "int8 layer" and not entry["narrow"]:
        return LAYER_IN_8_BITS.get((entry["batch"], figure), {}).get(entry["setting"])
    if entry["suite"] == "int8 convolution":
        return CONVOLUTION_IN_8_BITS.get(figure)
    uniform = set(entry["setting"].split()) == {"4"} if entry["suite"] == "networks" else False
    if (
        uniform
        and main
        and figure == "dense"
        and (entry["operation"], entry["batch"]) == ("inference", 16)
    ):
        return NETWORK.get(entry["subject"])
    return None
