"""Ψ and the group-size series, against the paper's equations and against plain grouped
convolutions."""

import exact
import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from geometry import group_sizes, pairs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gross_kernels import expand
from gross_kernels.geometry import Geometry, same_padding
from gross_kernels.series import (
    Series,
    block_starts,
    check_group_sizes,
    convolution_macs,
    powers_of_two,
    residuals,
    restrict,
    sum_terms,
)


@st.composite
def series(draw: st.DrawFn) -> tuple[int, int, list[Tensor]]:
    """Input channels, output channels and float64 weights of nested group sizes."""
    sizes = draw(group_sizes(most_channels=24))
    in_channels = sizes[-1] * draw(st.integers(1, 3))
    out_channels = in_channels // sizes[0] * draw(st.integers(1, 3))
    kernel_size = draw(pairs(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = [(out_channels, s, *kernel_size) for s in sizes]
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return in_channels, out_channels, weights


def test_block_starts_by_hand() -> None:
    """Catches group boundaries that move when input and output widths differ."""
    assert block_starts(4, 4, 1).tolist() == [0, 1, 2, 3]
    assert block_starts(4, 8, 2).tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert block_starts(6, 3, 2).tolist() == [0, 2, 4]
    assert block_starts(6, 4, 6).tolist() == [0, 0, 0, 0]


def test_expand_by_hand() -> None:
    """Catches a depthwise weight that is not put on the diagonal of its larger blocks (the paper's
    figure 2)."""
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1, 1)
    assert expand(weight, 2, 4).flatten(1).tolist() == [[1, 0], [0, 2], [3, 0], [0, 4]]
    assert expand(weight, 4, 4).flatten(1).tolist() == torch.diag(weight.flatten()).tolist()
    assert expand(weight, 1, 4) is weight


@given(series=series(), data=st.data())
def test_equation_4(series: tuple[int, int, list[Tensor]], data: st.DataObject) -> None:
    """Catches an expanded weight that is another operator: W *_g F ≡ Ψ(W) *_h F."""
    in_channels, _, weights = series
    small = data.draw(st.integers(0, len(weights) - 1))
    group_size = weights[data.draw(st.integers(small, len(weights) - 1))].shape[1]
    input = torch.randn(2, in_channels, 4, 5, dtype=torch.float64)
    expanded = expand(weights[small], group_size, in_channels)
    assert torch.count_nonzero(expanded) == torch.count_nonzero(weights[small])
    torch.testing.assert_close(
        F.conv2d(input, expanded, groups=in_channels // group_size),
        F.conv2d(input, weights[small], groups=in_channels // weights[small].shape[1]),
        rtol=0,
        atol=1e-12,
    )


@given(series=series())
def test_expand_composes(series: tuple[int, int, list[Tensor]]) -> None:
    """Catches an expansion in two steps that differs from the one in a single step."""
    in_channels, _, weights = series
    largest = weights[-1].shape[1]
    for middle in weights:
        stepwise = expand(expand(weights[0], middle.shape[1], in_channels), largest, in_channels)
        assert torch.equal(stepwise, expand(weights[0], largest, in_channels))


@given(series=series())
def test_restrict_is_the_adjoint(series: tuple[int, int, list[Tensor]]) -> None:
    """Catches a gradient of a term that is gathered from other places than the term is scattered
    to."""
    in_channels, _, weights = series
    small, large = weights[0], weights[-1]
    expanded = expand(small, large.shape[1], in_channels)
    restricted = restrict(large, small.shape[1], in_channels)
    torch.testing.assert_close(
        (expanded * large).sum(), (small * restricted).sum(), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(restrict(expanded, small.shape[1], in_channels), small)


@given(series=series(), gated=st.booleans())
def test_sum_of_terms(series: tuple[int, int, list[Tensor]], gated: bool) -> None:
    """Catches a sum in which a term is left out, counted twice, unscaled, or expanded to another
    size."""
    in_channels, out_channels, terms = series
    gates = torch.randn(len(terms), dtype=torch.float64) if gated else None
    for active in range(1, len(terms) + 1):
        total = sum_terms(Series(terms, active, gates), in_channels)
        assert total.shape == terms[active - 1].shape
        channels = exact.input_channels(in_channels, out_channels, total.shape[1])
        dense = exact.dense_weight(terms, active, gates, in_channels)
        torch.testing.assert_close(
            total, dense[torch.arange(out_channels)[:, None], channels], rtol=0, atol=1e-13
        )


@given(series=series())
def test_residuals_give_the_weights_back(series: tuple[int, int, list[Tensor]]) -> None:
    """Catches residuals against another weight than the one before (equation 6 undoes equation
    5)."""
    in_channels, _, weights = series
    terms = residuals(weights, in_channels)
    assert torch.equal(terms[0], weights[0])
    for active, weight in enumerate(weights, 1):
        torch.testing.assert_close(
            sum_terms(Series(terms, active), in_channels), weight, rtol=0, atol=1e-13
        )


def test_expand_and_restrict_are_differentiable() -> None:
    """Catches an operation in place that cuts the graph."""
    small = torch.randn(8, 2, 3, 1, dtype=torch.float64, requires_grad=True)
    large = torch.randn(8, 4, 3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda weight: expand(weight, 4, 8), small)
    assert torch.autograd.gradcheck(lambda weight: restrict(weight, 2, 8), large)


@given(st.integers(1, 64), st.integers(1, 64))
def test_powers_of_two(in_channels: int, out_channels: int) -> None:
    """Catches a size that is missing, not a power of two, or makes more groups than divide the
    output width."""
    sizes = powers_of_two(in_channels, out_channels)
    assert check_group_sizes(sizes, in_channels, out_channels) == sizes
    possible = [
        2**i
        for i in range(7)
        if in_channels % 2**i == 0 and out_channels % (in_channels // 2**i) == 0
    ]
    assert sizes == (tuple(possible) or (in_channels,))


@pytest.mark.parametrize(
    ("widths", "sizes"),
    [
        ((64, 64), (1, 2, 4, 8, 16, 32, 64)),
        ((12, 12), (1, 2, 4)),
        ((8, 4), (2, 4, 8)),
        ((6, 4), (3, 6)),
        ((7, 3), (7,)),
    ],
)
def test_accepted_sizes(widths: tuple[int, int], sizes: tuple[int, ...]) -> None:
    """Catches a nesting rule that is too strict."""
    assert check_group_sizes(list(sizes), *widths) == sizes


@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 4),
    dilation=st.integers(1, 3),
    size=st.integers(13, 20),
)
def test_sizes_and_macs(kernel: int, stride: int, padding: int, dilation: int, size: int) -> None:
    """Catches an output size or a MAC count that differs from torch's convolution."""
    counted = torch.utils.flop_counter.FlopCounterMode(display=False)
    with counted, torch.device("meta"):
        output = F.conv2d(
            torch.empty(1, 6, size, size),
            torch.empty(4, 3, kernel, kernel),
            None,
            stride,
            padding,
            dilation,
            2,
        )
    geometry = Geometry((stride,) * 2, (padding,) * 2, (dilation,) * 2)
    computed = geometry.output_size((size, size), (kernel,) * 2)
    assert computed == output.shape[2:]
    assert 2 * convolution_macs(4, 3, (kernel, kernel), computed) == counted.get_total_flops()
    assert (
        convolution_macs(4, 3, (kernel, kernel), computed, True) * 2
        == counted.get_total_flops() + 2 * output.numel()
    )


@given(pairs(1, 5), pairs(1, 3))
def test_same_padding_keeps_the_size(
    kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> None:
    """Catches a size that is not kept, and an odd zero before where torch puts it after."""
    for (before, after), k, d in zip(
        same_padding(kernel_size, dilation), kernel_size, dilation, strict=True
    ):
        assert before + after == d * (k - 1)
        assert after - before in (0, 1)
