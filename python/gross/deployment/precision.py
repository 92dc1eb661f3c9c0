"""What 8 bits need: settings, and calibration data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gross_kernels.environment import instruction_set, weight_bits

from ..arguments import check_callable, check_choice, check_int, check_number, check_type
from ..decomposition.calibration import Calibration

RANGES = ("mse", "percentile", "largest")
#: Fewer calibration images than this are said.
FEW = 8


@dataclass(frozen=True)
class Int8:
    """How a network is brought into 8 bits.

    Attributes:
        most_error: largest error of the network's output that 8 bits may cause: root mean square,
            relative to that of the output itself, over calibration images. Steps that lose too
            much stay in float32.
        metric: ``metric(network) -> float``, higher is better, of the exported network; beside
            ``most_error``, it may lose ``most_loss`` against the float network. It is called once
            for each step that leaves, so that some hundred images are enough.
        ranges: where a value's range is cut: "mse", where the mean squared error is the smallest,
            "percentile", or "largest", not at all.
        percentile: how much of all values the range holds, for "percentile".
        weight_bits: 8, or 7 for processors that sum pairs of products in 16 bits (AVX2 without
            VNNI), where weights of 8 bits are slower; by default what this processor wants.
        float32: names of layers, convolutions and linear layers that stay in float32 whatever the
            bounds allow; what a search has chosen, for example
            (:attr:`gross.SearchResult.precision`).
    """

    most_error: float = 0.05
    metric: Callable[[nn.Module], float] | None = None
    most_loss: float = 0.0
    ranges: str = "mse"
    percentile: float = 99.99
    weight_bits: int | None = None
    float32: Collection[str] = ()

    def __post_init__(self) -> None:
        check_number("most_error", self.most_error, "a number above 0", open_below=True)
        if self.metric is not None:
            check_callable("metric", self.metric, "a function of the network that returns a number")
        check_number("most_loss", self.most_loss, "a number of at least 0")
        check_choice("ranges", self.ranges, RANGES)
        accepted = "a number above 50, at most 100"
        if check_number("percentile", self.percentile, accepted, 50, open_below=True) > 100:
            raise ValueError(f"percentile: got {self.percentile}, accepted is {accepted}")
        if self.weight_bits is not None and check_int("weight_bits", self.weight_bits) not in (
            7,
            8,
        ):
            raise ValueError(f"weight_bits: got {self.weight_bits}, accepted are 7 and 8")
        check_type("float32", self.float32, Collection, "names of layers")
        if isinstance(self.float32, str) or not all(isinstance(n, str) for n in self.float32):
            raise TypeError(f"float32: got {self.float32!r}, accepted are names of layers")

    @property
    def largest_weight(self) -> int:
        """Weights in 8 bits lie between minus this and this."""
        return 2 ** ((self.weight_bits or weight_bits()) - 1) - 1


def warn_of_slow_weights(kernels: Iterable[Tensor]) -> None:
    """Say that weights of 8 bits run on an instruction set that wants 7."""
    slow = weight_bits() == 7 and any(
        bool((kernel.abs() > 63).any()) for kernel in kernels if kernel.dtype == torch.int8
    )
    if slow:
        warnings.warn(
            f"weights of 8 bits run on {instruction_set()} by an exact, slower way; "
            "Int8(weight_bits=7) makes weights that it multiplies fast",
            stacklevel=3,
        )


def read(calibration: object, example: Tensor | None = None) -> list[Tensor]:
    """The calibration data as batches of images.

    Args:
        example: an input of the network; by default the first batch.

    Raises:
        TypeError: if there is none, or it is no data.
        ValueError: if it is no input of the network that takes ``example``, or not finite.
    """
    if calibration is None:
        raise TypeError(
            "calibration: got None, accepted is a tensor of inputs, or an iterable of them; "
            "needed for precision='int8'"
        )
    images: Any = calibration
    batches = []
    device = torch.device("cpu") if example is None else example.device
    for i, item in enumerate(Calibration(images, device)):
        batch = item.args[0] if len(item.args) == 1 and not item.kwargs else None
        if not isinstance(batch, Tensor):
            raise TypeError(f"calibration[{i}]: got several arguments, accepted is one tensor")
        example = batch if example is None else example
        known = batch.dtype == example.dtype and batch.dim() == example.dim()
        if not known or batch.shape[1:2] != example.shape[1:2] or not len(batch):
            raise ValueError(
                f"calibration[{i}]: got {tuple(batch.shape)} of {batch.dtype}, accepted are "
                f"inputs like the example, {tuple(example.shape)} of {example.dtype}"
            )
        batches.append(batch)
    count = sum(map(len, batches))
    if count < FEW:
        warnings.warn(
            f"calibration: got {count} images; ranges are found from them alone, and some dozens "
            "are wanted",
            stacklevel=4,
        )
    return batches
