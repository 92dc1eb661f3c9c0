"""The Triton kernels by value, in Triton's interpreter; run by test_interpreter.py in a process of
its own."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import exact
import interpreter
import pytest
import torch
import triton
import triton.language as tl
import windows
from accuracy import Target, assert_accurate, definition, largest_error, tiny
from case import Case
from packing import CASES
from torch.utils._python_dispatch import TorchDispatchMode

from gross_kernels.backends.triton import launch, sum_pool, sum_pool_backward, tiles
from gross_kernels.backends.triton.geometry import Packs, axis
from gross_kernels.series import Series

# The package's names are the functions.
forward_module = importlib.import_module("gross_kernels.backends.triton.forward")
weight_module = importlib.import_module("gross_kernels.backends.triton.weight_grad")

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run(case: Case, dtype: torch.dtype, terms_dtype: torch.dtype) -> None:
    target = Target("triton", "cpu", dtype, terms_dtype)
    arguments = target.arguments(case)
    assert_accurate(target.run(case, *arguments), case, arguments)


@every_case
def test_bfloat16(case: Case) -> None:
    """Catches any wrong index, mask or step in the kernels for 16 bits, sums in 16 bits, and terms
    that are rounded one by one."""
    run(case, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", list(CASES)[::3])
def test_float32(name: str) -> None:
    """Catches the same to the last bits of float32, by three passes of TF32."""
    run(CASES[name], torch.float32, torch.float32)


@pytest.mark.parametrize("name", list(CASES)[1::8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_terms_of_16_bits(name: str, dtype: torch.dtype) -> None:
    """Catches terms and their gradients that are taken for float32."""
    run(CASES[name], dtype, dtype)


def test_many_slices() -> None:
    """Catches slices beyond those that the weight gradient's second pass loads at once."""
    run(Case(1, 16, 16, (4,), (1, 1), (150, 1), channels_last=True), torch.bfloat16, torch.float32)


@pytest.fixture
def one_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans for a GPU so small that every program has several tiles to do."""
    for module in (forward_module, weight_module):
        module._plans.clear()
        monkeypatch.setattr(module, "processors", lambda device: 1)
    yield
    for module in (forward_module, weight_module):
        module._plans.clear()


@pytest.mark.usefixtures("one_processor")
@pytest.mark.parametrize(
    "case", [CASES["rows in runs"], CASES["dilation"], replace(CASES["stride"], batch=50)], ids=str
)
def test_one_processor(case: Case) -> None:
    """Catches a program that does the first of its tiles alone, or mixes up the tiles' rows and
    phases."""
    run(case, torch.bfloat16, torch.float32)


@contextmanager
def precision(convolution: str, products: str) -> Iterator[None]:
    """torch's settings for float32."""
    before = torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()
    torch.backends.cudnn.conv.fp32_precision = convolution
    torch.set_float32_matmul_precision(products)
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before[0]
        torch.set_float32_matmul_precision(before[1])


PRECISE = ["many packs side by side", "5 of 16 lanes idle", "groups of 18"]


@pytest.mark.parametrize("name", PRECISE)
def test_strict(name: str) -> None:
    """Catches a strict call that reaches the matrix unit's kernels, or is wrong in its own."""
    with precision("ieee", "highest"):
        assert launch.float32_precision() == "ieee"
        run(CASES[name], torch.float32, torch.float32)


@pytest.mark.parametrize("name", PRECISE)
def test_tf32(name: str) -> None:
    """Catches TF32 that loses more than what the matrix unit cuts off of input and gradient,
    weights that are not rounded before, and a call that does not use it."""
    case = CASES[name]
    target = Target("triton", "cpu", torch.float32, torch.float32)
    input, terms, gates, grad = arguments = target.arguments(case)
    with precision("tf32", "highest"):
        results = target.run(case, *arguments)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(interpreter.cut_to_tf32(tensor.numpy()))

    # Rounded is the sum of the terms, not each.
    weight = exact.dense_weight(terms, case.active, gates, case.in_channels).float()
    in_channels = case.in_channels
    dense = replace_series(case, in_channels)
    rounded = torch.from_numpy(interpreter.to_tf32(weight.numpy()))
    theirs = definition(dense, cut(input), [rounded], None, cut(grad))
    truth = definition(dense, input, [weight], None, grad)
    magnitude = definition(dense, input.abs(), [weight.abs()], None, grad.abs())
    for ours, rival, value, size in zip(
        results[:2], theirs[:2], truth[:2], magnitude[:2], strict=True
    ):
        error = largest_error(ours, value)
        # The factors are the same to the last bit: what is left is the order of float32's sums.
        assert largest_error(ours, rival) <= tiny(torch.float32, value, size)
        assert error > 100 * torch.finfo(torch.float32).eps * value.abs().max() / 10
    true_gradients = definition(case, *arguments)[2:]
    sizes = definition(
        case,
        input.abs(),
        [t.abs() for t in terms],
        None if gates is None else gates.abs(),
        grad.abs(),
    )
    for ours, value, size in zip(results[2:], true_gradients, sizes[2:], strict=True):
        # Two factors, each short of up to 2⁻¹⁰.
        assert largest_error(ours, value) <= 2 * 2**-10 * size.max().item()


def replace_series(case: Case, in_channels: int) -> Case:
    """The same call with one dense term."""
    return Case(
        case.batch,
        in_channels,
        case.out_channels,
        (in_channels,),
        case.kernel_size,
        case.size,
        *case.geometry,
    )


# Plans ------------------------------------------------------------------------------------------


def test_plans_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Python work that is done again at every call, and a plan kept for a call that differs
    in what counts."""
    case = CASES["the tile's own size"]
    target = Target("triton", "cpu", torch.bfloat16, torch.float32)
    arguments = target.arguments(case)
    expected = target.run(case, *arguments)

    def refuse(*_: object) -> None:
        raise AssertionError("worked out anew")

    monkeypatch.setattr(forward_module, "prepare", refuse)
    monkeypatch.setattr(weight_module, "choose", refuse)
    assert all(map(torch.equal, target.run(case, *arguments), expected))
    input, terms, gates, grad = arguments
    for changed in (
        (input.contiguous(memory_format=torch.channels_last), terms, gates, grad),
        (input, terms, None, grad),
        (input, [term.bfloat16() for term in terms], gates.bfloat16(), grad),
        # Not at a multiple of 16 bytes, which the compiled kernel would take for granted.
        (torch.cat([input.flatten(), input.flatten()[:1]])[1:].view_as(input), terms, gates, grad),
    ):
        with pytest.raises(AssertionError, match="worked out anew"):
            target.run(case, *changed)


class Operators(TorchDispatchMode):
    """Notes what PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


def test_inactive_terms_are_cleared_together() -> None:
    """Catches a launch for every term that was not used."""
    input, terms, gates, grad = CASES["the tile's own size"].tensors(torch.float32)
    geometry = CASES["the tile's own size"].geometry
    with Operators() as operators:
        grads, _ = weight_module.weight_grad(grad, input, Series(terms, 1, gates), geometry)
    assert operators.names.count("_foreach_zero_") == 1
    assert "zero_" not in operators.names
    assert not any(unused.any() for unused in grads[1:])


# The proof's own tools --------------------------------------------------------------------------


@triton.jit
def double(source, result, count, BLOCK: tl.constexpr):
    element = tl.arange(0, BLOCK)
    tl.store(result + element, tl.load(source + element, element < count) * 2, element < count)


def test_addresses_are_checked() -> None:
    """Catches a guard that lets a kernel read or write beside its tensors."""
    memory = torch.ones(32)
    doubled = launch.Kernel(double, 1, (16, 16), 1, 1)
    doubled(memory[:16], memory[16:])
    assert memory.tolist() == [1.0] * 16 + [2.0] * 16
    for tensors in ((memory[:15], memory[16:]), (memory[:16], memory[17:])):
        with pytest.raises(
            triton.runtime.errors.InterpreterError, match="1 of 16 elements lie outside the tensors"
        ):
            doubled(*tensors)


def test_bfloat16_is_true() -> None:
    """Catches bfloat16 that is computed on its bits, or truncated."""
    values, result = (
        torch.tensor([1.0, 1.00390625, 3.0] + [0.1] * 13).bfloat16(),
        torch.empty(16, dtype=torch.bfloat16),
    )
    launch.Kernel(double, 1, (16, 16), 1, 1)(values, result)
    assert torch.equal(result, values * 2)


def test_empty_memory_is_poisoned() -> None:
    """Catches a run in which an element that is never written would look right."""
    assert torch.empty(3).isnan().all()


# Sums over windows ------------------------------------------------------------------------------

POOLINGS = {
    "3×3 to 2×2": ((2, 20, 5, 6), ((1, 2, 2), 1, (1, 1), (1, 1), (1, 1))),
    "a stride and groups": ((2, 12, 7, 9), ((3, 3, 3), 2, (2, 3), (2, 1), (1, 1))),
    "dilated": ((1, 5, 9, 9), ((2, 2, 3), 1, (1, 2), (0, 3), (3, 2))),
    "long": ((1, 40, 3, 4), ((21, 1, 1), 1, (1, 1), (0, 0), (1, 1))),
    "long in groups, and an image": ((2, 60, 4, 5), ((10, 2, 3), 3, (1, 1), (1, 1), (1, 2))),
    "many pixels": ((3, 2, 20, 30), ((2, 1, 1), 1, (1, 1), (0, 0), (1, 1))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", POOLINGS)
def test_sums_over_windows(name: str, channels_last: bool, dtype: torch.dtype) -> None:
    """Catches a window, a border or a group that is off by one, long windows cut wrongly, and sums
    in 16 bits."""
    shape, numbers = POOLINGS[name]
    format = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.randn(shape).to(dtype).contiguous(memory_format=format)
    wide = input.double().requires_grad_()
    expected = windows.sum_pool(wide, windows.Windows(*numbers))
    output = sum_pool(input, *numbers)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=format)
    grad = torch.randn(expected.shape).to(dtype).contiguous(memory_format=format)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    found = sum_pool_backward(grad, shape[1:], *numbers)
    for got, exact_sum in ((output, expected), (found, expected_grad)):
        # Every sum rounded once; of float32, added one by one.
        bound = (1 if dtype == torch.bfloat16 else 20) * torch.finfo(dtype).eps
        assert (got - exact_sum).abs().max() <= bound * exact_sum.abs().max()


# Geometry ---------------------------------------------------------------------------------------


@every_case
def test_axes(case: Case) -> None:
    """Catches an axis that leaves out or repeats a pair of input and output."""
    for transposed in (False, True):
        for n, (taps, stride, padding, dilation) in enumerate(
            zip(case.kernel_size, *case.geometry, strict=True)
        ):
            sizes = case.output_shape[2 + n], case.size[n]
            outputs, inputs = sizes
            expected = {
                (y, x, k)
                for y in range(outputs)
                for k in range(taps)
                if 0 <= (x := y * stride - padding + k * dilation) < inputs
            }
            line = axis(taps, stride, padding, dilation, transposed)
            results, sources = reversed(sizes) if transposed else sizes
            found = []
            for result, source, tap in line.phases:
                for t in range(line.steps(results)):
                    for i in range(line.taps):
                        at, to = (
                            source + (t * line.advance + i) * line.source_step,
                            result + t * line.result_step,
                        )
                        k = tap + i * line.tap_step
                        if to < results and 0 <= at < sources and 0 <= k < taps:
                            found.append((at, to, k) if transposed else (to, at, k))
            assert sorted(found) == sorted(expected)


def test_packs_by_hand() -> None:
    """Catches packs that overfill the tile on one side, or leave out the last groups."""
    assert Packs.of(64, 64, 16, 16) == (16, 16, 4)
    assert Packs.of(18, 12, 6, 16) == (15, 10, 2)
    assert Packs.of(6, 72, 6, 16) == (1, 12, 6)
    assert Packs.of(128, 64, 1, 32) == (128, 64, 1)
    assert Packs.of(4, 4, 2, 16) == (4, 4, 1)


def test_every_kernel_is_reached() -> None:
    """Catches cases that no longer reach a kernel or a way through it after the table has
    changed."""
    reached = set()
    for case in CASES.values():
        input, terms, _, grad = case.tensors(torch.bfloat16)
        x, dy, used = (
            launch.layout(input),
            launch.layout(grad),
            tuple(map(launch.layout, terms[: case.active])),
        )
        rest = (case.geometry, "ieee", None)
        call = forward_module.Call(False, x, grad.shape, grad.stride(), used, None, *rest)
        tile = tiles.correlation(forward_module.shape_of(call))[0]
        reached.add(("march" if tile.march else "gather", tile.parts > 1, tile.source))
        weight = tiles.weight_gradient(
            weight_module.shape_of(weight_module.Call(x, dy, used, None, False, *rest))
        )[0]
        reached.add(("accumulate", weight.parts > 1, weight.all_rows))
    assert reached == {
        *(("march", True, 16), ("march", False, 16), ("march", False, 32), ("march", False, 64)),
        *(("gather", False, 16), ("gather", False, 32)),
        *(("accumulate", True, True), ("accumulate", True, False), ("accumulate", False, False)),
    }
