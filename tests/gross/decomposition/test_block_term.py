"""The block term decomposition: what the factors compute, how well they fit, and how well they are
conditioned."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gross.decomposition import block_term as module
from gross.decomposition.block_term import BlockTerm, block_term, block_term_series
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gross_kernels.series import expand


def kernel(
    channels_out: int,
    channels_in: int,
    size: tuple[int, int] = (3, 3),
    decay: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """A kernel whose singular values fall by ``exp(-decay)`` along the channels, as a trained one's
    do."""
    generator = torch.Generator().manual_seed(seed)
    taps = torch.randn(size[0] * size[1], channels_out, channels_in, generator=generator)
    sides = []
    for channels in (channels_out, channels_in):
        basis = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
        sides.append(basis * torch.exp(-decay * torch.arange(channels) / channels))
    return (
        (sides[0] @ taps @ sides[1].T)
        .permute(1, 2, 0)
        .reshape(channels_out, channels_in, *size)
        .contiguous()
    )


def planted(channels: int, group_size: int, seed: int = 0) -> Tensor:
    """A kernel that a bottleneck of this group size computes exactly."""
    generator = torch.Generator().manual_seed(seed)
    inner, outer = (
        torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0] for _ in range(2)
    )
    core = torch.randn(channels, group_size, 3, 3, generator=generator)
    return torch.einsum("uo,oikl,it->utkl", outer, expand(core, channels, channels), inner)


def relative(difference: Tensor, to: Tensor) -> float:
    return (difference.norm() / to.norm()).item()


def condition(weight: Tensor) -> float:
    values = torch.linalg.svdvals(weight[:, :, 0, 0].double())
    return (values[0] / values[-1]).item()


def term_norms(fit: BlockTerm) -> Tensor:
    """``‖Y_g‖`` of every group, computed one term at a time."""
    groups = len(fit.pointwise_in) // fit.group_size
    parts = zip(
        fit.pointwise_in[:, :, 0, 0].chunk(groups),
        fit.grouped.chunk(groups),
        fit.pointwise_out[:, :, 0, 0].chunk(groups, dim=1),
        strict=True,
    )
    return torch.stack([torch.einsum("uo,oikl,it->utkl", q, r, p).norm() for p, r, q in parts])


def corrections(smaller: BlockTerm, larger: BlockTerm) -> list[float]:
    """Relative norms of p, r and q of equation 6."""
    width = len(larger.pointwise_in)
    return [
        relative(larger.pointwise_in - smaller.pointwise_in, smaller.pointwise_in),
        relative(
            larger.grouped - expand(smaller.grouped, larger.group_size, width), smaller.grouped
        ),
        relative(larger.pointwise_out - smaller.pointwise_out, smaller.pointwise_out),
    ]


# What the factors mean --------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_the_three_convolutions_compute_the_kernel(group_size: int) -> None:
    """Catches a wrong order of groups or of channels in P, R or Q, which the fit's own error would
    not show."""
    weight = kernel(24, 16)
    fit = block_term(weight, group_size, width=(16, 32), sweeps=3)
    input = torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(1))
    inner = F.conv2d(input, fit.pointwise_in)
    inner = F.conv2d(inner, fit.grouped, stride=2, padding=1, groups=16 // group_size)
    output = F.conv2d(inner, fit.pointwise_out)
    torch.testing.assert_close(
        output, F.conv2d(input, fit.kernel(), stride=2, padding=1), rtol=1e-4, atol=1e-4
    )
    assert fit.relative_error == pytest.approx(relative(weight - fit.kernel(), weight), rel=1e-4)


@pytest.mark.filterwarnings(
    "ignore:Trying to compute SVD"
)  # TensorLy, where a kernel has less rank than the width
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    """Catches shapes that hold for square layers alone: unequal widths, widths above the channels,
    any kernel size."""
    sizes = [data.draw(st.integers(1, 3))]
    for _ in range(data.draw(st.integers(0, 2))):
        sizes.append(sizes[-1] * data.draw(st.integers(2, 3)))
    groups = data.draw(st.integers(1, 3))
    width_in = sizes[-1] * groups
    width_out = width_in // sizes[0] * data.draw(st.integers(1, 2))
    channels_out, channels_in, kh, kw = (data.draw(st.integers(1, most)) for most in (20, 20, 3, 3))
    weight = kernel(channels_out, channels_in, (kh, kw), seed=data.draw(st.integers(0, 99)))
    fits = block_term_series(weight, sizes, width=(width_in, width_out), sweeps=4)
    for size, fit in zip(sizes, fits, strict=True):
        assert fit.pointwise_in.shape == (width_in, channels_in, 1, 1)
        assert fit.grouped.shape == (width_out, size, kh, kw)
        assert fit.pointwise_out.shape == (channels_out, width_out, 1, 1)
        assert fit.relative_error == pytest.approx(
            relative(weight - fit.kernel(), weight), abs=1e-5
        )
    errors = [fit.relative_error for fit in fits]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("width", "sizes"),
    [
        ((36, 48), (3, 9, 18)),
        ((28, 28), (1, 7, 14, 28)),
        ((64, 56), (16, 32, 64)),
        ((11, 18), (11,)),
    ],
)
def test_structures_of_the_appendix(width: tuple[int, int], sizes: tuple[int, ...]) -> None:
    """Rows of Table 3 of the appendix. Catches groups counted from the wrong one of two unequal
    widths."""
    fits = block_term_series(kernel(80, 64), sizes, width=width, sweeps=10)
    errors = [fit.relative_error for fit in fits]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7


# How well they fit ------------------------------------------------------------------------------


def test_a_kernel_with_that_structure_is_found() -> None:
    """Catches updates that do not lead to the minimum: here it is X / (1 + λ), for the terms are
    orthogonal.

    The last core is solved for with a tenth of λ.
    """
    fit = block_term(planted(32, 8), 8, ridge=1e-2)
    assert fit.errors[-2] == pytest.approx(1e-2, rel=0.02)
    assert fit.relative_error == pytest.approx(1e-3, rel=0.02)
    assert fit.stopped == "tolerance"


@pytest.mark.parametrize("group_size", [1, 4, 12])
def test_no_worse_than_blockwise_tucker(group_size: int) -> None:
    """Within 1.03 of the best of TensorLy's partial Tucker, block after block on what the others
    leave, 10 rounds.

    Catches a fit that settles early or in a poor place.
    """
    import tensorly
    from tensorly.decomposition import partial_tucker

    weight = kernel(24, 24, decay=1.0)
    groups = 24 // group_size
    blocks = torch.zeros(groups, *weight.shape)
    with tensorly.backend_context("pytorch"):
        for g in list(range(groups)) * 10:
            rest = weight - blocks.sum(0) + blocks[g]
            (core, factors), _ = partial_tucker(
                rest, [group_size] * 2, [0, 1], n_iter_max=3, svd="truncated_svd"
            )
            blocks[g] = tensorly.tenalg.multi_mode_dot(core, factors, [0, 1])
    assert block_term(weight, group_size).relative_error <= 1.03 * relative(
        weight - blocks.sum(0), weight
    )


def kernel_of(by_output: Tensor) -> module._Kernel:
    by_input = by_output.permute(2, 1, 0).contiguous()
    return module._Kernel(by_output, by_input, by_output.double().square().sum().item())


def test_every_update_minimises_the_objective() -> None:
    """``‖X − Σ Y_g‖² + λ Σ ‖Y_g‖²`` has no slope left in the factor just solved for.

    Catches a wrong Gram matrix or right-hand side, and a ridge that is missing from one of the
    updates."""
    generator = torch.Generator().manual_seed(0)
    groups, m, s, taps, channels_out, channels_in, ridge = 3, 2, 4, 5, 7, 9, 0.3

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kernel = kernel_of(draw(channels_out, taps, channels_in))
    blocks = module._orthonormal(
        module._Blocks(
            draw(groups, s, channels_in), draw(groups, m, s, taps), draw(groups, m, channels_out)
        )
    )

    def slope(blocks: module._Blocks, part: str) -> Tensor:
        factor = getattr(blocks, part).clone().requires_grad_()
        terms = torch.einsum("gmu,gmsk,gst->gukt", *blocks._replace(**{part: factor})[::-1])
        ((kernel.by_output - terms.sum(0)).square().sum() + ridge * terms.square().sum()).backward()
        return factor.grad

    by_inner = module._project(blocks.inner, kernel.by_input)
    core = module._solve_core(by_inner, blocks, ridge)
    assert slope(blocks._replace(core=core), "core").abs().max() < 1e-9
    # Blocks that are no longer orthonormal, as a sweep has them.
    core = draw(groups, m, s, taps)
    equations = module._normal_equations(core, blocks.inner, by_inner)
    outer = module._solve_factor(equations, ridge)
    assert slope(blocks._replace(core=core, outer=outer), "outer").abs().max() < 1e-9
    by_outer = module._project(outer, kernel.by_output)
    equations = module._normal_equations(core.transpose(1, 2), outer, by_outer)
    inner = module._solve_factor(equations, ridge)
    assert slope(module._Blocks(inner, core, outer), "inner").abs().max() < 1e-9


@pytest.mark.parametrize("share", [1.0, 0.3, 0.02, 1e-3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_of_a_sweep_is_that_of_the_kernel(dtype: torch.dtype, share: float) -> None:
    """Catches an error that is not ‖X − X̂‖ of the factors at hand, and one that rounding decides
    where almost nothing is left: a sweep's gain of 1e-5 ends the fit."""
    generator = torch.Generator().manual_seed(1)
    groups, m, s, taps, channels = 8, 4, 4, 9, 32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    blocks = module._Blocks(
        draw(groups, s, channels), draw(groups, m, s, taps), draw(groups, m, channels)
    )
    terms = torch.einsum("gmu,gmsk,gst->ukt", *blocks[::-1])
    noise = draw(channels, taps, channels)
    exact = terms / terms.norm() + share * noise / noise.norm()
    scale = exact.norm()
    blocks = blocks._replace(core=blocks.core / terms.norm() / scale)
    kernel = kernel_of((exact / scale).to(dtype))
    rounded = module._Blocks(*(part.to(dtype) for part in blocks))
    by_outer = module._project(rounded.outer, kernel.by_output)
    equations = module._normal_equations(rounded.core.transpose(1, 2), rounded.outer, by_outer)
    error = module._residual(kernel, rounded, equations)
    assert error == pytest.approx((share * 1 / scale).item(), abs=3e-6)


def test_error_never_rises_with_the_group_size_nor_within_a_fit() -> None:
    """Catches a warm start that is lost, and momentum that is kept after a step too far."""
    fits = block_term_series(kernel(32, 32), (1, 2, 4, 8, 16, 32))
    errors = [fit.relative_error for fit in fits]
    assert errors == sorted(errors, reverse=True)
    for fit in fits:
        assert list(fit.errors[:-1]) == sorted(fit.errors[:-1], reverse=True)


def test_no_worse_than_the_start() -> None:
    """Catches a missing fallback: one sweep at the first, large ridge is worse than a converged
    solution."""
    weight = kernel(32, 32)
    good = block_term(weight, 4, sweeps=200, ridge=1e-3)
    again = block_term(weight, 8, start=good, sweeps=1, ridge=1.0)
    assert again.relative_error <= good.relative_error
    assert torch.equal(again.grouped, expand(good.grouped, 8, 32))


def test_momentum_saves_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an extrapolation without effect: 25 sweeps with it reach what 50 reach without."""
    weight = kernel(32, 32, decay=1.0)
    with_momentum = block_term(weight, 4, sweeps=25).relative_error
    monkeypatch.setattr(module, "MOMENTUM", 0.0)
    assert with_momentum < block_term(weight, 4, sweeps=50, tolerance=0).relative_error


def test_a_step_too_far_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a fit that ends where momentum, here far too much of it, first makes the error
    rise."""
    weight = kernel(32, 32, decay=1.0)
    sensible = block_term(weight, 4).relative_error
    monkeypatch.setattr(module, "MOMENTUM", 3.0)
    assert block_term(weight, 4).relative_error < 1.02 * sensible


def test_conjugate_gradients_find_what_cholesky_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a Gram matrix that is applied otherwise than it is formed."""
    weight = kernel(32, 32)
    direct = block_term(weight, 8, sweeps=3)
    monkeypatch.setattr(module, "LARGEST_GRAM", 0)
    monkeypatch.setattr(module, "GRADIENT_STEPS", 100)
    iterated = block_term(weight, 8, sweeps=3)
    assert iterated.errors == pytest.approx(direct.errors, rel=1e-4)


def test_narrow_widths_start_in_the_tucker_subspaces() -> None:
    """Catches a start anywhere: one sweep from such a one leaves 0.86, from this one 0.81."""
    assert block_term(kernel(64, 64), 3, width=(12, 16), sweeps=1).relative_error < 0.83


# The dense core ---------------------------------------------------------------------------------


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("channels_out", [16, 32, 48])
def test_dense_core_is_the_best(channels_out: int, warm_start: bool) -> None:
    """Error 0 where the output channels fit the width, that of the truncated SVD elsewhere, to
    1e-5.

    Catches factors that do not span the leading singular vectors.
    """
    weight = kernel(channels_out, 32, decay=1.0)
    fit = block_term_series(weight, (4, 32), warm_start=warm_start, sweeps=5)[-1]
    lost = torch.linalg.svdvals(weight.flatten(1).double())[32:]
    assert fit.relative_error == pytest.approx(relative(lost, weight), abs=1e-5)
    assert fit.stopped == "closed form"


def test_dense_core_of_two_smaller_widths() -> None:
    """No worse than TensorLy's partial Tucker decomposition run longer. Catches modes that are
    mixed up."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    weight = kernel(24, 32, decay=1.0)
    with tensorly.backend_context("pytorch"):
        (core, factors), _ = partial_tucker(weight, [12, 16], [0, 1], n_iter_max=500, tol=1e-9)
        best = relative(weight - tensorly.tenalg.multi_mode_dot(core, factors, [0, 1]), weight)
    fit = block_term_series(weight, (4, 16), width=(16, 12), sweeps=5)[-1]
    assert fit.relative_error == pytest.approx(best, abs=1e-4)
    assert fit.stopped == "tolerance"


def test_dense_core_keeps_the_factors() -> None:
    """Catches a dense core that starts over, as X between identities: p and q would be 1.4 and
    more."""
    fits = block_term_series(kernel(32, 32, decay=1.0), (8, 32))
    p, r, q = corrections(*fits)
    assert p < 0.4
    assert q < 0.4
    assert r < 1.1


# How well they are conditioned ------------------------------------------------------------------


@pytest.mark.parametrize("dead", [0, 20], ids=["full rank", "20 dead channels"])
def test_conditioning(dead: int) -> None:
    """Condition numbers below 10³ and the root of the summed squares of the terms below 3 ‖X‖, at
    every size.

    Catches terms that cancel, and P that has the null space of a kernel with dead input channels.
    """
    weight = kernel(32, 32)
    weight[:, 32 - dead :] = 0
    fits = block_term_series(weight, (1, 4, 16, 32), sweeps=100, tolerance=0)
    for fit in fits:
        assert condition(fit.pointwise_in) < 1e3
        assert condition(fit.pointwise_out) < 1e3
        assert term_norms(fit).norm() < 3 * weight.norm()


def test_the_ridge_bounds_the_terms() -> None:
    """Catches a ridge that does not reach the terms: without one the rank-one terms of this kernel
    grow and cancel."""
    weight = kernel(24, 24, decay=1.0)
    strong, weak = (
        term_norms(block_term(weight, 1, sweeps=200, tolerance=0, ridge=r)).norm()
        for r in (1e-2, 1e-6)
    )
    assert strong < 0.7 * weak


def test_no_channel_of_the_bottleneck_is_dead() -> None:
    """Catches zero rows left in P, R and Q together, which no gradient would ever reach."""
    fit = block_term(kernel(8, 32), 16, width=32, sweeps=5)
    assert fit.pointwise_in.flatten(1).norm(dim=1).min() > 0.1
    assert fit.pointwise_out.flatten(1).norm(dim=0).min() > 0.1
    assert fit.grouped.flatten(1).norm(dim=1).min() > 1e-3 * fit.grouped.norm()


def test_warm_start_makes_corrections_smaller() -> None:
    """Catches a series whose sizes are fitted one by one: their factors have nothing in common."""
    weight = kernel(32, 32, decay=1.0)
    warm, cold = (
        corrections(*block_term_series(weight, (4, 16), warm_start=each)) for each in (True, False)
    )
    assert warm[0] < 0.8 * cold[0]
    assert warm[2] < 0.8 * cold[2]


def test_turning_makes_corrections_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches factors left as the fit happens to turn them."""
    weight = kernel(32, 32, decay=1.0)
    start = block_term(weight, 4)
    p, _, q = corrections(start, block_term(weight, 16, start=start))
    monkeypatch.setattr(
        module, "_rotation", lambda matrix: torch.eye(matrix.shape[-1]).expand_as(matrix)
    )
    p_left, _, q_left = corrections(start, block_term(weight, 16, start=start))
    assert p < 0.95 * p_left
    assert q < 0.95 * q_left


# When it stops, and what it says ----------------------------------------------------------------


def test_stopping_and_progress() -> None:
    """Catches a stopping rule that never fires, fires before the ridge has decayed, or miscounts
    the sweeps."""
    weight = kernel(16, 16)
    seen: list[tuple[int, int, float]] = []
    early = block_term(
        weight, 4, sweeps=500, tolerance=1e-4, progress=lambda *line: seen.append(line)
    )
    late = block_term(weight, 4, sweeps=500, tolerance=1e-6)
    assert early.stopped == late.stopped == "tolerance"
    assert 10 < len(early.errors) < len(late.errors)
    assert early.errors[-3] - early.errors[-2] < 1e-4
    assert len(block_term(weight, 4, tolerance=1.0).errors) > 5
    assert seen == [(4, i + 1, error) for i, error in enumerate(early.errors[:-1])]
    short = block_term(weight, 4, sweeps=3)
    assert (short.stopped, len(short.errors)) == ("sweeps", 4)
    assert 0 < early.seconds < 60


def test_deterministic() -> None:
    """Catches draws from the global generator, and a seed that is not used."""
    weight = kernel(16, 16)
    torch.manual_seed(1)
    first = block_term_series(weight, (1, 4), sweeps=5, seed=7)
    torch.manual_seed(2)
    second = block_term_series(weight, (1, 4), sweeps=5, seed=7)
    other = block_term_series(weight, (1, 4), sweeps=5, seed=8)
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a.grouped, b.grouped)
        assert torch.equal(a.pointwise_in, b.pointwise_in)
        assert a.errors == b.errors
        assert not torch.equal(a.grouped, c.grouped)


def test_independent_fits_do_not_depend_on_each_other() -> None:
    """Catches a warm start where none was asked for."""
    weight = kernel(16, 16)
    independent = block_term_series(weight, (1, 4), sweeps=5, warm_start=False)[-1]
    assert torch.equal(independent.grouped, block_term(weight, 4, sweeps=5).grouped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Catches results in another dtype than the weight's, and an error measured before the cast to
    it."""
    weight = kernel(16, 16).to(dtype)
    for fit in block_term_series(weight, (4, 16), sweeps=10):
        assert {fit.pointwise_in.dtype, fit.grouped.dtype, fit.pointwise_out.dtype} == {dtype}
        exact = weight.double()
        assert fit.relative_error == pytest.approx(
            relative(exact - fit.kernel(torch.float64), exact), rel=1e-9
        )
    assert fit.relative_error < 32 * torch.finfo(dtype).eps


def test_float64_on_request() -> None:
    """Catches an ignored ``dtype``: exactness to 1e-7 is out of reach of float32 sums at this
    ridge."""
    weight = planted(8, 2)
    single, double = (
        block_term(weight, 2, sweeps=3, dtype=dtype) for dtype in (torch.float32, torch.float64)
    )
    assert not torch.equal(single.grouped, double.grouped)
    assert single.relative_error == pytest.approx(double.relative_error, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_scale_of_the_weight_does_not_matter(scale: float) -> None:
    """Catches Gram matrices that underflow or overflow in float32."""
    weight = kernel(16, 16)
    fits, scaled = (block_term_series(each, (4, 16), sweeps=5) for each in (weight, weight * scale))
    for fit, other in zip(fits, scaled, strict=True):
        assert other.relative_error == pytest.approx(fit.relative_error, rel=1e-3, abs=1e-6)


def test_a_zero_kernel() -> None:
    """Catches a division by its norm: a pruned layer is decomposed into finite factors that compute
    zero."""
    for fit in block_term_series(torch.zeros(8, 8, 3, 3), (1, 4, 8), sweeps=3):
        assert fit.relative_error == 0
        assert fit.kernel().isfinite().all()


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weight_that_is_not_finite(value: float) -> None:
    weight = kernel(8, 8)
    weight[1, 2, 0, 1] = value
    with pytest.raises(ValueError, match=r"weight: 1 of 576 entries are not finite"):
        block_term(weight, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 3}, "group size 3"),
        ({"width": (8, 3)}, "output width 3"),
        ({"width": 0}, "width: got 0"),
        ({"width": (8, 8, 8)}, "width: got"),
        ({"sweeps": 0}, "sweeps: got 0"),
        ({"tolerance": math.nan}, "tolerance: got nan"),
        ({"ridge": 0.0}, "ridge: got 0.0"),
        ({"weight": torch.zeros(8, 8)}, "weight: got shape"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    """Catches arguments that fail later, or not at all."""
    arguments = {"weight": kernel(8, 8), "group_size": 4} | change
    with pytest.raises(ValueError, match=message):
        block_term(**arguments)


def test_bad_types_and_starts() -> None:
    """Catches a start of another layer, of a larger group size, and integer weights."""
    weight = kernel(8, 8)
    with pytest.raises(TypeError, match=r"weight: got torch\.int32"):
        block_term(torch.ones(8, 8, 3, 3, dtype=torch.int32), 4)
    with pytest.raises(TypeError, match=r"dtype: got torch\.float16"):
        block_term(weight, 4, dtype=torch.float16)
    start = block_term(weight, 4, sweeps=1)
    with pytest.raises(ValueError, match="start: got factors of the shapes"):
        block_term(kernel(8, 16), 4, width=8, start=start)
    with pytest.raises(ValueError, match="group size 4 before 2"):
        block_term(weight, 2, start=replace(start))
