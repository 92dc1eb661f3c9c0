"""The geometry of a convolution, what it makes of a size, and the checks that need no tensor."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch

#: Rows and columns.
Pair = Sequence[int]
COUNTED = {2: "a pair", 3: "a triple"}


class Geometry(NamedTuple):
    """Stride, padding and dilation, each for rows and columns (or depth, rows and columns);
    ``padding`` is what is added on each side. The operators take it flat, as ``*geometry``."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def numbers(self) -> tuple[int, ...]:
        """All six of them."""
        stride, padding, dilation = self
        return (*stride, *padding, *dilation)

    def output_size(self, input_size: Sequence[int], kernel_size: Sequence[int]) -> tuple[int, ...]:
        """Rows and columns of a convolution's output."""
        return tuple(
            (i + 2 * p - d * (k - 1) - 1) // s + 1
            for i, k, s, p, d in zip(input_size, kernel_size, *self, strict=True)
        )

    def check_fits(self, input_size: Sequence[int], kernel_size: Sequence[int]) -> None:
        """Check that the dilated kernel is not larger than the padded input.

        Raises:
            ValueError: if it is.
        """
        _, padding, dilation = self
        for axis, name in enumerate("DHW"[-len(kernel_size) :]):
            size = input_size[axis] + 2 * padding[axis]
            extent = dilation[axis] * (kernel_size[axis] - 1) + 1
            if size < extent:
                raise ValueError(
                    f"kernel_size: got {kernel_size[axis]} (dilated: {extent}) along "
                    f"{name}, accepted is at most the padded input size {size}"
                )


def same_padding(
    kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """(before, after) padding of rows and columns under which a convolution of stride 1 keeps the
    size; an odd total puts the larger half after, as ``torch.nn.Conv2d`` does."""
    totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def padded_size(input_size: Sequence[int], sides: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns of a map with what is added (before, after) them."""
    h, w = (size + sum(added) for size, added in zip(input_size, sides, strict=True))
    return h, w


#: How many times its pixels a map has with its padding at most for one pass over the padded map to
#: be faster than three that compute nothing on the border.
LARGEST_BORDER = 3


def pads_first(input_size: Sequence[int], sides: Sequence[tuple[int, int]]) -> bool:
    """Whether a layer that pads with other values than zeros pads its input, and computes its first
    pointwise on the border, too, or that pointwise's output: it has no bias, so they are the same.
    Arguments are those of :func:`padded_size`."""
    return math.prod(padded_size(input_size, sides)) <= LARGEST_BORDER * math.prod(input_size)


def first_size(
    input_size: Sequence[int], sides: Sequence[tuple[int, int]], padding_mode: str
) -> tuple[int, int]:
    """Rows and columns on which a layer computes its first pointwise. Arguments are those of
    :func:`padded_size`, and the layer's ``padding_mode``."""
    if padding_mode == "zeros":
        # The grouped convolution pads both sides alike; one more row or column comes first.
        return padded_size(input_size, [(0, after - before) for before, after in sides])
    return padded_size(input_size, sides if pads_first(input_size, sides) else ((0, 0), (0, 0)))


def integer(name: str, value: Any, least: int | None = None, accepted: str = "an int") -> int:
    """``value`` as an int: what can be an index is one (``numpy.int64``), a bool is not.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is less than ``least``. Both speak of the argument ``name``.
    """
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name}: got {value!r}, accepted is {accepted}")
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: got {value!r}, accepted is {accepted}") from None
    if least is not None and value < least:
        raise ValueError(f"{name}: got {value}, accepted is {accepted} of at least {least}")
    return value


def pair(name: str, value: int | Sequence[int], least: int = 1) -> tuple[int, int]:
    """An int or a pair of ints as a pair, each at least ``least``.

    Raises:
        TypeError: if they are no integers.
        ValueError: for another number of them, and for smaller ones. Both speak of ``name``.
    """
    if type(value) is int and value >= least:
        return value, value
    first, second = several(name, value, 2, least)
    return first, second


def several(name: str, value: int | Sequence[int], count: int, least: int = 1) -> tuple[int, ...]:
    """An int, or so many of them, as ``count`` ints. Raises as :func:`pair`."""
    values = (
        tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    )
    accepted = "an int" + ("" if count == 1 else f" or {COUNTED[count]} of ints")
    try:
        values = tuple([integer(name, each) for each in values])
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, accepted is {accepted}") from None
    if len(values) == 1:
        values *= count
    if len(values) != count or any(each < least for each in values):
        raise ValueError(f"{name}: got {value!r}, accepted is {accepted} of at least {least}")
    return values


@overload
def check_padding(padding: int | Pair | str, stride: tuple[int, int]) -> tuple[int, int] | str: ...
@overload
def check_padding(padding: int | Pair | str, stride: Pair) -> tuple[int, ...] | str: ...
def check_padding(padding: int | Pair | str, stride: Pair) -> tuple[int, ...] | str:
    """A padding in numbers as one for each axis of ``stride``, or the word that it is; "same" needs
    stride 1, as in torch."""
    if not isinstance(padding, str):
        return several("padding", padding, len(stride), least=0)
    if padding not in ("valid", "same"):
        raise ValueError(
            f"padding: got {padding!r}, accepted are 'valid', 'same', an int or "
            f"{COUNTED[len(stride)]} of ints"
        )
    if padding == "same" and any(s != 1 for s in stride):
        raise ValueError(f"padding: got 'same' with stride {tuple(stride)}, accepted is stride 1")
    return padding
