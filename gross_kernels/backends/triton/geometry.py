"""What a kernel has to know of a call, worked out once on the host: axes, packs of groups, memory
layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Axis(NamedTuple):
    """Rows or columns of a convolution, or of its transpose, as correlations along evenly spaced
    lines.

    In phase f = (r, s, k) the t-th result is ``Σ_{i < taps} source[s + (t·advance + i)·source_step]
    · weight[k + i·tap_step]`` and stands at ``r + t·result_step``. Outside the source are zeros;
    taps that the kernel does not have count as zero. One phase serves a convolution without
    dilation; the transpose of one with stride 2 has two."""

    taps: int
    advance: int
    source_step: int
    result_step: int
    tap_step: int
    phases: tuple[tuple[int, int, int], ...]

    def steps(self, size: int) -> int:
        """Results of the longest phase among ``size`` results."""
        return -(-size // self.result_step)


def axis(taps: int, stride: int, padding: int, dilation: int, transposed: bool) -> Axis:
    """The axis of a convolution: a result is an output, a source an input; ``transposed`` the other
    way round.

    Tap i joins input ``y·stride − padding + i·dilation`` and output y. Lines are chosen so that the
    sources of one tap and of the next are neighbours on the line, whatever stride and dilation have
    in common."""
    common = math.gcd(stride, dilation)
    lines, advance = dilation // common, stride // common
    if not transposed:
        phases = tuple((line, line * stride - padding, 0) for line in range(lines))
        return Axis(taps, advance, dilation, lines, 1, phases)
    # Input x = φ + stride·(…) is joined to outputs by every advance-th tap, beginning with the
    # first that fits.
    some = -(-taps // advance)
    phases = ()
    for line in range(lines):
        for phi in range(stride):
            fits = (i for i in range(advance) if (phi + padding - i * dilation) % stride == 0)
            first = next(fits, taps)
            source = (phi + padding - first * dilation) // stride + line - lines * (some - 1)
            phases += ((phi + stride * line, source, first + advance * (some - 1)),)
    return Axis(some, 1, lines, stride * lines, -advance, phases)


def flat(*axes: Axis) -> tuple[tuple[int, ...], ...]:
    """The axes without their phases, then the phases of each, every one a tuple of ints: Triton 3.5
    takes no nested constants."""
    return *(line[:-1] for line in axes), *(
        tuple(n for phase in line.phases for n in phase) for line in axes
    )


class Packs(NamedTuple):
    """How groups are laid on the matrix unit's tile: so many neighbouring groups to a pack that its
    channels fit the tile; where one group's channels do not, the pack has several parts.

    Attributes:
        source, result: channels of a pack.
        number: packs of the convolution.
    """

    source: int
    result: int
    number: int

    @classmethod
    def of(cls, source_channels: int, result_channels: int, groups: int, tile: int) -> Packs:
        """Packs of as many groups as ``tile`` channels hold on both sides, one group at least."""
        source, result = source_channels // groups, result_channels // groups
        together = min(max(1, tile // max(source, result)), groups)
        return cls(source * together, result * together, -(-groups // together))


def channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a term is dense in channels-last order."""
    _, size, height, width = shape
    return tuple(stride) == (size * height * width, 1, width * size, size)
