"""One call of the operator, and its tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gross_kernels.geometry import Geometry


@dataclass(frozen=True)
class Case:
    """One call of the operator: shapes, geometry, and the seed that its values are drawn with."""

    batch: int
    in_channels: int
    out_channels: int
    group_sizes: tuple[int, ...]
    kernel_size: tuple[int, int]
    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    active: int = 1
    gated: bool = False
    channels_last: bool = False
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        """Stride, padding and dilation, in the operator's order."""
        return Geometry(self.stride, self.padding, self.dilation)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """``[N, C_out, H', W']``."""
        h, w = (
            (i + 2 * p - d * (k - 1) - 1) // s + 1
            for i, k, s, p, d in zip(self.size, self.kernel_size, *self.geometry, strict=True)
        )
        return self.batch, self.out_channels, h, w

    def tensors(
        self, dtype: torch.dtype, terms_dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor]:
        """Input, terms, gates (None unless gated) and an output gradient, standard normal."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        terms_dtype = terms_dtype or dtype
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        input = draw(self.batch, self.in_channels, *self.size)
        terms = [draw(self.out_channels, s, *self.kernel_size) for s in self.group_sizes]
        gates = draw(len(terms)) if self.gated else None
        grad = draw(*self.output_shape)
        return (
            input.to(device, dtype, memory_format=memory_format),
            [term.to(device, terms_dtype) for term in terms],
            None if gates is None else gates.to(device, terms_dtype),
            grad.to(device, dtype, memory_format=memory_format),
        )
