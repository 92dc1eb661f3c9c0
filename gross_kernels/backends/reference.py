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

from ..series import restrict, sum_terms


def supports(call: object) -> bool:
    """The reference serves every call."""
    return True


def forward(
    input: Tensor,
    terms: Sequence[Tensor],
    active: int,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Grouped convolution of ``input`` with ``R_n = Σ gate_i Ψ(r_i)`` (equations 4 and 5), ``[N,
    C_out, H', W']``.

    The terms are summed in their own dtype, float32 at least, and cast once to the input's.
    Differentiable."""
    weight = sum_terms(_widened(terms), input.shape[1], active, gates).to(input.dtype)
    groups = _groups(input, weight)
    wide_input, wide_weight = _widened([input, weight])
    output = F.conv2d(
        wide_input, wide_weight, None, tuple(stride), tuple(padding), tuple(dilation), groups
    )
    return output.to(input.dtype)


def input_grad(
    grad: Tensor,
    input: Tensor,
    terms: Sequence[Tensor],
    active: int,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient with respect to the input, of the input's shape and dtype."""
    if grad.numel() == 0:
        return torch.zeros_like(input)
    weight = sum_terms(_widened(terms), input.shape[1], active, gates).to(input.dtype)
    args = (tuple(stride), tuple(padding), tuple(dilation), _groups(input, weight))
    wide_weight, wide_grad = _widened([weight, grad])
    return conv2d_input(input.shape, wide_weight, wide_grad, *args).to(input.dtype)


def weight_grad(
    grad: Tensor,
    input: Tensor,
    terms: Sequence[Tensor],
    active: int,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients with respect to every term and to the gates (None without gates); zero beyond
    ``active``."""
    grad_terms = [torch.zeros_like(term) for term in terms]
    grad_gates = None if gates is None else torch.zeros_like(gates)
    if grad.numel() == 0:
        return grad_terms, grad_gates
    input, grad, *wide = _widened([input, grad, *terms[:active]])
    args = (tuple(stride), tuple(padding), tuple(dilation), _groups(input, wide[-1]))
    weight = conv2d_weight(input, wide[-1].shape, grad, *args)
    for i, term in enumerate(wide):
        part = restrict(weight, term.shape[1], input.shape[1])
        if gates is None or grad_gates is None:
            grad_terms[i].copy_(part)
        else:
            grad_terms[i].copy_(part * gates[i])
            grad_gates[i] = (part * term).sum()
    return grad_terms, grad_gates


def series_sum(terms: Sequence[Tensor], active: int, gates: Tensor | None) -> Tensor:
    """``Σ_{i≤n} gate_i t_i`` of terms of one shape (equation 5 for P and Q). Differentiable."""
    chosen = torch.stack(list(terms[:active]))
    if gates is not None:
        chosen = chosen * gates[:active].to(chosen.dtype).reshape(-1, *[1] * (chosen.dim() - 1))
    return chosen.sum(0)


def _widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.float() if tensor.dtype.itemsize == 2 else tensor for tensor in tensors]


def _groups(input: Tensor, weight: Tensor) -> int:
    return input.shape[1] // weight.shape[1]
