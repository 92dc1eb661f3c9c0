"""The convolutions that are measured on a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A square 3×3 convolution with padding 1: images, channels, size of its input, stride."""

    batch: int
    channels: int
    size: int
    stride: int = 1

    @property
    def label(self) -> str:
        """As in ``shapes``: "64@56", "64@56/2"."""
        return f"{self.channels}@{self.size}" + (f"/{self.stride}" if self.stride > 1 else "")


#: The most telling first: a run that is short of time leaves out the last.
SHAPES = (
    *(Shape(128, 64, 56), Shape(128, 128, 28), Shape(128, 256, 14), Shape(128, 512, 7)),
    *(
        Shape(128, 64, 56, 2),
        Shape(256, 64, 32),
        Shape(256, 256, 8),
        Shape(128, 128, 56),
        Shape(128, 64, 112),
    ),
    *(
        Shape(128, 256, 28),
        Shape(128, 512, 14),
        Shape(256, 512, 4),
        Shape(128, 256, 14, 2),
        Shape(256, 64, 16),
    ),
    *(
        Shape(128, 128, 28, 2),
        Shape(256, 128, 16),
        Shape(256, 128, 8),
        Shape(256, 256, 4),
        Shape(128, 64, 224),
    ),
)
#: The paper's group sizes, and the largest that the CUDA kernels serve.
SIZES = (1, 4, 16, 32, 64)
#: As the backends' functions are called.
OPERATIONS = {
    "forward": "forward",
    "input gradient": "input_grad",
    "weight gradient": "weight_grad",
}
#: What stands for them where a CPU plays the card.
TINY = (Shape(1, 32, 3), Shape(1, 16, 4, 2))


def sizes(shape: Shape) -> tuple[int, ...]:
    """The group sizes that a shape can have."""
    return tuple(s for s in SIZES if s <= shape.channels)
