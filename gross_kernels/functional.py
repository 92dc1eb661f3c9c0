"""The function that users call: the series convolution with its arguments checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, ops
from .backends import reference
from .series import check_group_sizes, same_padding

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
    zero gradients.

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
    arguments = _checked(input, terms, active, stride, padding, dilation, gates)
    output = apply(*arguments)
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
    input, terms, count, _, stride, padding, dilation = _checked(
        input, terms, active, stride, padding, dilation, gates
    )
    choice = dispatch.choose(dispatch.Call.of(input, terms, int(count), stride, padding, dilation))
    return f"{choice.name}: {choice.reason}"


Checked = tuple[
    Tensor, list[Tensor], Tensor, Tensor | None, tuple[int, int], tuple[int, int], tuple[int, int]
]


def _checked(
    input: Tensor,
    terms: Iterable[Tensor],
    active: int | Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    gates: Tensor | None,
) -> Checked:
    """The operator's arguments, in its order, from the user's."""
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    terms = _check_terms(terms)
    kernel_size = tuple(terms[0].shape[2:])
    if isinstance(padding, str):
        check_padding_mode(padding, stride)
    else:
        padding = pair("padding", padding, least=0)
    check_input(input, terms[0])
    check_group_sizes(
        [term.shape[1] for term in terms], input.shape[-3], terms[0].shape[0], "terms"
    )
    check_gates(gates, terms)
    active = _host_active(active, len(terms))
    input, padding = explicit_padding(input, kernel_size, padding, dilation)
    check_fits(input, kernel_size, padding, dilation)
    return (
        input if input.dim() == 4 else input.unsqueeze(0),
        terms,
        active,
        gates,
        stride,
        padding,
        dilation,
    )


def apply(
    input: Tensor,
    terms: list[Tensor],
    active: Tensor,
    gates: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Run the operator, or the backend that is forced in its place, on checked four-dimensional
    arguments."""
    forced = dispatch.forced_backend()
    if forced == "reference":
        return reference.forward(input, terms, int(active), gates, stride, padding, dilation)
    if forced is not None and input.device.type != "cuda":
        # On CUDA the operator asks, and knows the value of `active` even in a compiled graph.
        dispatch.choose(dispatch.Call.of(input, terms, len(terms), stride, padding, dilation))
    return ops.call(
        torch.ops.gross.series_conv2d.default,
        input,
        terms,
        active,
        gates,
        stride,
        padding,
        dilation,
    )


def series_sum(terms: list[Tensor], active: Tensor, gates: Tensor | None) -> Tensor:
    """``Σ_{i≤n} gate_i t_i`` (equation 5 for P and Q), by the operator or by the backend that is
    forced."""
    if dispatch.forced_backend() == "reference":
        return reference.series_sum(terms, int(active), gates)
    return ops.call(torch.ops.gross.series_sum.default, terms, active, gates)


def pair(name: str, value: int | Sequence[int], least: int = 1) -> tuple[int, int]:
    """An int or a pair of ints as a pair, each at least ``least``; raises TypeError or ValueError
    naming ``name``."""
    values = (
        tuple(value)
        if isinstance(value, Sequence) and not isinstance(value, str)
        else (value, value)
    )
    if len(values) == 1:
        values *= 2
    if any(isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)) for v in values):
        raise TypeError(f"{name}: got {value!r}, accepted is an int or a pair of ints")
    if len(values) != 2 or any(v < least for v in values):
        raise ValueError(
            f"{name}: got {value!r}, accepted is an int or a pair of ints of at least {least}"
        )
    return values


def check_padding_mode(padding: str, stride: Sequence[int]) -> None:
    """Check a padding given as a word; "same" needs stride 1, as in torch."""
    if padding not in ("valid", "same"):
        raise ValueError(
            f"padding: got {padding!r}, accepted are 'valid', 'same', an int or a pair of ints"
        )
    if padding == "same" and any(s != 1 for s in stride):
        raise ValueError(f"padding: got 'same' with stride {tuple(stride)}, accepted is stride 1")


def explicit_padding(
    input: Tensor,
    kernel_size: Sequence[int],
    padding: tuple[int, int] | str,
    dilation: Sequence[int],
) -> tuple[Tensor, tuple[int, int]]:
    """The padding in numbers. Where "same" needs one more zero after than before, the input is
    padded by that one."""
    if padding == "valid":
        return input, (0, 0)
    if isinstance(padding, str):
        (top, bottom), (left, right) = same_padding(kernel_size, dilation)
        if top != bottom or left != right:
            input = F.pad(input, (0, right - left, 0, bottom - top))
        return input, (top, left)
    return input, padding


def check_input(input: Tensor, weight: Tensor) -> None:
    """Check an input's type, dimensions, device and dtype against a layer's weight."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: got {type(input).__name__}, accepted is a Tensor")
    if input.dim() not in (3, 4):
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, accepted is [N, C_in, H, W] or [C_in, H, W]"
        )
    if input.dtype not in DTYPES:
        raise TypeError(
            f"input: got {input.dtype}, accepted are float32, float64, float16 and bfloat16"
        )
    if input.device != weight.device:
        raise ValueError(
            f"input: got device {input.device}, accepted is the terms' device {weight.device}"
        )
    if input.dtype == weight.dtype or (weight.dtype == torch.float32 and input.dtype.itemsize == 2):
        return
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and torch.float64 not in (input.dtype, weight.dtype):
        return
    raise TypeError(
        f"input: got {input.dtype} with terms of {weight.dtype}, accepted are equal dtypes, or float32 terms with a "
        "float16 or bfloat16 input"
    )


def check_fits(
    input: Tensor, kernel_size: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    """Check that the dilated kernel is not larger than the padded input."""
    for axis in (0, 1):
        size = input.shape[axis - 2] + 2 * padding[axis]
        extent = dilation[axis] * (kernel_size[axis] - 1) + 1
        if size < extent:
            raise ValueError(
                f"kernel_size: got {kernel_size[axis]} (dilated: {extent}) along {'HW'[axis]}, accepted is at most the "
                f"padded input size {size}"
            )


def _check_terms(terms: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(terms, Tensor) or not isinstance(terms, Iterable):
        raise TypeError(f"terms: got {type(terms).__name__}, accepted is a sequence of Tensors")
    terms = list(terms)
    if not terms:
        raise ValueError("terms: got none, accepted is at least one")
    for i, term in enumerate(terms):
        if not isinstance(term, Tensor):
            raise TypeError(f"terms[{i}]: got {type(term).__name__}, accepted is a Tensor")
        if term.dim() != 4 or 0 in term.shape:
            raise ValueError(
                f"terms[{i}]: got shape {tuple(term.shape)}, accepted is [C_out, group size, kh, kw]"
            )
    first = terms[0]
    for i, term in enumerate(terms):
        if term.shape[0] != first.shape[0] or term.shape[2:] != first.shape[2:]:
            raise ValueError(
                f"terms[{i}]: got shape {tuple(term.shape)}, accepted is that of terms[0], {tuple(first.shape)}, up to "
                "the group size"
            )
        if term.dtype != first.dtype:
            raise TypeError(
                f"terms[{i}]: got {term.dtype}, accepted is that of terms[0], {first.dtype}"
            )
        if term.device != first.device:
            raise ValueError(
                f"terms[{i}]: got device {term.device}, accepted is that of terms[0], {first.device}"
            )
    return terms


def check_gates(gates: Tensor | None, terms: Sequence[Tensor]) -> None:
    """Check the gates' type, shape, dtype and device against the terms that they scale."""
    if gates is None:
        return
    if not isinstance(gates, Tensor):
        raise TypeError(
            f"gates: got {type(gates).__name__}, accepted is a Tensor of shape [{len(terms)}] or None"
        )
    if gates.shape != (len(terms),):
        raise ValueError(
            f"gates: got shape {tuple(gates.shape)}, accepted is one per term, [{len(terms)}]"
        )
    if gates.dtype not in (terms[0].dtype, torch.float32):
        raise TypeError(
            f"gates: got {gates.dtype}, accepted are the terms' {terms[0].dtype} and float32"
        )
    if gates.device != terms[0].device:
        raise ValueError(
            f"gates: got device {gates.device}, accepted is the terms' {terms[0].device}"
        )


def _host_active(active: int | Tensor | None, count: int) -> Tensor:
    """``active`` as the operator takes it: a 0-dimensional int64 tensor on the host."""
    if active is None:
        active = count
    if isinstance(active, Tensor):
        if active.dtype != torch.int64 or active.dim() != 0 or active.device.type != "cpu":
            raise TypeError(
                f"active: got a tensor of {active.dtype}, shape {tuple(active.shape)} on {active.device}, "
                "accepted is a 0-dimensional int64 tensor on the CPU"
            )
        # Inside a compiled graph the value is not known; the kernel checks it there.
        if torch.compiler.is_compiling() or 1 <= int(active) <= count:
            return active
        active = int(active)
    elif isinstance(active, bool) or not isinstance(active, int):
        raise TypeError(
            f"active: got {active!r}, accepted is an int, a 0-dimensional int64 tensor or None"
        )
    if not 1 <= active <= count:
        raise ValueError(f"active: got {active}, accepted is 1 to {count}, the number of terms")
    return torch.tensor(active, dtype=torch.int64, device="cpu")
