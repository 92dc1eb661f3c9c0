"""Weights in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gross_kernels.program import Program, Quantised, Step, Steps

from .fusing import Fused
from .precision import Int8

#: Parts of its largest magnitude at which a row of weights may be cut.
CUTS = tuple(1 - 0.03 * i for i in range(8))
#: What is added to the moments' diagonal, of its mean.
DAMPING = 0.01


def refusal(made: Fused) -> str:
    """Why a step cannot run in 8 bits; empty if it can."""
    operation = made.operation
    if operation.kind == "convolution" and operation.groups > 1:
        return "a grouped convolution"
    if any(255 * 127 * kernel[0].numel() >= 2**31 for kernel in operation.weights):
        return "sums beyond 32 bits"
    return ""


def with_weights(
    made: Fused,
    settings: Int8,
    moments: Sequence[Tensor | None] = (None, None),
    channels: Tensor | None = None,
) -> Fused:
    """The step with weights of 8 bits, each row of them with a scale of its own. Q's columns take
    in the scales of r.

    Args:
        moments: ``Σ x xᵀ`` of what the weights are multiplied by, of a layer for P and for Q. With
            it the error of a product counts, not that of the weights.
        channels: of a layer, the largest magnitude of each channel of r. Channels that were never
            seen to be other than zero get the largest scale, so that nothing of them is cut.
    """
    operation, limit = made.operation, settings.largest_weight
    first, scales = _rows(operation.weights[0], limit, moments[0])
    if channels is None:
        return replace(made, operation=replace(operation, weights=(first,)), scales=(scales,))
    inner = torch.where(channels > 0, channels, channels.max()) / 127
    inner = torch.where(inner > 0, inner, 1.0)
    inside = None if moments[1] is None else moments[1] / (inner[:, None] * inner).double()
    last, outer = _rows(operation.weights[2] * inner.view(1, -1, 1, 1), limit, inside)
    return replace(
        made,
        operation=replace(operation, weights=(first, operation.weights[1], last)),
        scales=(scales, inner, outer),
    )


def _rows(kernel: Tensor, limit: int, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """A kernel as int8 with one scale for each output channel; a row of zeros has the scale 1."""
    rows = kernel.flatten(1)
    tops = _best_tops(rows, rows.abs().amax(1), limit)
    scales = torch.where(tops > 0, tops / limit, 1.0)
    if moments is None:
        whole = (rows / scales[:, None]).round().clamp(-limit, limit)
    else:
        whole = _compensated(rows.double(), scales.double(), limit, moments)
    return whole.to(torch.int8).view_as(kernel), scales


def _compensated(rows: Tensor, scales: Tensor, limit: int, moments: Tensor) -> Tensor:
    """Rows rounded one column after the other; those to come make up for the error of each as well
    as they can, where they are multiplied by what has these moments (Frantar et al., "GPTQ")."""
    damping = DAMPING * moments.diagonal().mean().clamp_min(1e-30)
    lower = torch.linalg.cholesky(moments + damping * torch.eye(len(moments)).double())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    left, whole = rows.clone(), torch.empty_like(rows)
    for k in range(rows.shape[1]):
        whole[:, k] = (left[:, k] / scales).round().clamp(-limit, limit)
        lost = (left[:, k] - whole[:, k] * scales) / upper[k, k]
        left[:, k:] -= lost[:, None] * upper[k, k:]
    return whole


def _best_tops(rows: Tensor, tops: Tensor, limit: int) -> Tensor:
    """Where to cut each row's magnitude, at one of :data:`CUTS` of its top, for the least squared
    error in steps of ``top / limit``."""
    best, least = tops.clone(), torch.full_like(tops, math.inf)
    for cut in CUTS:
        scale = (tops * cut / limit).clamp_min(1e-30)[:, None]
        found = (rows / scale).round().clamp(-limit, limit).mul(scale).sub(rows).square().sum(1)
        better = found < least
        best, least = torch.where(better, tops * cut, best), torch.where(better, found, least)
    return best


def summed(made: Fused, source: Tensor, form: Quantised | None = None) -> Tensor:
    """What a step sums, without bias and all that follows; with a ``form`` from its source in
    8 bits."""
    step = replace(made.step(0, -1, 0), bias=-1, slopes=-1, activation="none")
    steps = Steps((step,), 1, (1,))
    if form is not None:
        copy = Step("quantise", 0)
        steps = Steps((copy, replace(step, source=1)), 1, (2,), (None, form, None))
    return Program(steps, made.weights(), (False,))(source)[0]
