"""The series convolution as its definition reads: sum the expanded terms, then call torch. Any
dtype, any device.

Every kernel is tested against this module; it is never optimised. 16-bit calls are computed in
float32 and rounded once: torch's own bfloat16 weight gradient on the CPU reads memory that nobody
wrote where the image is narrower than the kernel (torch 2.10 and 2.15)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..call import Call
from ..geometry import Geometry
from ..series import Series, restrict, sum_terms


def supports(call: Call) -> bool:
    """The reference serves every call."""
    return True


def forward(input: Tensor, series: Series, geometry: Geometry) -> Tensor:
    """Grouped convolution of ``input`` with ``R_n = Σ gate_i Ψ(r_i)`` (equations 4 and 5), ``[N,
    C_out, H', W']``.

    The terms are summed in their own dtype, float32 at least, and cast once to the input's.
    Differentiable."""
    weight = _weight(input, series)
    wide_input, wide_weight = _widened([input, weight])
    output = F.conv2d(wide_input, wide_weight, None, *_arguments(geometry, input, weight))
    return output.to(input.dtype)


def input_grad(grad: Tensor, input: Tensor, series: Series, geometry: Geometry) -> Tensor:
    """Gradient with respect to the input, of the input's shape and dtype. Differentiable."""
    if grad.numel() == 0:
        return torch.zeros_like(input)
    weight = _weight(input, series)
    wide_weight, wide_grad = _widened([weight, grad])
    arguments = _arguments(geometry, input, weight)
    return conv2d_input(input.shape, wide_weight, wide_grad, *arguments).to(input.dtype)


def weight_grad(
    grad: Tensor, input: Tensor, series: Series, geometry: Geometry
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients with respect to every term and to the gates (None without gates); zero beyond
    ``active``. Differentiable."""
    terms, active, gates = series
    grad_terms = [torch.zeros_like(term) for term in terms]
    if grad.numel() == 0:
        return grad_terms, None if gates is None else torch.zeros_like(gates)
    input, grad, *wide = _widened([input, grad, *series.leading])
    arguments = _arguments(geometry, input, wide[-1])
    weight = conv2d_weight(input, wide[-1].shape, grad, *arguments)
    parts = [restrict(weight, term.shape[1], input.shape[1]) for term in wide]
    if gates is None:
        return [part.to(terms[0].dtype) for part in parts] + grad_terms[active:], None
    scaled = [(part * gate).to(terms[0].dtype) for part, gate in zip(parts, gates, strict=False)]
    shares = [(part * term).sum() for part, term in zip(parts, wide, strict=True)]
    shares += [shares[0].new_zeros(())] * (len(terms) - active)
    return scaled + grad_terms[active:], torch.stack(shares).to(gates.dtype)


def series_sum(series: Series) -> Tensor:
    """``Σ_{i≤n} gate_i t_i`` of terms of one shape (equation 5 for P and Q). Differentiable."""
    _, active, gates = series
    chosen = torch.stack(list(series.leading))
    if gates is not None:
        chosen = chosen * gates[:active].to(chosen.dtype).reshape(-1, *[1] * (chosen.dim() - 1))
    return chosen.sum(0)


def _weight(input: Tensor, series: Series) -> Tensor:
    """The summed weight in the input's dtype."""
    wide = series._replace(terms=_widened(series.terms))
    return sum_terms(wide, input.shape[1]).to(input.dtype)


def _widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.float() if tensor.dtype.itemsize == 2 else tensor for tensor in tensors]


def _arguments(geometry: Geometry, input: Tensor, weight: Tensor) -> tuple:
    """Stride, padding, dilation and the number of groups, as torch's convolutions take them."""
    return (*map(tuple, geometry), input.shape[1] // weight.shape[1])
