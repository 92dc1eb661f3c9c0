"""Rank baselines: one group size for each layer from the singular values of its kernel alone,
without a search.

Both take the rank of the kernel's two channel unfoldings, ``[C_out, C_in·kh·kw]`` and ``[C_in,
C_out·kh·kw]``, and the smaller of the two, for a group's core has no more rank than either side.
The group size is the allowed one nearest to it.

The paper's VBMF row for its 4-layer network, 16 8 16, is what one such network gave after the
paper's schedule shortened to 30 epochs on CIFAR-10 (JPEG): the smaller ranks were 14, 12 and 13,
and 12 lies halfway between 8 and 16. Kernels that have moved less from their initialisation look
like noise: 12 epochs at a fifth of the learning rate gave the ranks 1, 2 and 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..arguments import check_ints, check_number, check_tensor


def vbmf_group_size(weight: Tensor, group_sizes: Sequence[int]) -> int:
    """The group size nearest to the ``vbmf_rank`` of a kernel ``[C_out, C_in, kh, kw]``; the
    smaller one on a tie.

    Never 0, whatever the rank.

    Raises:
        TypeError: for an argument of another type.
        ValueError: if the kernel is not four-dimensional or not finite, or there are no group
            sizes.
    """
    return _group_size(weight, group_sizes, vbmf_rank)


def energy_group_size(weight: Tensor, group_sizes: Sequence[int], energy: float = 0.9) -> int:
    """The group size nearest to the ``energy_rank`` of a kernel ``[C_out, C_in, kh, kw]``; the
    smaller one on a tie.

    Raises:
        TypeError, ValueError: as ``vbmf_group_size``, or if ``energy`` is not in (0, 1].
    """
    energy = _check_energy(energy)
    return _group_size(weight, group_sizes, lambda matrix: energy_rank(matrix, energy))


def energy_rank(matrix: Tensor, energy: float = 0.9) -> int:
    """How many of the largest singular values have squares that sum to a fraction ``energy`` of
    those of all.

    Raises:
        TypeError: for an argument of another type.
        ValueError: if ``energy`` is not in (0, 1], or the matrix is none.
    """
    energy = _check_energy(energy)
    shares = torch.linalg.svdvals(_check_matrix(matrix).double()).square().cumsum(0)
    return int((shares < energy * shares[-1]).sum()) + 1


def vbmf_rank(matrix: Tensor, noise_variance: float | None = None) -> int:
    """The rank of a matrix by the global analytic solution of empirical variational Bayesian matrix
    factorisation.

    For an L × M matrix, L ≤ M, with α = L/M and noise of variance σ², a singular value γ gives ``x
    = γ² / (Mσ²)``. Where ``x > (1 + √α)²`` the free energy has a second minimum beside 0, and the
    component is kept if it is lower:

        τ = (x − (1 + α) + √((x − (1 + α))² − 4α)) / 2
        Δ = log(1 + τ) + α log(1 + τ/α) − τ < 0

    Without ``noise_variance``, σ² is what minimises the free energy ``Σ x − log x + min(Δ, 0)``.

    Nakajima, Sugiyama, Babacan, Tomioka: Global Analytic Solution of Fully-observed Variational
    Bayesian Matrix Factorization, JMLR 14 (2013).

    Returns:
        How many components are kept, which may be 0.

    Raises:
        TypeError: for an argument of another type.
        ValueError: if the variance is not positive, or the matrix is none.
    """
    if noise_variance is not None:
        accepted = "a positive number"
        noise_variance = check_number("noise_variance", noise_variance, accepted, open_below=True)
    rows, columns = sorted(_check_matrix(matrix).shape)
    alpha = rows / columns
    squares = torch.linalg.svdvals(matrix.double()).square()
    if not squares[0] > 0:
        return 0
    # A zero singular value adds the same infinite constant for every σ².
    squares = (squares / columns).clamp_min(squares[0] * torch.finfo(squares.dtype).eps)
    if noise_variance is None:
        noise_variance = _noise_variance(squares, alpha)
    return int((_free_energy_change(squares / noise_variance, alpha) < 0).sum())


def _free_energy_change(x: Tensor, alpha: float) -> Tensor:
    """Δ of each component, 0 where there is no second minimum."""
    excess = x - (1 + alpha)
    tau = (excess + (excess.square() - 4 * alpha).clamp_min(0).sqrt()) / 2
    change = tau.log1p() + alpha * (tau / alpha).log1p() - tau
    return torch.where(x > (1 + math.sqrt(alpha)) ** 2, change, 0.0)


def _noise_variance(squares: Tensor, alpha: float) -> float:
    """σ² of the least free energy, from the ``γ² / M`` of all components.

    It lies between the mean of the components that can be noise alone and the mean of all. The free
    energy has several minima there, so the interval is searched on a grid, which is refined around
    its best point."""
    noise_only = squares[math.ceil(len(squares) / (1 + alpha)) - 1 :]
    low, high = noise_only.mean().log(), squares.mean().log()
    for _ in range(3):
        grid = torch.linspace(
            low.item(), high.item(), 257, dtype=squares.dtype, device=squares.device
        )
        x = squares / grid.exp()[:, None]
        best = (x - x.log() + _free_energy_change(x, alpha).clamp_max(0)).sum(1).argmin()
        low, high = grid[(best - 1).clamp_min(0)], grid[(best + 1).clamp_max(256)]
    return grid[best].exp().item()


def _check_energy(energy: float) -> float:
    accepted = "a fraction in (0, 1]"
    number = check_number("energy", energy, accepted, open_below=True)
    if number > 1:
        raise ValueError(f"energy: got {number}, accepted is {accepted}")
    return number


def _check_matrix(matrix: Tensor) -> Tensor:
    if check_tensor("matrix", matrix).dim() != 2 or 0 in matrix.shape or matrix.is_complex():
        raise ValueError(
            f"matrix: got {matrix.dtype} of shape {tuple(matrix.shape)}, accepted is a real matrix "
            "with entries"
        )
    return matrix


def _group_size(weight: Tensor, group_sizes: Sequence[int], rank: Callable[[Tensor], int]) -> int:
    group_sizes = check_ints("group_sizes", group_sizes, least=1)
    if check_tensor("weight", weight).dim() != 4:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, accepted is [C_out, C_in, kh, kw]"
        )
    if not weight.isfinite().all():
        raise ValueError(
            f"weight: {int((~weight.isfinite()).sum())} of {weight.numel()} entries are not finite"
        )
    if not group_sizes:
        raise ValueError("group_sizes: got none, at least one is needed")
    smaller = min(rank(weight.flatten(1)), rank(weight.transpose(0, 1).flatten(1)))
    return min(group_sizes, key=lambda size: (abs(size - smaller), size))
