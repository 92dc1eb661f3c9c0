"""Block term decomposition of a convolution kernel: the bottleneck that stands for it at a group
size (section 3.2).

With G groups, the kernel, a matrix ``X_k`` [C_out, C_in] for each spatial tap k, is approximated by
a sum of G Tucker terms,

    X_k ≈ Σ_g Q_g R_gk P_g = Q · blockdiag(R_1k … R_Gk) · P
    (equation 2)

which is a pointwise convolution P, a grouped convolution R and a pointwise convolution Q.
Alternating least squares minimise

    ‖X − Σ_g Y_g‖² + λ Σ_g ‖Y_g‖²,   Y_gk = Q_g R_gk P_g

where the ridge λ keeps the terms from growing without limit and cancelling each other. Nothing of
this changes when ``P_g`` becomes ``T P_g`` and ``R_gk`` becomes ``R_gk T⁻¹``. The fit uses that
freedom to keep the rows of every ``P_g`` and the columns of every ``Q_g`` orthonormal: the Gram
matrix of the core then has identities as its diagonal blocks, and conjugate gradients are
preconditioned already. At the end the same freedom turns the factors towards those of the smaller
group size, which makes the corrections of equation 6 small."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gross_kernels.series import check_group_sizes, expand

from ..arguments import (
    check_flag,
    check_int,
    check_ints,
    check_number,
    check_pair,
    check_tensor,
    check_type,
)
from ..extras import from_extra

__all__ = ["BlockTerm", "block_term", "block_term_series"]

#: Largest Gram matrix of the core that is factorised. Beyond it, this many steps of conjugate
#: gradients from the last core reach the same error within 0.1 %, for 2048 rows (64 channels at s =
#: 32) in a tenth of the time.
LARGEST_GRAM = 512
GRADIENT_STEPS = 10
#: Squared error of a kernel of norm 1 below which rounding would decide it, were it taken from the
#: normal equations.
SMALLEST_SQUARE = 1e-4
#: How far a sweep continues the change of P and Q that the one before made.
MOMENTUM = 0.9
#: The ridge starts at this multiple of its value and is halved, down to it, after each sweep that
#: gains less than ``SETTLED``. The last core is solved for with ``LAST_RIDGE`` times its value, as
#: λ shrinks every term by 1 / (1 + λ).
FIRST_RIDGE = 10.0
LAST_RIDGE = 0.1
SETTLED = 1e-3
#: Condition number at which P and Q are capped, by raising their smallest singular values.
LARGEST_CONDITION = 300.0
#: The caps among which a dense core (s = width) takes the one with the smallest corrections.
DENSE_CONDITIONS = (1.0, 2.0, 3.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class BlockTerm:
    """One bottleneck: the factors of a kernel at one group size, shaped as the weights of the three
    convolutions.

    Attributes:
        pointwise_in: P, ``[width_in, C_in, 1, 1]``.
        grouped: R, ``[width_out, s, kh, kw]``.
        pointwise_out: Q, ``[C_out, width_out, 1, 1]``.
        errors: relative Frobenius error of the best solution after each sweep, and last that of the
            factors held here.
        stopped: why the fit ended: "tolerance", "sweeps" or "closed form".
        seconds: what the fit took.
    """

    pointwise_in: Tensor
    grouped: Tensor
    pointwise_out: Tensor
    errors: tuple[float, ...]
    stopped: str
    seconds: float

    @property
    def group_size(self) -> int:
        """s, input channels per group of R."""
        return self.grouped.shape[1]

    @property
    def relative_error(self) -> float:
        """``‖X − X̂‖ / ‖X‖`` in the Frobenius norm."""
        return self.errors[-1]

    def kernel(self, dtype: torch.dtype | None = None) -> Tensor:
        """X̂ of equation 2, ``[C_out, C_in, kh, kw]``: the kernel of the convolution that the
        bottleneck computes."""
        inner, core, outer = (
            factor.to(dtype) for factor in (self.pointwise_in, self.grouped, self.pointwise_out)
        )
        dense = expand(core, len(inner), len(inner))
        return torch.einsum("uo,oikl,it->utkl", outer[:, :, 0, 0], dense, inner[:, :, 0, 0])


def block_term_series(
    weight: Tensor,
    group_sizes: Sequence[int],
    *,
    width: int | tuple[int, int] | None = None,
    sweeps: int = 50,
    tolerance: float = 1e-5,
    ridge: float = 1e-2,
    warm_start: bool = True,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[BlockTerm]:
    """The block term decompositions of a kernel that make a series (equations 5 and 6), one for
    each group size.

    Args:
        group_sizes: ascending, each divides the next.
        warm_start: start each size from the solution at the size before, expanded by Ψ (equation
            4). The relative error then never rises with the group size, and the corrections stay
            small. False: independent fits.

    The other arguments and what is raised are those of ``block_term``.
    """
    check_flag("warm_start", warm_start)
    fits: list[BlockTerm] = []
    sizes = check_ints("group_sizes", group_sizes, least=1)
    for group_size in check_group_sizes(sizes, *_widths(weight, width)):
        fit = block_term(
            weight,
            group_size,
            width=width,
            start=fits[-1] if warm_start and fits else None,
            sweeps=sweeps,
            tolerance=tolerance,
            ridge=ridge,
            seed=seed,
            dtype=dtype,
            progress=progress,
        )
        fits.append(fit)
    return fits


@torch.no_grad()
def block_term(
    weight: Tensor,
    group_size: int,
    *,
    width: int | tuple[int, int] | None = None,
    start: BlockTerm | None = None,
    sweeps: int = 50,
    tolerance: float = 1e-5,
    ridge: float = 1e-2,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> BlockTerm:
    """The bottleneck of one group size that comes close to a kernel in the Frobenius norm (equation
    2).

    At ``s = width_in`` R is dense and no sweeps are needed: the error is 0 where neither width is
    below its number of channels; where one is, the leading singular vectors are the optimum; where
    both are, TensorLy's partial Tucker decomposition is the answer.

    Args:
        weight: ``[C_out, C_in, kh, kw]`` of a convolution without groups; floating point, on any
            device.
        group_size: s; divides ``width_in``, and ``width_in / s`` groups divide ``width_out``.
        width: channels of the bottleneck, ``(width_in, width_out)`` or one int for both; ``C_in``
            by default.
        start: a solution of the same widths at this or a smaller group size; the result is no
            worse. None: orthogonal factors drawn from ``seed``, inside the subspaces of a Tucker
            decomposition where a width is below its number of channels.
        sweeps: updates of R, Q and P at most.
        tolerance: a sweep that lowers the relative error by less, the ridge having decayed, is the
            last (section 4.3).
        ridge: λ; it starts ten times as large and decays to this as the fit settles.
        dtype: float32 or float64, in which the fit is computed; by default the weight's, float32
            for 16-bit ones.
        progress: called after each sweep with the group size, the sweep (from 1) and the relative
            error.

    Returns:
        The factors in the weight's dtype and on its device. The condition numbers of P and Q are at
        most 300.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: if the weight is not four-dimensional or not finite, the sizes do not fit, or a
            number is out of range.
        ImportError: if TensorLy is needed and not installed.
    """
    began = time.perf_counter()
    width_in, width_out = _widths(weight, width)
    group_size = check_int("group_size", group_size, least=1)
    check_group_sizes((group_size,), width_in, width_out, "group_size")
    sweeps, seed = check_int("sweeps", sweeps, least=1), check_int("seed", seed)
    tolerance = check_number("tolerance", tolerance, "a number of at least 0")
    ridge = check_number("ridge", ridge, "a positive number", open_below=True)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: got {type(progress).__name__}, accepted is a function")
    dtype = _check(weight, (width_in, width_out), start, dtype)

    # The fit is of a kernel of norm 1: errors are residual norms, and no Gram matrix of tiny or
    # huge weights is out of float32's range.
    scale = weight.double().norm().to(dtype)
    scale = torch.where(scale > 0, scale, 1.0)
    by_output = (weight.to(dtype) / scale).flatten(2).mT.contiguous()
    squared_norm = by_output.double().square().sum().item()
    kernel = _Kernel(by_output, by_output.permute(2, 1, 0).contiguous(), squared_norm)
    groups = width_in // group_size
    blocks = None
    if start is not None:
        start = measured(
            weight,
            start.pointwise_in,
            expand(start.grouped, group_size, width_in),
            start.pointwise_out,
        )
        blocks = _Blocks(
            start.pointwise_in.to(dtype).reshape(groups, group_size, -1),
            start.grouped.to(dtype).div(scale).reshape(groups, -1, group_size, by_output.shape[1]),
            start.pointwise_out.to(dtype).flatten(1).T.reshape(groups, width_out // groups, -1),
        )

    errors: list[float] = []
    if groups == 1:
        both = width_in < weight.shape[1] and width_out < weight.shape[0]
        stopped = "tolerance" if both else "closed form"
        fitted = _dense(kernel.by_output.double(), width_in, width_out, blocks)
    else:
        blocks = blocks or _random(kernel.by_output, groups, width_in, width_out, seed)
        fitted, errors, stopped = _alternate(kernel, blocks, sweeps, tolerance, ridge, progress)
        fitted = _turned(kernel, fitted, blocks, LAST_RIDGE * ridge)

    fit = measured(
        weight,
        fitted.inner.flatten(0, 1)[:, :, None, None],
        fitted.core.mul(scale).flatten(0, 1).unflatten(2, weight.shape[2:]).contiguous(),
        fitted.outer.flatten(0, 1).T.contiguous()[:, :, None, None],
    )
    if start is not None and not fit.relative_error <= start.relative_error:
        fit = start
    return replace(
        fit, errors=(*errors, *fit.errors), stopped=stopped, seconds=time.perf_counter() - began
    )


class _Kernel(NamedTuple):
    """The kernel, its K taps in the middle."""

    by_output: Tensor  #: ``[C_out, K, C_in]``.
    by_input: Tensor  #: ``[C_in, K, C_out]``.
    squared_norm: float


class _Blocks(NamedTuple):
    """The factors by group; m is ``width_out / G``."""

    inner: Tensor  #: P, ``[G, s, C_in]``.
    core: Tensor  #: R, ``[G, m, s, K]``.
    outer: Tensor  #: Qᵀ, ``[G, m, C_out]``.


class _Equations(NamedTuple):
    """The normal equations ``G·F = T`` of a factor F, ``[G, b, C]``."""

    gram: Tensor  #: G, ``[G, b, G, b]``.
    target: Tensor  #: T, ``[G, b, C]``.


def _widths(weight: Tensor, width: int | tuple[int, int] | None) -> tuple[int, int]:
    if check_tensor("weight", weight).dim() != 4:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, accepted is [C_out, C_in, kh, kw]"
        )
    return check_pair("width", weight.shape[1] if width is None else width)


def _check(
    weight: Tensor,
    widths: tuple[int, int],
    start: BlockTerm | None,
    dtype: torch.dtype | None,
) -> torch.dtype:
    """Check the tensors that ``block_term`` was given; returns the dtype to compute in."""
    if not weight.is_floating_point():
        raise TypeError(f"weight: got {weight.dtype}, accepted are floating point dtypes")
    if dtype is None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: got {dtype!r}, accepted are torch.float32 and torch.float64")
    if not weight.isfinite().all():
        raise ValueError(
            f"weight: {int((~weight.isfinite()).sum())} of {weight.numel()} entries are not finite"
        )
    if start is not None:
        check_type("start", start, BlockTerm, "a BlockTerm, or None")
        got = [
            tuple(each.shape) for each in (start.pointwise_in, start.grouped, start.pointwise_out)
        ]
        (channels_out, channels_in, *kernel_size), (width_in, width_out) = weight.shape, widths
        grouped = (width_out, start.group_size, *kernel_size)
        accepted = [(width_in, channels_in, 1, 1), grouped, (channels_out, width_out, 1, 1)]
        if got != accepted:
            raise ValueError(f"start: got factors of the shapes {got}, accepted are {accepted}")
    return dtype


def measured(weight: Tensor, inner: Tensor, grouped: Tensor, outer: Tensor) -> BlockTerm:
    """A bottleneck in the weight's dtype and on its device, with the error that it has there."""
    fit = BlockTerm(
        inner.to(weight), grouped.to(weight), outer.to(weight), errors=(), stopped="", seconds=0.0
    )
    exact = weight.double()
    error = (exact - fit.kernel(exact.dtype)).norm() / exact.norm().clamp_min(
        torch.finfo(exact.dtype).tiny
    )
    return replace(fit, errors=(error.item(),))


def _alternate(
    kernel: _Kernel,
    blocks: _Blocks,
    sweeps: int,
    tolerance: float,
    final_ridge: float,
    progress: Callable[[int, int, float], None] | None,
) -> tuple[_Blocks, list[float], str]:
    """Extrapolated alternating least squares: the best blocks, the error after each sweep, and why
    it stopped."""
    ridge = FIRST_RIDGE * final_ridge
    best = current = _orthonormal(blocks)
    errors: list[float] = []
    extrapolated = False
    for sweep in range(1, sweeps + 1):
        by_inner = _project(current.inner, kernel.by_input)
        core = _solve_core(by_inner, current, ridge)
        outer = _solve_factor(_normal_equations(core, current.inner, by_inner), ridge)
        by_outer = _project(outer, kernel.by_output)
        equations = _normal_equations(core.transpose(1, 2), outer, by_outer)
        solved = _Blocks(_solve_factor(equations, ridge), core, outer)
        error = _residual(kernel, solved, equations)

        gain = errors[-1] - error if errors else math.inf
        settled = gain < tolerance and ridge == final_ridge and (gain > 0 or not extrapolated)
        if gain > 0:
            last, best = best, _orthonormal(solved)
            extrapolated = sweep > 1
            current = _extrapolate(last, best) if extrapolated else best
        else:
            # The step went too far: take it again from the best, without momentum.
            extrapolated = False
            current = best
        errors.append(error if gain > 0 else errors[-1])
        if progress is not None:
            progress(blocks.inner.shape[1], sweep, errors[-1])
        if settled:
            return best, errors, "tolerance"
        if gain < SETTLED:
            ridge = max(ridge / 2, final_ridge)
    return best, errors, "sweeps"


def _orthonormal(blocks: _Blocks) -> _Blocks:
    """The same terms with orthonormal ``P_g`` and ``Q_g``."""
    inner_gauge, inner = _split(blocks.inner)
    outer_gauge, outer = _split(blocks.outer)
    return _Blocks(inner, _transform(blocks.core, inner_gauge, outer_gauge), outer)


def _split(factor: Tensor) -> tuple[Tensor, Tensor]:
    """``factor = gauge @ basis`` in each group, with orthonormal rows in the basis, and zeros
    beyond the channels.

    The gauge's diagonal is not negative, so that a small change of the factor is a small change of
    the basis."""
    basis, gauge = torch.linalg.qr(factor.mT)
    sign = torch.where(gauge.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(factor.dtype)
    spare = factor.shape[1] - basis.shape[2]
    return pad((gauge * sign[..., None]).mT, (0, spare)), pad(
        (basis * sign[..., None, :]).mT, (0, 0, 0, spare)
    )


def _transform(core: Tensor, inner_gauge: Tensor, outer_gauge: Tensor) -> Tensor:
    """``R_gk → outer_gaugeᵀ R_gk inner_gauge``."""
    return torch.einsum("gmsk,gst,gmn->gntk", core, inner_gauge, outer_gauge)


def _extrapolate(last: _Blocks, best: _Blocks) -> _Blocks:
    """Continue the change of P and Q; the core, which is solved for next, is only a place to start
    from."""
    inner, outer = (
        new + MOMENTUM * (new - old)
        for new, old in ((best.inner, last.inner), (best.outer, last.outer))
    )
    return _Blocks(_split(inner)[1], best.core, _split(outer)[1])


def _project(factor: Tensor, kernel: Tensor) -> Tensor:
    """A kernel ``[C, K, n]`` with its first channels projected onto a factor ``[G, b, C]``: ``[G,
    b, K, n]``."""
    return (factor.flatten(0, 1) @ kernel.flatten(1)).reshape(*factor.shape[:2], *kernel.shape[1:])


def _solve_core(by_inner: Tensor, blocks: _Blocks, ridge: float) -> Tensor:
    """The core of the least objective for orthonormal ``P_g`` and ``Q_g``, given the kernel
    projected onto P.

    The Gram matrix ``QᵀQ ∘ PPᵀ``, restricted to the blocks, is the same for every tap. Beyond
    ``LARGEST_GRAM`` rows it is applied, not formed."""
    inner_gram, outer_gram = _gram(blocks.inner), _gram(blocks.outer)
    target = torch.einsum("gmu,gsku->gmsk", blocks.outer, by_inner)
    groups, m, s, taps = target.shape
    rows = groups * m * s
    if rows <= LARGEST_GRAM:
        gram = torch.einsum("gmhn,gsht->gmshnt", outer_gram, inner_gram).reshape(rows, rows)
        gram.diagonal().add_(ridge)
        return torch.cholesky_solve(
            target.reshape(rows, taps), torch.linalg.cholesky(gram)
        ).reshape(target.shape)

    inner_rows = inner_gram.reshape(groups, s, groups * s)
    outer_rows = outer_gram.reshape(groups, m, groups * m)

    def apply(core: Tensor) -> Tensor:
        # Tap by tap the second product reads the first where it lies, ``[G·m, K, G, s]``, which is
        # as large as the kernel: one product for all taps would turn it round first, in twice the
        # time.
        half = core.mT.reshape(groups, m * taps, s) @ inner_rows
        half = half.reshape(groups * m, taps, groups, s)
        image = [outer_rows @ half[:, k].transpose(0, 1) for k in range(taps)]
        return torch.stack(image, dim=-1) + ridge * core

    core = blocks.core
    residual = target - apply(core)
    direction = residual
    squared = residual.square().sum((0, 1, 2))
    tiny = torch.finfo(core.dtype).tiny
    for _ in range(GRADIENT_STEPS):
        image = apply(direction)
        step = squared / (direction * image).sum((0, 1, 2)).clamp_min(tiny)
        core = core + step * direction
        residual = residual - step * image
        last, squared = squared, residual.square().sum((0, 1, 2))
        direction = residual + squared / last.clamp_min(tiny) * direction
    return core


def _normal_equations(core: Tensor, other: Tensor, projected: Tensor) -> _Equations:
    """What one factor of the least error solves, given the core, the other factor and the kernel
    projected onto that.

    Args:
        core: ``[G, b, c, K]``, the axis of the factor sought first.
        other: ``[G, c, n]``.
        projected: ``[G, c, K, C]``.
    """
    gram = torch.einsum("gbkhc,hdck->gbhd", _half(core, _gram(other)), core)
    return _Equations(gram, torch.einsum("gbck,gckx->gbx", core, projected))


def _solve_factor(equations: _Equations, ridge: float) -> Tensor:
    """The factor of the least objective, ``[G, b, C]``."""
    gram, target = equations.gram.clone(), equations.target
    # The norms of the terms are in the diagonal blocks.
    gram.diagonal(dim1=0, dim2=2).mul_(1 + ridge)
    gram = gram.flatten(2).flatten(0, 1)
    # What rounding may have taken from the smallest eigenvalues.
    number = torch.finfo(gram.dtype)
    gram.diagonal().add_(number.eps * gram.trace() + number.tiny)
    return torch.cholesky_solve(target.flatten(0, 1), torch.linalg.cholesky(gram)).reshape(
        target.shape
    )


def _gram(factor: Tensor) -> Tensor:
    """All inner products between the rows of a factor: ``[G, b, G, b]``."""
    flat = factor.flatten(0, 1)
    return (flat @ flat.T).reshape(*factor.shape[:2], *factor.shape[:2])


def _half(core: Tensor, gram: Tensor) -> Tensor:
    """The core times the Gram matrix of the factor on its third axis: ``[G, b, K, G, c]``."""
    return torch.einsum("gbck,gchd->gbkhd", core, gram)


def _residual(kernel: _Kernel, blocks: _Blocks, equations: _Equations) -> float:
    """``‖X − X̂‖``, of which ``equations`` are those that P solves.

    ``‖X‖² − 2⟨T, P⟩ + ⟨P, G P⟩`` needs no product as large as the kernel, and is summed in float64;
    in float32 the norm of the difference itself is a hundred times less exact."""
    inner = blocks.inner.flatten(0, 1)
    gram, target = equations.gram.flatten(2).flatten(0, 1), equations.target.flatten(0, 1)
    explained = (inner.double() * (2 * target - gram @ inner)).sum().item()
    if kernel.squared_norm - explained > SMALLEST_SQUARE:
        return math.sqrt(kernel.squared_norm - explained)
    rows = torch.einsum("gmsk,gmu->gsku", blocks.core, blocks.outer).flatten(2).flatten(0, 1)
    rest = torch.addmm(kernel.by_input.flatten(1), inner.T, rows, alpha=-1)
    return rest.norm().item()


def _turned(kernel: _Kernel, fitted: _Blocks, towards: _Blocks, ridge: float) -> _Blocks:
    """The fitted blocks, P and Q turned within their groups to come nearest to others, their
    conditioning capped."""
    inner_turn, outer_turn = (
        _rotation(towards.inner @ fitted.inner.mT),
        _rotation(towards.outer @ fitted.outer.mT),
    )
    inner, outer = _capped(inner_turn @ fitted.inner), _capped(outer_turn @ fitted.outer)
    core = _transform(fitted.core, inner_turn.mT, outer_turn.mT)
    # The R that is best for these P and Q.
    inner_gauge, inner_basis = _split(inner)
    outer_gauge, outer_basis = _split(outer)
    basis = _Blocks(inner_basis, _transform(core, inner_gauge, outer_gauge), outer_basis)
    core = _solve_core(_project(basis.inner, kernel.by_input), basis, ridge)
    return _Blocks(
        inner,
        _transform(core, torch.linalg.pinv(inner_gauge), torch.linalg.pinv(outer_gauge)),
        outer,
    )


def _rotation(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each of a batch of square matrices (orthogonal
    Procrustes)."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def _capped(factor: Tensor) -> Tensor:
    """The blocks of a factor whose matrix has a condition number of at most
    ``LARGEST_CONDITION``."""
    return _raised(factor.flatten(0, 1), LARGEST_CONDITION).reshape(factor.shape)


def _raised(matrix: Tensor, condition: float) -> Tensor:
    """The nearest matrix with the same largest singular value and at most this condition number."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left * values.clamp_min(values[0] / condition)) @ right


def _bases(kernel: Tensor, width_in: int, width_out: int) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that span the input and the output channels which the best dense core of
    these widths keeps.

    Args:
        kernel: ``[C_out, K, C_in]``.
    """
    bases = {mode: torch.eye(kernel.shape[mode]).to(kernel) for mode in (0, 2)}
    ranks = {
        mode: width for mode, width in ((0, width_out), (2, width_in)) if width < kernel.shape[mode]
    }
    if ranks:
        with from_extra():
            import tensorly
            from tensorly.decomposition import partial_tucker
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            (_, factors), _ = partial_tucker(
                kernel, [*ranks.values()], [*ranks], tol=1e-7, random_state=0
            )
        bases |= {mode: factor.T for mode, factor in zip(ranks, factors, strict=True)}
    return bases[2], bases[0]


def _random(kernel: Tensor, groups: int, width_in: int, width_out: int, seed: int) -> _Blocks:
    """Random orthogonal P and Q, and R = 0. The draw is made on the host, so that every device
    starts alike."""
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for width, basis in zip(
        (width_in, width_out), _bases(kernel, width_in, width_out), strict=True
    ):
        draw = torch.randn(width, len(basis), generator=generator, dtype=torch.float64)
        factors.append((torch.linalg.qr(draw)[0].to(basis) @ basis).unflatten(0, (groups, -1)))
    inner, outer = factors
    return _Blocks(
        inner, kernel.new_zeros(groups, outer.shape[1], inner.shape[1], kernel.shape[1]), outer
    )


def _dense(kernel: Tensor, width_in: int, width_out: int, start: _Blocks | None) -> _Blocks:
    """The best blocks for one group: any P and Q that span the right channels, and the R that is
    optimal with them.

    From a start, P and Q are its own, projected. Small singular values are raised, for R grows with
    their inverses: the cap on the condition number is that which makes the sum of the relative
    corrections of P, R and Q (equation 6) least."""
    bases = _bases(kernel, width_in, width_out)
    core = torch.einsum("ou,ukt,it->koi", bases[1], kernel, bases[0])
    if start is None:
        widths = (width_in, width_out)
        coordinates = [
            torch.eye(width, len(basis)).to(basis)
            for width, basis in zip(widths, bases, strict=True)
        ]
    else:
        start = _Blocks(*(part.double() for part in start))
        coordinates = [
            factor[0] @ basis.T
            for factor, basis in zip((start.inner, start.outer), bases, strict=True)
        ]

    def solution(condition: float) -> _Blocks:
        inner, outer = (_raised(each, condition) for each in coordinates)
        dense = torch.linalg.pinv(outer).T @ core @ torch.linalg.pinv(inner)
        return _Blocks(
            (inner @ bases[0])[None], dense.permute(1, 2, 0)[None], (outer @ bases[1])[None]
        )

    def correction(blocks: _Blocks) -> float:
        return sum(
            ((new - old).norm() / old.norm()).item()
            for new, old in zip(blocks, start or blocks, strict=True)
        )

    return min(map(solution, DENSE_CONDITIONS), key=correction)
