"""The calls that a series convolution must serve, as hypothesis strategies."""

from itertools import accumulate
from operator import mul

from case import Case
from hypothesis import strategies as st


def pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    """Pairs of ints, equal or not."""
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def group_sizes(draw: st.DrawFn, most_terms: int = 5, most_channels: int = 36) -> tuple[int, ...]:
    """One to ``most_terms`` nested sizes, among them odd ones such as (3, 9, 18), (7, 28) and
    (11,)."""
    count = draw(st.integers(1, most_terms))
    first = draw(st.sampled_from([1, 2, 3, 1, 4, 2, 5, 7, 11]))
    factors = draw(st.lists(st.sampled_from([2, 3, 2, 4]), min_size=count - 1, max_size=count - 1))
    return tuple(s for s in accumulate([first, *factors], mul) if s <= most_channels)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Kernels of 1 to 5, square or not; stride and dilation to 3; padding to 7, beyond the kernel;
    unequal widths; images of 1 to 20 pixels a side; batches of 0 to 3."""
    sizes = draw(group_sizes())
    in_channels = sizes[-1] * draw(st.integers(1, max(1, 36 // sizes[-1])))
    out_channels = in_channels // sizes[0] * draw(st.integers(1, 3))
    kernel_size, stride, dilation = draw(pairs(1, 5)), draw(pairs(1, 3)), draw(pairs(1, 3))
    padding = draw(st.one_of(pairs(0, 2), pairs(0, 7)))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p)
        for k, d, p in zip(kernel_size, dilation, padding, strict=True)
    ]
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
