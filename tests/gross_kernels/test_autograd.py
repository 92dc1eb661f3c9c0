"""Gradients of the operators in float64, twice, and what torch asks of a custom operator."""

import sys
from collections.abc import Callable
from itertools import product
from types import FrameType

import pytest
import torch
from accuracy import Target
from case import Case
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gross_kernels import GroSSConv2d, series_conv2d, use_backend, use_fused
from gross_kernels.dispatch import BACKENDS

ops = torch.ops.gross
CASES = {
    "plain": Case(2, 4, 4, (1, 2, 4), (1, 2), (2, 3), active=2),
    "gated": Case(1, 4, 4, (1, 2, 4), (1, 2), (2, 3), active=2, gated=True),
    "all_terms": Case(
        1, 6, 4, (3, 6), (2, 1), (3, 2), (2, 1), (1, 1), (2, 1), active=2, gated=True
    ),
    "channels_last": Case(
        2, 4, 6, (2, 4), (2, 2), (2, 3), (1, 2), (1, 0), active=1, gated=True, channels_last=True
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
#: Those that serve float64 on the CPU.
EXACT = [
    name
    for name in BACKENDS
    if Target(name, "cpu", torch.float64, torch.float64).serves(CASES["plain"])
]
every_way = pytest.mark.parametrize("fused", [True, False], ids=["fused", "parts"])
every_backend = pytest.mark.parametrize("backend", EXACT)


def leaves(
    case: Case, dtype: torch.dtype = torch.float64, terms_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Input, terms and gates as leaves that require gradients."""
    input, terms, gates, _ = case.tensors(dtype, terms_dtype)
    return [t.requires_grad_() for t in (input, *terms, *([] if gates is None else [gates]))]


def function(case: Case) -> Callable[..., Tensor]:
    """The public function of :func:`leaves`."""
    stride, padding, dilation = case.geometry

    def call(input: Tensor, *rest: Tensor) -> Tensor:
        terms, gates = (rest[:-1], rest[-1]) if case.gated else (rest, None)
        return series_conv2d(
            input,
            terms,
            case.active,
            stride=stride,
            padding=padding,
            dilation=dilation,
            gates=gates,
        )

    return call


@every_backend
@every_case
def test_first_derivatives(backend: str, case: Case) -> None:
    """Catches a gradient of input, terms or gates that is not the derivative of the output."""
    with use_backend(backend):
        assert torch.autograd.gradcheck(function(case), leaves(case))


@every_backend
@every_case
def test_second_derivatives(backend: str, case: Case) -> None:
    """Catches a gradient of the backward operator that is not its derivative, in any of its four
    arguments."""
    with use_backend(backend):
        assert torch.autograd.gradgradcheck(function(case), leaves(case))


@pytest.mark.parametrize(
    "needed", [needed for needed in product([True, False], repeat=3) if 0 < sum(needed) < 3]
)
def test_derivatives_of_some_arguments(needed: tuple[bool, bool, bool]) -> None:
    """Catches a derivative that is wrong, or an error, when input, terms or gates need none."""
    input, *terms, gates = leaves(CASES["gated"])
    for tensors, need in zip(([input], terms, [gates]), needed, strict=True):
        for tensor in tensors:
            tensor.requires_grad_(need)
    assert torch.autograd.gradcheck(function(CASES["gated"]), (input, *terms, gates))
    assert torch.autograd.gradgradcheck(function(CASES["gated"]), (input, *terms, gates))


def test_derivative_of_one_term() -> None:
    """Catches a list of gradients that is shifted when some terms are frozen."""
    input, *terms = leaves(CASES["plain"])
    terms[0].requires_grad_(False)
    assert torch.autograd.gradcheck(function(CASES["plain"]), (input, *terms))
    assert torch.autograd.gradgradcheck(function(CASES["plain"]), (input, *terms))


@pytest.mark.parametrize("gated", [False, True])
def test_derivatives_of_the_sum(gated: bool) -> None:
    """Catches a wrong first or second derivative of ``series_sum``, the sum of pointwise
    weights."""
    terms = [torch.randn(3, 2, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    gates = [torch.randn(3, dtype=torch.float64, requires_grad=True)] * gated

    def call(*arguments: Tensor) -> Tensor:
        return ops.series_sum(list(arguments[:3]), torch.tensor(2), arguments[3] if gated else None)

    assert torch.autograd.gradcheck(call, (*terms, *gates))
    assert torch.autograd.gradgradcheck(call, (*terms, *gates))


@every_case
def test_needs(case: Case) -> None:
    """Catches a gradient that depends on which others are asked for, and one that is returned
    unasked."""
    input, terms, gates, grad = case.tensors(torch.float32)

    def backward(*needs: bool) -> tuple[Tensor, list[Tensor], Tensor]:
        active = torch.tensor(case.active)
        return ops.series_conv2d_backward(grad, input, terms, active, gates, *case.geometry, needs)

    grad_input, grad_terms, grad_gates = backward(True, True, case.gated)
    for needs in product([True, False], repeat=3):
        some_input, some_terms, some_gates = backward(*needs)
        assert torch.equal(some_input, grad_input) if needs[0] else some_input.numel() == 0
        assert all(map(torch.equal, some_terms, grad_terms)) if needs[1] else some_terms == []
        assert (
            torch.equal(some_gates, grad_gates)
            if needs[2] and case.gated
            else some_gates.numel() == 0
        )


@pytest.mark.parametrize("active", [1, 2, 3])
def test_gradients_beyond_active_are_zero(active: int) -> None:
    """Catches gradients of unused parameters, and none at all, for which DistributedDataParallel
    would wait."""
    case = CASES["gated"]
    input, *terms, gates = leaves(case)
    series_conv2d(input, terms, active, gates=gates).sum().backward()
    for i, term in enumerate(terms):
        assert term.grad is not None
        assert bool(term.grad.any()) == (i < active)
        assert bool(gates.grad[i]) == (i < active)


@every_backend
@pytest.mark.parametrize("gated", [False, True])
def test_two_sizes_before_one_backward(backend: str, gated: bool) -> None:
    """Catches an ``active`` that is kept by reference: the first call's gradient would be that of
    the second's size."""
    case = CASES["gated" if gated else "plain"]
    stride, padding, dilation = case.geometry
    arguments = leaves(case)
    input, terms = arguments[0], arguments[1:4]
    gates = arguments[4] if gated else None

    def loss(active: int) -> Tensor:
        output = series_conv2d(
            input, terms, active, stride=stride, padding=padding, dilation=dilation, gates=gates
        )
        return output.square().sum()

    with use_backend(backend):
        alone = [
            torch.autograd.grad(loss(active), arguments, materialize_grads=True)
            for active in (1, 3)
        ]
        first = loss(1)
        together = torch.autograd.grad(first + loss(3), arguments, materialize_grads=True)
    for a, b, both in zip(*alone, together, strict=True):
        torch.testing.assert_close(a + b, both, rtol=1e-12, atol=1e-12)


def test_active_tensor_is_not_written_to() -> None:
    """Catches a backward that does not notice ``active`` being overwritten in place: torch must
    refuse, not mislead."""
    case = CASES["plain"]
    input, *terms = leaves(case)
    active = torch.tensor(1)
    output = series_conv2d(input, terms, active)
    active.fill_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def step(layer: GroSSConv2d, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Output and all gradients."""
    input = torch.randn(2, 8, 5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    output = call(input)
    return [output, *torch.autograd.grad(output.square().sum(), [input, *layer.parameters()])]


@every_way
def test_checkpoint(fused: bool) -> None:
    """Catches a forward pass that cannot be run again for the backward pass, or that keeps what it
    should drop."""
    layer = GroSSConv2d(8, 8, 3, padding=1, group_sizes=(2, 4), relu=True)
    kept: list[Tensor] = []

    def recomputed(input: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            return checkpoint(layer, input, use_reentrant=False)

    with use_fused(fused):
        expected, results = step(layer, layer), step(layer, recomputed)
    assert all(map(torch.equal, results, expected))
    assert all(tensor.shape == (2, 8, 5, 4) for tensor in kept)


@every_way
def test_saved_tensors_on_disk(fused: bool) -> None:
    """Catches a backward pass that reads tensors past torch's hooks: here they come back as
    copies."""
    layer = GroSSConv2d(8, 8, 3, padding=1, group_sizes=(2, 4), relu=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().numpy().copy(), torch.from_numpy
    )

    def stored(input: Tensor) -> Tensor:
        with hooks:
            return layer(input)

    with use_fused(fused):
        assert all(map(torch.equal, step(layer, stored), step(layer, layer)))


@every_way
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_python_of_autograd_without_gradients(mode: Callable, fused: bool) -> None:
    """Catches calls that enter the Python implementation of the Autograd key for nothing: 5 µs
    each."""
    layer, input = GroSSConv2d(8, 8, 3, padding=1, group_sizes=(2, 4)), torch.randn(2, 8, 5, 4)
    entered: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_qualname == "_register_flat.<locals>.autograd":
            entered.append(event)

    with mode(), use_fused(fused):
        sys.setprofile(note)
        layer(input)
        sys.setprofile(None)
    assert len(entered) == (0 if mode is not torch.enable_grad else 1 if fused else 3)


# torch.library ----------------------------------------------------------------------------------

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
]


@every_case
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_forward(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], requires_grad: bool
) -> None:
    """Catches a schema, fake kernel or autograd registration that torch.compile would stumble
    over."""
    input, *terms = (t.detach().requires_grad_(requires_grad) for t in leaves(case, *dtypes))
    gates = terms.pop() if case.gated else None
    torch.library.opcheck(
        ops.series_conv2d, (input, terms, torch.tensor(case.active), gates, *case.geometry)
    )


@every_case
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_opcheck_backward(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], needs: tuple[bool, bool, bool]
) -> None:
    """Catches the same in the backward operator, for every kind of returned gradient."""
    input, terms, gates, grad = case.tensors(*dtypes)
    torch.library.opcheck(
        ops.series_conv2d_backward,
        (grad, input, terms, torch.tensor(case.active), gates, *case.geometry, list(needs)),
    )


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_sum(
    dtypes: tuple[torch.dtype, torch.dtype], gated: bool, requires_grad: bool
) -> None:
    """Catches the same in the sum of pointwise weights."""
    terms = [
        torch.randn(3, 2, 1, 1, dtype=dtypes[0], requires_grad=requires_grad) for _ in range(3)
    ]
    gates = torch.randn(3, dtype=dtypes[1], requires_grad=requires_grad) if gated else None
    torch.library.opcheck(ops.series_sum, (terms, torch.tensor(2), gates))
