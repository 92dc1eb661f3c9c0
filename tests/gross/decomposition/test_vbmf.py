"""The rank baselines: ranks that are known, and group sizes that exist."""

from __future__ import annotations

import math

import pytest
import torch
from gross.decomposition.vbmf import energy_group_size, energy_rank, vbmf_group_size, vbmf_rank
from torch import Tensor


def noisy(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(*shape, generator=generator) for shape in ((rows, rank), (rank, columns))
    )
    return left @ right + noise * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(64, 576, 10), (128, 128, 20), (100, 1000, 0), (300, 40, 7)]
)
def test_planted_rank(rows: int, columns: int, rank: int) -> None:
    """The noise variance is not told. Catches a wrong free energy, and rows and columns mixed
    up."""
    assert vbmf_rank(noisy(rows, columns, rank, noise=0.1)) == rank


@pytest.mark.parametrize("shape", [(50, 50), (50, 450), (450, 50)])
def test_threshold(shape: tuple[int, int]) -> None:
    """A component is kept from ``γ² = M σ² (1 + τ)(1 + α/τ)`` on, where τ solves ``Φ(τ) + Φ(τ/α) =
    0`` with ``Φ(z) = log(1 + z) / z − 1/2``, the form in which the authors give the threshold; for
    square matrices τ = 2.5129.

    Catches a second minimum of the free energy at the wrong place or with the wrong depth.
    """
    rows, columns = sorted(shape)
    alpha = rows / columns

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    low, high = 0.01, 10.0
    for _ in range(60):
        tau = (low + high) / 2
        low, high = (tau, high) if phi(tau) + phi(tau / alpha) > 0 else (low, tau)
    if alpha == 1:
        assert tau == pytest.approx(2.5129, abs=1e-4)
    sigma = 0.3
    threshold = sigma * math.sqrt(columns * (1 + tau) * (1 + alpha / tau))
    for factor, rank in ((0.999, 0), (1.001, 1)):
        matrix = torch.zeros(shape, dtype=torch.float64)
        matrix[3, 2] = factor * threshold
        assert vbmf_rank(matrix, noise_variance=sigma**2) == rank


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scale(scale: float) -> None:
    """Catches a noise variance that is searched in a fixed interval."""
    assert vbmf_rank(scale * noisy(64, 576, 10, noise=0.1)) == 10


def test_without_noise() -> None:
    """Catches logarithms of zero singular values: matrices without noise, and zero ones."""
    assert vbmf_rank(noisy(64, 576, 10, noise=0.0)) == 10
    assert vbmf_rank(torch.zeros(4, 9)) == 0


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.9, 2), (1.0, 3)])
def test_energy_rank(energy: float, rank: int) -> None:
    """Squares 64, 32 and 4 of 100. Catches singular values that are not squared, and ranks one too
    large or small."""
    assert energy_rank(torch.diag(torch.tensor([2.0, 8.0, 0.0, math.sqrt(32)])), energy) == rank


def test_group_sizes() -> None:
    """The smaller of the two ranks decides, a tie goes to the smaller size, and there is no group
    size 0.

    Catches a baseline that returns a rank.
    """
    weight = noisy(64, 9 * 48, 12, noise=0.01).reshape(64, 48, 3, 3)
    assert vbmf_rank(weight.flatten(1)) == 12
    assert vbmf_rank(weight.transpose(0, 1).flatten(1)) > 12
    assert vbmf_group_size(weight, (1, 8, 16)) == 8
    assert vbmf_group_size(weight, (1, 8, 15)) == 15
    assert energy_group_size(weight, (1, 8, 16), energy=1.0) == 16
    noise = noisy(16, 9 * 16, 0, noise=1.0).reshape(16, 16, 3, 3)
    assert vbmf_group_size(noise, (1, 4, 16)) == 1
    assert vbmf_group_size(torch.zeros(8, 8, 3, 3), (2, 4)) == 2
    assert energy_group_size(torch.zeros(8, 8, 3, 3), (2, 4)) == 2


@pytest.mark.parametrize(
    ("weight", "group_sizes", "message"),
    [
        (torch.zeros(8, 8), (1, 4), "weight: got shape"),
        (torch.full((8, 8, 3, 3), math.nan), (1, 4), "weight: 576 of 576 entries are not finite"),
        (torch.ones(8, 8, 3, 3), (), "group_sizes: got none"),
    ],
)
def test_bad_input(weight: Tensor, group_sizes: tuple[int, ...], message: str) -> None:
    """Catches arguments that fail later with another message, or not at all."""
    for baseline in (vbmf_group_size, energy_group_size):
        with pytest.raises(ValueError, match=message):
            baseline(weight, group_sizes)


@pytest.mark.parametrize("energy", [0.0, 1.1, math.nan])
def test_bad_energy(energy: float) -> None:
    with pytest.raises(ValueError, match="energy: got"):
        energy_rank(torch.eye(3), energy)
