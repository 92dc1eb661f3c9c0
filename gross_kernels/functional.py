"""The function that users call: the series convolution with its arguments checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .backends import reference
from .call import Call
from .checks import check_active, check_gates, check_input, check_terms
from .geometry import Geometry, check_padding, pair, same_padding
from .library import call
from .series import Series, check_group_sizes


def series_conv2d(
    input: Tensor,
    terms: Sequence[Tensor],
    active: int | Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    gates: Tensor | None = None,
) -> Tensor:
    """Grouped convolution with a series of residual weights, ``R_n = Σ_{i≤n} gate_i Ψ(r_i)``
    (equations 4 and 5).

    The convolution runs at the group size of the last active term. Nothing expanded or summed is
    written to memory. Differentiable (twice) in input, terms and gates; terms beyond ``active`` get
    zero gradients. Forward mode and ``torch.func``'s transforms work, too: under them, this
    function and the layers run by their definition in PyTorch's own operators, which is slower;
    ``vmap`` over the input alone folds into the batch and stays fast.

    Args:
        input: ``[N, C_in, H, W]`` or ``[C_in, H, W]``, contiguous or channels-last; the output has
            the same memory format.
        terms: ``[C_out, s_i, kh, kw]`` each, group sizes ascending, each dividing the next, the
            last dividing ``C_in``. They have the input's dtype, or are float32 with a 16-bit input
            (summed in float32, cast once).
        active: n, how many leading terms are summed: an int from 1 to N, a 0-dimensional int64
            tensor on the CPU (one compiled graph then serves every value), or None for all.
        stride, padding, dilation: as in :func:`torch.nn.functional.conv2d`; padding may be "valid"
            or "same".
        gates: one scale per term, ``[N]``, of the terms' dtype or float32.

    Returns:
        ``[N, C_out, H', W']`` (``[C_out, H', W']``) of the input's dtype.

    Raises:
        TypeError: for arguments of a wrong type or dtype.
        ValueError: for shapes, group sizes, devices or an ``active`` that do not fit.
    """
    output = apply(*_checked(input, terms, active, stride, padding, dilation, gates))
    return output if input.dim() == 4 else output.squeeze(0)


def explain(
    input: Tensor,
    terms: Sequence[Tensor],
    active: int | Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    gates: Tensor | None = None,
) -> str:
    """One sentence: which backend serves this call of :func:`series_conv2d`, and why. Arguments and
    errors are its."""
    input, terms, count, gates, geometry = _checked(
        input, terms, active, stride, padding, dilation, gates
    )
    choice = dispatch.choose(Call.of(input, Series(terms, int(count), gates), geometry))
    return f"{choice.name}: {choice.reason}"


def _checked(
    input: Tensor,
    terms: Iterable[Tensor],
    active: int | Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    gates: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None, Geometry]:
    """The arguments of :func:`apply` from the user's."""
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    padding = check_padding(padding, stride)
    terms = check_terms(terms)
    kernel_size = terms[0].shape[2:]
    check_input(input, terms[0])
    check_group_sizes(
        [term.shape[1] for term in terms], input.shape[-3], terms[0].shape[0], "terms"
    )
    check_gates(gates, terms)
    active = check_active(active, len(terms))
    input, padding = explicit_padding(input, kernel_size, padding, dilation)
    geometry = Geometry(stride, padding, dilation)
    geometry.check_fits(input.shape[-2:], kernel_size)
    return input if input.dim() == 4 else input.unsqueeze(0), terms, active, gates, geometry


def apply(
    input: Tensor,
    terms: Sequence[Tensor],
    active: Tensor,
    gates: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Run the operator, or the backend that is forced in its place, on checked four-dimensional
    arguments."""
    forced = dispatch.forced_backend()
    if forced == "reference":
        return reference.forward(input, Series(terms, int(active), gates), geometry)
    if forced is not None and input.device.type != "cuda":
        # On CUDA the operator asks, and knows the value of `active` even in a compiled graph.
        dispatch.choose(Call.of(input, Series(terms, len(terms), gates), geometry))
    return call(torch.ops.gross.series_conv2d.default, input, terms, active, gates, *geometry)


def series_sum(terms: Sequence[Tensor], active: Tensor, gates: Tensor | None) -> Tensor:
    """``Σ_{i≤n} gate_i t_i`` (equation 5 for P and Q), by the operator or by the backend that is
    forced."""
    if dispatch.forced_backend() == "reference":
        return reference.series_sum(Series(terms, int(active), gates))
    return call(torch.ops.gross.series_sum.default, terms, active, gates)


def explicit_padding(
    input: Tensor,
    kernel_size: Sequence[int],
    padding: tuple[int, int] | str,
    dilation: Sequence[int],
) -> tuple[Tensor, tuple[int, int]]:
    """The padding in numbers. Where "same" needs one more zero after than before, the input is
    padded by that one."""
    if not isinstance(padding, str):
        return input, padding
    if padding == "valid":
        return input, (0, 0)
    (top, bottom), (left, right) = same_padding(kernel_size, dilation)
    if top != bottom or left != right:
        input = F.pad(input, (0, right - left, 0, bottom - top))
    return input, (top, left)
