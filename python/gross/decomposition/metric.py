"""Block term decompositions that are close in the response to given inputs, not in the weight.

Let x be a patch of a convolution's input, the ``C_in · K`` numbers under the kernel, and ``M = E[x
xᵀ]`` the patches' second moments. The mean squared error of the response is then

    E‖(X − X̂) x‖² = tr((X − X̂) M (X − X̂)ᵀ)

with the kernels as matrices ``[C_out, C_in · K]``. Alternating least squares need the same metric
at all taps, so they get its mean over the taps, a matrix of channels ``M̄``: ``X M̄^½`` is
decomposed, and ``M̄^-½`` goes into P at the end. From there P, R and Q descend in the metric of the
patches (L-BFGS), each term's norm penalised by λ as in the alternating fit. The moments are not
centred: they have the mean in them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gross_kernels.series import expand

from .block_term import LAST_RIDGE, BlockTerm, block_term, measured

#: Eigenvalues of the mean metric are raised to this multiple of the largest: P would else be
#: without limit where the inputs hardly vary.
SMALLEST_EIGENVALUE = 1e-4
#: Steps of L-BFGS at most, the gradients that it remembers, and the gain of a step that is its
#: last, as a share of the error at the start.
STEPS = 100
MEMORY = 20
GAIN = 1e-5
#: Share of the response below which its error is rounding, and there is nothing to descend.
EXACT = 1e-8


@torch.no_grad()
def block_term_series_in_metric(
    weight: Tensor,
    group_sizes: Sequence[int],
    moments: Tensor,
    *,
    warm_start: bool = True,
    ridge: float = 1e-2,
    **options: Any,
) -> list[BlockTerm]:
    """As ``block_term_series``, with a response error in place of the weight error.

    Args:
        weight: ``[C_out, C_in, kh, kw]``.
        moments: M or a multiple of it, ``[C_in · kh · kw, C_in · kh · kw]``, in the order of
            ``torch.nn.functional.unfold``.
        warm_start: start each size from the solution at the size before. The response error then
            never rises with the group size.
        ridge, options: those of ``block_term``.

    Returns:
        The decompositions. Their ``errors`` are those in the mean metric after each sweep, and last
        ``‖X − X̂‖ / ‖X‖``.

    Raises:
        ValueError: if the moments are not of that shape; and as ``block_term``.
    """
    channels = weight.shape[1]
    patch = weight[0].numel()
    if moments.shape != (patch, patch):
        raise ValueError(
            f"moments: got shape {tuple(moments.shape)}, accepted is {(patch, patch)}: input "
            "channels times taps of the kernel"
        )
    moments = moments.double()
    moments = moments / moments.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    taps = moments.unflatten(0, (channels, -1)).unflatten(2, (channels, -1))
    root, inverse = _roots(taps.diagonal(dim1=1, dim2=3).mean(2))
    white = torch.einsum("oikl,ij->ojkl", weight.double(), root).to(weight.dtype)
    taps = torch.einsum("ij,jkmn,mp->ikpn", inverse, taps, inverse)
    metric = taps.flatten(2).flatten(0, 1).to(weight.dtype)
    fits: list[BlockTerm] = []
    for group_size in group_sizes:
        began = time.perf_counter()
        start = fits[-1] if warm_start and fits else None
        fit = block_term(white, group_size, start=start, ridge=ridge, **options)
        if start is not None:
            # It was the better one in the mean metric, but perhaps not in the patches'.
            expanded = replace(
                fit,
                pointwise_in=start.pointwise_in,
                grouped=expand(start.grouped, group_size, len(start.pointwise_in)),
                pointwise_out=start.pointwise_out,
            )
            fit = min(fit, expanded, key=lambda each: _response_error(white, each, metric))
        descended = _descended(white, fit, metric, LAST_RIDGE * ridge)
        fit = min(fit, descended, key=lambda each: _response_error(white, each, metric))
        fits.append(replace(fit, seconds=time.perf_counter() - began))
    return [_multiplied(weight, fit, inverse) for fit in fits]


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """M̄^½ and M̄^-½ of a symmetric positive semidefinite matrix, its smallest eigenvalues raised; of
    zeros, the identity twice."""
    values, vectors = torch.linalg.eigh(metric)
    if not values[-1] > 0:
        values = torch.ones_like(values)
    values = values.clamp_min(SMALLEST_EIGENVALUE * values[-1])
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _response_error(weight: Tensor, fit: BlockTerm, metric: Tensor) -> float:
    """``tr((X − X̂) M (X − X̂)ᵀ)``."""
    difference = (weight - fit.kernel()).flatten(1)
    return (difference @ metric * difference).sum().item()


def _descended(weight: Tensor, fit: BlockTerm, metric: Tensor, ridge: float) -> BlockTerm:
    """The fit after L-BFGS on the response error and the terms' norms.

    The gradient by X̂ costs one product with the metric, which is nearly all of the work, and the
    error comes with it."""
    scale = _response_error(weight, fit, metric)
    if scale <= EXACT * (weight.flatten(1) @ metric * weight.flatten(1)).sum():
        return fit
    groups = len(fit.pointwise_in) // fit.group_size
    inner = fit.pointwise_in.reshape(groups, fit.group_size, -1)
    core = fit.grouped.reshape(groups, -1, fit.group_size, weight[0, 0].numel())
    outer = fit.pointwise_out.flatten(1).T.reshape(groups, core.shape[1], -1)
    factors = [
        factor.clone(memory_format=torch.contiguous_format).requires_grad_()
        for factor in (inner, core, outer)
    ]
    optimizer = torch.optim.LBFGS(
        factors,
        max_iter=STEPS,
        history_size=MEMORY,
        tolerance_grad=0.0,
        tolerance_change=GAIN,
        line_search_fn="strong_wolfe",
    )

    @torch.enable_grad()
    def objective() -> Tensor:
        optimizer.zero_grad()
        inner, core, outer = factors
        through = torch.einsum("gmsk,gsc->gmck", core, inner).flatten(2)
        kernel = outer.flatten(0, 1).T @ through.flatten(0, 1)
        half = torch.einsum("gmsk,gst->gmtk", core, inner @ inner.mT)
        penalty = ridge / scale * torch.einsum("gmtk,gmn,gntk->", half, outer @ outer.mT, core)
        with torch.no_grad():
            difference = weight.flatten(1) - kernel
            product = difference @ metric
            error = (product * difference).sum() / scale
        torch.autograd.backward((kernel, penalty), (-2 / scale * product, None))
        return error + penalty.detach()

    optimizer.step(objective)
    inner, core, outer = (factor.detach() for factor in factors)
    return replace(
        fit,
        pointwise_in=inner.reshape(fit.pointwise_in.shape),
        grouped=core.reshape(fit.grouped.shape),
        pointwise_out=outer.flatten(0, 1).T.reshape(fit.pointwise_out.shape),
    )


def _multiplied(weight: Tensor, fit: BlockTerm, matrix: Tensor) -> BlockTerm:
    """The fit with P times a matrix, and the error that it then has."""
    inner = torch.einsum("wikl,ij->wjkl", fit.pointwise_in.double(), matrix).to(weight.dtype)
    error = measured(weight, inner, fit.grouped, fit.pointwise_out).relative_error
    return replace(fit, pointwise_in=inner, errors=(*fit.errors[:-1], error))
