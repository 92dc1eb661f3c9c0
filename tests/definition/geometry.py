"""The calls that a series convolution must serve, as hypothesis strategies."""

from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from hypothesis import strategies as st
from torch import Tensor


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
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Stride, padding and dilation, in the operator's order."""
        return self.stride, self.padding, self.dilation

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


def pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    """Pairs of ints, equal or not."""
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def group_sizes(draw: st.DrawFn, most_terms: int = 5, most_channels: int = 36) -> tuple[int, ...]:
    """One to ``most_terms`` nested sizes, among them odd ones such as (3, 9, 18), (7, 28) and (11,)."""
    count = draw(st.integers(1, most_terms))
    first = draw(st.sampled_from([1, 2, 3, 1, 4, 2, 5, 7, 11]))
    factors = draw(st.lists(st.sampled_from([2, 3, 2, 4]), min_size=count - 1, max_size=count - 1))
    return tuple(s for s in accumulate([first, *factors], mul) if s <= most_channels)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Kernels of 1 to 5, square or not; stride and dilation to 3; padding to 7, beyond the kernel; unequal widths;
    images of 1 to 20 pixels a side; batches of 0 to 3."""
    sizes = draw(group_sizes())
    in_channels = sizes[-1] * draw(st.integers(1, max(1, 36 // sizes[-1])))
    out_channels = in_channels // sizes[0] * draw(st.integers(1, 3))
    kernel_size, stride, dilation = draw(pairs(1, 5)), draw(pairs(1, 3)), draw(pairs(1, 3))
    padding = draw(st.one_of(pairs(0, 2), pairs(0, 7)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel_size, dilation, padding, strict=True)]
    return Case(
        batch=draw(st.sampled_from([1, 2, 3, 1, 2, 3, 1, 2, 3, 0])),
        in_channels=in_channels,
        out_channels=out_channels,
        group_sizes=sizes,
        kernel_size=kernel_size,
        size=(draw(st.integers(least[0], 20)), draw(st.integers(least[1], 20))),
        stride=stride,
        padding=padding,
        dilation=dilation,
        active=draw(st.integers(1, len(sizes))),
        gated=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
