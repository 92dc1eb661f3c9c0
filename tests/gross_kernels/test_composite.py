"""Composite kernels, and structured ones as their special case, against matrices of cuboids."""

import itertools

import pytest
import torch
import windows as exact
from hypothesis import given, settings
from hypothesis import strategies as st

from gross_kernels import CompositeBasis, StructuredBasis


@st.composite
def bases(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of one to four axes, and structures that fit."""
    size = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    if len(size) == 1:
        size = [draw(st.integers(1, 40))]
    return tuple(size), tuple(draw(st.integers(1, each)) for each in size)


@settings(deadline=None, max_examples=80)
@given(bases())
def test_axis_by_axis_is_the_matrix(basis):
    """Catches a structured basis that is not that of its cuboids: α, W, residual, rank."""
    size, structure = basis
    fast, slow = StructuredBasis(size, structure), CompositeBasis(exact.cuboids(size, structure))
    assert torch.equal(fast.patterns, slow.patterns)
    assert torch.equal(fast.matrix, slow.matrix)
    assert fast.rank == slow.rank == len(slow.patterns)
    weight = torch.randn(3, *size, dtype=torch.float64)
    torch.testing.assert_close(fast.project(weight).flatten(1), slow.project(weight))
    torch.testing.assert_close(fast.residual(weight), slow.residual(weight))
    alpha = torch.randn(3, *structure, dtype=torch.float64)
    torch.testing.assert_close(fast.compose(alpha), slow.compose(alpha.flatten(1)))
    torch.testing.assert_close(fast.project(fast.compose(alpha)), alpha)
    assert fast.operations(5, 7) == slow.operations(5, 7)


@settings(deadline=None, max_examples=40)
@given(bases())
def test_the_residual_is_zero_on_structured_kernels_and_only_there(basis):
    """Catches a penalty that pulls weights away which are structured already: exactly zero, and a
    zero gradient; and one that is blind to some direction."""
    size, structure = basis
    structured = StructuredBasis(size, structure)
    alpha = torch.randint(-8, 9, (2, *structure)).double()
    weight = structured.compose(alpha).requires_grad_()
    residual = structured.residual(weight)
    residual.backward()
    assert residual.item() == 0
    assert not weight.grad.any()
    if structure != size:
        outside = torch.randn(2, *size, dtype=torch.float64)
        outside -= structured.compose(structured.project(outside))
        torch.testing.assert_close(structured.residual(outside), torch.ones(()).double())
    assert structured.residual(torch.zeros(2, *size)) == 0


@pytest.mark.parametrize(
    ("size", "structure"), [((3, 3, 3), (2, 2, 1)), ((5,), (2,)), ((4,), (4,))]
)
def test_the_residuals_gradient(size, structure):
    """Catches a gradient that is not the residual's."""
    basis = StructuredBasis(size, structure)
    weight = torch.randn(2, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(basis.residual, weight)
    assert torch.autograd.gradcheck(CompositeBasis(basis.patterns).residual, weight)


def test_any_binary_basis():
    """Catches what is right for cuboids alone: patterns that overlap, depend on one another, and
    share sums."""
    patterns = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 2, 1]]).clamp(max=1)[:, None]
    basis = CompositeBasis(patterns)
    assert basis.size == (1, 3)
    assert basis.rank == 3
    dependent = CompositeBasis(torch.tensor([[[1, 1, 0, 0]], [[0, 0, 1, 1]], [[1, 1, 1, 1]]]))
    assert dependent.rank == 2
    weight = torch.tensor([[[1.0, 1.0, 5.0, 5.0]]])
    found = dependent.compose(dependent.project(weight))
    torch.testing.assert_close(found, weight)
    assert dependent.residual(weight) < 1e-6
    # Of three patterns of 2, 2 and 4 ones, for 10 outputs at 7 positions.
    operations = dependent.operations(10, 7)
    assert operations.multiplications == 10 * 3 * 7
    assert operations.additions == ((1 + 1 + 3) + 10 * 2) * 7


def test_half_precision_weights_are_measured_in_float32():
    """Catches a penalty that is lost in the rounding of bfloat16."""
    basis = StructuredBasis((64, 3, 3), (64, 2, 2))
    weight = torch.randn(64, 64, 3, 3).bfloat16()
    assert basis.residual(weight).dtype == torch.float32
    torch.testing.assert_close(basis.residual(weight), basis.residual(weight.float()))


@pytest.mark.parametrize(
    ("patterns", "error"),
    [
        ([[1]], TypeError),
        (torch.ones(3), ValueError),
        (torch.zeros(0, 3), ValueError),
        (torch.zeros(2, 3), ValueError),
        (torch.full((2, 3), 0.5), ValueError),
    ],
)
def test_patterns_of_no_meaning_are_refused(patterns, error):
    """Catches a basis that is none."""
    with pytest.raises(error, match=r"patterns: got .*, accepted is"):
        CompositeBasis(patterns)


def test_structures_that_do_not_fit_are_refused():
    """Catches an empty window, and one number too few."""
    for size, structure in itertools.product([(3, 3)], [(4, 3), (0, 1), (3,), (3, 1.5)]):
        with pytest.raises((TypeError, ValueError), match=r"structure: got .*, accepted"):
            StructuredBasis(size, structure)
