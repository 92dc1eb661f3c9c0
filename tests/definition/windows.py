"""Sum-pooling and structured kernels in float64, written from their definitions alone: what every
implementation is compared with. Shares no code with ``gross_kernels``."""

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from gross_kernels.pooling import Windows


def sum_pool(input: Tensor, windows: Windows) -> Tensor:
    """``out[n, (g, c), y, x] = Σ_{k,i,j} padded[n, (g, c + k), y·stride + i·dilation, …]``, term by
    term, in the input's dtype."""
    (deep, high, wide), groups, stride, padding, dilation = windows
    padded = F.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    padded = padded.unflatten(1, (groups, -1))
    channels = padded.shape[2] - deep + 1
    rows = (padded.shape[3] - dilation[0] * (high - 1) - 1) // stride[0] + 1
    columns = (padded.shape[4] - dilation[1] * (wide - 1) - 1) // stride[1] + 1
    output = padded.new_zeros(len(padded), groups, channels, rows, columns)
    for k, i, j in product(range(deep), range(high), range(wide)):
        y, x = i * dilation[0], j * dilation[1]
        output = (
            output
            + padded[
                :,
                :,
                k : k + channels,
                y : y + (rows - 1) * stride[0] + 1 : stride[0],
                x : x + (columns - 1) * stride[1] + 1 : stride[1],
            ]
        )
    return output.flatten(1, 2)


def cuboids(size: Sequence[int], structure: Sequence[int]) -> Tensor:
    """The patterns of structured kernels, ``[c·n·…, C, N, …]``: a cuboid of ones each."""
    patterns = []
    for corner in product(*map(range, structure)):
        pattern = torch.zeros(*size, dtype=torch.float64)
        places = zip(corner, size, structure, strict=True)
        pattern[tuple(slice(at, at + whole - small + 1) for at, whole, small in places)] = 1
        patterns.append(pattern)
    return torch.stack(patterns)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[tuple[int, ...], Windows]:
    """An input's shape and windows that fit it: channel windows to 19, images to 40 columns."""
    deep, groups = draw(st.sampled_from([1, 1, 2, 3, 4, 5, 7, 8, 19])), draw(st.integers(1, 3))
    pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
    window, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(window, dilation, padding, strict=True)
    ]
    channels = groups * (deep - 1 + draw(st.sampled_from([1, 2, 3, 16, 17])))
    size = (least[0] + draw(st.integers(0, 9)), least[1] + draw(st.integers(0, 40)))
    batch = draw(st.sampled_from([1, 2, 0]))
    return (batch, channels, *size), Windows((deep, *window), groups, stride, padding, dilation)
