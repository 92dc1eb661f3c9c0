"""Ψ and the group-size series: the definition of everything that the kernels compute, in plain
torch.

Equations are those of "GroSS: Group-Size Series Decomposition for Grouped Architecture Search"
(ECCV 2020)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import integer

#: How many terms one series can have.
MAX_TERMS = 16


class Series(NamedTuple):
    """The residual weights of one grouped convolution, and which of them are summed how.

    Attributes:
        terms: ``[C_out, s_i, kh, kw]``, ascending group sizes; of one shape in a plain sum.
        active: n, how many leading terms are summed.
        gates: one scale per term, ``[N]``, or None for ones.
    """

    terms: Sequence[Tensor]
    active: int
    gates: Tensor | None = None

    @property
    def leading(self) -> Sequence[Tensor]:
        """The terms that are summed."""
        return self.terms[: self.active]


def block_starts(
    in_channels: int, out_channels: int, group_size: int, device: torch.device | str | None = None
) -> Tensor:
    """First input channel that each output channel reads at a group size: ``start_s(o) = (o //
    (C_out·s/C_in))·s``.

    Args:
        in_channels: ``C_in``, channels of the convolution's input.
        out_channels: ``C_out``; ``C_in / s`` groups must divide it.
        group_size: ``s``, input channels per group; must divide ``C_in``.
        device: where the result lies.

    Returns:
        int64 tensor of shape ``[C_out]``.
    """
    outputs_per_group = out_channels * group_size // in_channels
    return torch.arange(out_channels, device=device) // outputs_per_group * group_size


def check_group_sizes(
    group_sizes: Sequence[int], in_channels: int, out_channels: int, name: str = "group_sizes"
) -> tuple[int, ...]:
    """Check that group sizes nest: ascending, each divides the next, the last divides
    ``in_channels``, and ``in_channels / s`` groups divide ``out_channels``; at most 16 of them.

    Returns:
        The group sizes as a tuple.

    Raises:
        TypeError: if a group size is not an int.
        ValueError: if the group sizes do not nest. Both speak of the argument ``name``.
    """
    if not isinstance(group_sizes, Sequence):
        raise TypeError(f"{name}: got {group_sizes!r}, accepted is a sequence of ints")
    sizes = tuple(group_sizes)
    if not 1 <= len(sizes) <= MAX_TERMS:
        raise ValueError(f"{name}: got {len(sizes)} group sizes, accepted are 1 to {MAX_TERMS}")
    sizes = tuple([integer(name, s, accepted="a sequence of ints") for s in sizes])
    for s in sizes:
        if s < 1 or in_channels < 1 or in_channels % s:
            raise ValueError(
                f"{name}: got group size {s} in {sizes}, accepted are divisors of the input width "
                f"{in_channels}"
            )
        if out_channels % (in_channels // s):
            raise ValueError(
                f"{name}: got group size {s} in {sizes}, which makes {in_channels // s} groups; "
                f"accepted are sizes whose number of groups divides the output width {out_channels}"
            )
    for smaller, larger in itertools.pairwise(sizes):
        if larger <= smaller or larger % smaller:
            raise ValueError(
                f"{name}: got group size {smaller} before {larger} in {sizes}, accepted are "
                "ascending sizes of which each divides the next"
            )
    return sizes


def powers_of_two(in_channels: int, out_channels: int) -> tuple[int, ...]:
    """All powers of two that are group sizes of a convolution with these widths, ascending.

    Where the smallest of them would make more groups than divide ``out_channels``, it is left out;
    where none is left (``out_channels`` shares no such divisor), the one size ``in_channels`` (a
    dense convolution) is returned."""
    sizes = []
    s = 1
    while s <= in_channels and in_channels % s == 0:
        if out_channels % (in_channels // s) == 0:
            sizes.append(s)
        s *= 2
    return tuple(sizes) or (in_channels,)


def expand(weight: Tensor, to_group_size: int, in_channels: int) -> Tensor:
    """Ψ (equation 4): the weight of a grouped convolution, rewritten as the same operator at a
    larger group size.

    Args:
        weight: ``[C_out, g, kh, kw]``, the weight of a convolution with ``in_channels / g`` groups.
        to_group_size: ``h ≥ g``; ``g`` divides ``h`` and ``h`` divides ``in_channels``.
        in_channels: channels of the convolution's input.

    Returns:
        ``[C_out, h, kh, kw]`` of the same dtype, zero outside the smaller blocks. Differentiable.

    Raises:
        TypeError: if the weight is not a tensor or the others are not ints.
        ValueError: if the weight is not four-dimensional or the sizes do not nest.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, accepted is a Tensor")
    if weight.dim() != 4:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, accepted is [C_out, group size, kh, kw]"
        )
    in_channels = integer("in_channels", in_channels, 1)
    to_group_size = integer("to_group_size", to_group_size)
    out_channels, group_size = weight.shape[:2]
    check_group_sizes((to_group_size,), in_channels, out_channels, "to_group_size")
    if group_size == to_group_size:
        return weight
    check_group_sizes((group_size, to_group_size), in_channels, out_channels, "to_group_size")
    columns = _block_columns(in_channels, out_channels, group_size, to_group_size, weight.device)
    expanded = weight.new_zeros(out_channels, to_group_size, *weight.shape[2:])
    return expanded.scatter(1, columns.expand(-1, -1, *weight.shape[2:]), weight)


def restrict(weight: Tensor, to_group_size: int, in_channels: int) -> Tensor:
    """The adjoint of Ψ: the entries of ``weight`` ``[C_out, h, kh, kw]`` that a weight of group
    size g ≤ h expands to.

    Returns:
        ``[C_out, g, kh, kw]``; ``⟨Ψ(v), w⟩ = ⟨v, restrict(w)⟩`` for every ``v``, so this turns the
        gradient of an expanded weight into the gradient of a term.
    """
    out_channels, group_size = weight.shape[:2]
    columns = _block_columns(in_channels, out_channels, to_group_size, group_size, weight.device)
    return weight.gather(1, columns.expand(-1, -1, *weight.shape[2:]))


def _block_columns(
    in_channels: int, out_channels: int, group_size: int, within: int, device: torch.device
) -> Tensor:
    """Position of each entry of a weight of ``group_size`` inside the block of size ``within``:
    ``[C_out, group_size, 1, 1]``."""
    starts = block_starts(in_channels, out_channels, group_size, device) % within
    return (starts[:, None] + torch.arange(group_size, device=device))[:, :, None, None]


def sum_terms(series: Series, in_channels: int) -> Tensor:
    """``R_n = Σ_{i≤n} gate_i Ψ(r_i)`` (equation 5) in the terms' dtype.

    Args:
        series: the terms, how many of them, and their gates.
        in_channels: channels of the convolution's input.

    Returns:
        ``[C_out, s_n, kh, kw]``. Differentiable.
    """
    to = series.leading[-1].shape[1]
    expanded = [expand(term, to, in_channels) for term in series.leading]
    if series.gates is not None:
        expanded = [weight * series.gates[i].to(weight.dtype) for i, weight in enumerate(expanded)]
    return torch.stack(expanded).sum(0)


def residuals(weights: Sequence[Tensor], in_channels: int) -> list[Tensor]:
    """Equation 6: independent grouped weights, one per group size, as the terms of a series.

    ``r_1 = R_1`` and ``r_i = R_i − Ψ(R_{i−1})``, so that summing the first i terms gives ``R_i``
    back."""
    first, *rest = weights
    return [first] + [
        weight - expand(smaller, weight.shape[1], in_channels)
        for smaller, weight in zip(weights[:-1], rest, strict=True)
    ]


def convolution_macs(
    out_channels: int,
    group_size: int,
    kernel_size: Sequence[int],
    out_size: Sequence[int],
    bias: bool = False,
) -> int:
    """Multiply–accumulates of one grouped convolution for one image, with one more per output
    element for a bias."""
    kh, kw = kernel_size
    h, w = out_size
    return out_channels * h * w * (group_size * kh * kw + bias)
