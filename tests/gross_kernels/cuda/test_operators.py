"""From the backend's Python functions through the library to the kernels, on the host: values
against the float64 definition, and what the library makes of arguments that kernels do not take as
they are."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy import Target, assert_accurate
from case import Case
from layouts import LAYOUTS
from torch import Tensor

from gross_kernels.backends import cuda
from gross_kernels.series import Series

TYPES = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
]
COMMON = {"kernel_size": (3, 3), "padding": (1, 1), "channels_last": True}
#: What every kernel has to serve: packing, widths, strides, small maps, inactive terms.
CASES = {
    "groups of 1": Case(2, 32, 32, (1,), size=(5, 6), **COMMON),
    "a series to 16": Case(2, 64, 64, (1, 4, 16), size=(7, 7), active=3, gated=True, **COMMON),
    "groups of 32": Case(1, 64, 64, (1, 8, 32), size=(6, 5), active=3, **COMMON),
    "groups of 64": Case(1, 64, 64, (4, 64), size=(4, 9), active=2, gated=True, **COMMON),
    "larger terms that are inactive": Case(
        1, 256, 256, (2, 16, 256), size=(3, 4), active=2, gated=True, **COMMON
    ),
    "odd sizes": Case(2, 24, 24, (1, 3), size=(5, 9), active=2, gated=True, **COMMON),
    "groups of 11": Case(1, 88, 88, (11,), size=(4, 5), **COMMON),
    "groups of 56": Case(1, 56, 56, (7, 56), size=(3, 6), active=2, **COMMON),
    "twice as many outputs": Case(2, 32, 64, (2, 8), size=(6, 5), active=2, gated=True, **COMMON),
    "half as many outputs": Case(2, 64, 32, (2, 16), size=(6, 5), active=2, gated=True, **COMMON),
    "stride 2": Case(
        2, 64, 64, (1, 16), size=(8, 7), stride=(2, 2), active=2, gated=True, **COMMON
    ),
    "stride 2, wider": Case(1, 32, 64, (4, 32), size=(5, 10), stride=(2, 2), active=2, **COMMON),
    "one pixel": Case(3, 32, 32, (2, 4), size=(1, 1), active=2, **COMMON),
    "a wide image": Case(1, 16, 16, (1, 8), size=(3, 150), active=2, **COMMON),
}


@pytest.fixture
def plain(operators: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend with the plain kernels in place of the fast ones."""
    names = ("forward", "input_grad", "weight_grad")
    slow = {name: SimpleNamespace(default=getattr(operators, f"plain_{name}")) for name in names}
    monkeypatch.setattr(cuda, "_operators", lambda: SimpleNamespace(**slow))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("dtypes", [*TYPES, (torch.float64, torch.float64)], ids=str)
@pytest.mark.parametrize(
    "name", ["larger terms that are inactive", "odd sizes", "half as many outputs", "stride 2"]
)
def test_plain_kernels(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Catches a second reference that is no reference."""
    # Gates are float32 on the device.
    case = replace(CASES[name], gated=CASES[name].gated and dtypes[0] != torch.float64)
    target = Target("cuda", "cpu", *dtypes)
    arguments = target.arguments(case)
    assert_accurate(target.run(case, *arguments), case, arguments)


#: For warpgroups: lines of several images and of one in parts, fewer rows than teams, odd heights,
#: channels to spare.
WIDE = {
    "32, lines of images": Case(5, 64, 64, (8, 32), size=(7, 7), active=2, gated=True, **COMMON),
    "32, lines in parts": Case(1, 32, 32, (1, 32), size=(5, 130), active=2, **COMMON),
    "32, twice as many outputs": Case(
        2, 64, 128, (16, 32), size=(5, 28), active=2, gated=True, **COMMON
    ),
    "64, lines of images": Case(9, 128, 128, (4, 64), size=(6, 4), active=2, gated=True, **COMMON),
    "64, lines in parts": Case(2, 64, 64, (2, 8, 64), size=(3, 57), active=3, **COMMON),
    "64, one pixel": Case(3, 64, 64, (64,), size=(1, 1), gated=True, **COMMON),
    "40 of 64": Case(2, 40, 40, (5, 40), size=(9, 6), active=2, gated=True, **COMMON),
    "half as many outputs": Case(2, 128, 64, (16, 32), size=(4, 9), active=2, gated=True, **COMMON),
}


@pytest.mark.usefixtures("on_host", "poisoned")
@pytest.mark.parametrize("dtypes", TYPES[:4], ids=str)
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_kernels_for_warpgroups(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Catches a wrong value of the kernels for warpgroups, and memory left unwritten."""
    target = Target("cuda", "cpu", *dtypes)
    arguments = target.arguments(case)
    assert_accurate(target.run(case, *arguments), case, arguments)


#: In these 16 channels on one side see more than 32 on the other, which is too much for TF32:
#: Triton serves them.
TOO_WIDE_FOR_TF32 = {"groups of 11", "groups of 56", "groups of 64", "stride 2, wider"}
SERVED = [
    (name, types)
    for name in CASES
    for types in TYPES
    if types[0] != torch.float32 or name not in TOO_WIDE_FOR_TF32
]


@pytest.mark.usefixtures("on_host", "poisoned")
@pytest.mark.parametrize(("name", "dtypes"), SERVED, ids=str)
def test_kernels(operators: Any, name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Catches a wrong value of any other kernel, for any packing of channels and any dtype, and
    memory left unwritten."""
    case = CASES[name]
    operators.set_warpgroups(False)
    target = Target("cuda", "cpu", *dtypes)
    arguments = target.arguments(case)
    assert_accurate(target.run(case, *arguments), case, arguments, tf32=dtypes[0] == torch.float32)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """Catches a tensor that is read as if it were dense: gradients come in any layout, terms as in
    memory-format conversions of a model."""
    case, target = CASES["a series to 16"], Target("cuda", "cpu", torch.bfloat16, torch.float32)
    input, terms, gates, grad = target.arguments(case)
    expected = target.run(case, input, terms, gates, grad)
    change = LAYOUTS[layout]
    results = target.run(case, change(input), [change(term) for term in terms], gates, change(grad))
    assert all(map(torch.equal, results, expected))
    assert all(result.is_contiguous(memory_format=torch.channels_last) for result in results[:2])
    assert all(result.is_contiguous() for result in results[2:])


def shifted(tensor: Tensor) -> Tensor:
    """The same tensor, one element past an aligned address."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    copy = storage[1:].as_strided(tensor.shape, tensor.stride())
    assert copy.copy_(tensor).data_ptr() % 16 != 0
    return copy


@pytest.mark.usefixtures("on_host")
def test_alignment() -> None:
    """Catches loads of 16 bytes from tensors that begin elsewhere."""
    case, target = CASES["a series to 16"], Target("cuda", "cpu", torch.bfloat16, torch.float32)
    input, terms, gates, grad = target.arguments(case)
    expected = target.run(case, input, terms, gates, grad)
    results = target.run(
        case, shifted(input), [shifted(term) for term in terms], shifted(gates), shifted(grad)
    )
    assert all(map(torch.equal, results, expected))


@pytest.mark.usefixtures("on_host")
def test_gradient_that_is_one_number() -> None:
    """Catches strides of zero, as the gradient of a sum has them, taken for a dense tensor."""
    case, target = CASES["a series to 16"], Target("cuda", "cpu", torch.bfloat16, torch.float32)
    input, terms, gates, grad = target.arguments(case)
    ones = torch.ones_like(grad)
    results = target.run(case, input, terms, gates, ones[:1, :1, :1, :1].expand_as(grad))
    assert all(map(torch.equal, results, target.run(case, input, terms, gates, ones)))


@pytest.mark.usefixtures("on_host")
def test_no_images() -> None:
    """Catches a launch for a batch of none, and gradients of terms that stay unwritten."""
    case = replace(CASES["a series to 16"], batch=0)
    target = Target("cuda", "cpu", torch.bfloat16, torch.float32)
    output, grad_input, *rest = target.run(case, *target.arguments(case))
    assert (output.shape, grad_input.shape) == (case.output_shape, (0, 64, 7, 7))
    assert not any(each.any() for each in rest)


@pytest.mark.usefixtures("on_host")
def test_narrow_gates() -> None:
    """Catches gates read as float32 that are not, and gradients of another dtype than theirs."""
    case, target = CASES["a series to 16"], Target("cuda", "cpu", torch.bfloat16, torch.float32)
    input, terms, gates, grad = target.arguments(case)
    narrow = gates.bfloat16()
    results = target.run(case, input, terms, narrow, grad)
    expected = target.run(case, input, terms, narrow.float(), grad)
    assert all(map(torch.equal, results, [*expected[:-1], expected[-1].bfloat16()]))
    strided = torch.stack([gates, gates], 1)[:, 0]
    assert all(
        map(
            torch.equal,
            target.run(case, input, terms, strided, grad),
            target.run(case, input, terms, gates, grad),
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum(on_host: ModuleType, dtype: torch.dtype) -> None:
    """Catches a sum that is not the definition's, counts inactive terms or rounds more than
    once."""
    terms = [torch.randn(30, 7, 1, 1).to(dtype) for _ in range(5)]
    gates = torch.randn(5)
    exact = sum(gate.double() * term.double() for gate, term in zip(gates[:3], terms, strict=False))
    assert torch.equal(on_host.series_sum(Series(terms, 3, gates)), exact.float().to(dtype))
    strided = [torch.cat([term, term], 1)[:, 7:] for term in terms]
    assert torch.equal(
        on_host.series_sum(Series(strided, 2)),
        (terms[0].double() + terms[1].double()).float().to(dtype),
    )


INPUT = torch.randn(2, 16, 4, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
TERMS = [torch.randn(32, s, 3, 3) for s in (1, 4)]
GRAD = torch.randn(2, 32, 4, 5, dtype=torch.bfloat16)
WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "dimensions": ("input: accepted is", lambda o: o.forward(INPUT[0], TERMS, 1, None, 1)),
    "dtype": ("input: accepted dtypes", lambda o: o.forward(INPUT.long(), TERMS, 1, None, 1)),
    "terms' dtype": (
        "terms: accepted is the input's",
        lambda o: o.forward(INPUT.double(), TERMS, 1, None, 1),
    ),
    "no terms": ("terms: got 0", lambda o: o.forward(INPUT, [], 1, None, 1)),
    "too many terms": ("terms: got 17", lambda o: o.forward(INPUT, TERMS[:1] * 17, 1, None, 1)),
    "kernel size": (
        r"terms\[1\]: accepted is",
        lambda o: o.forward(INPUT, [TERMS[0], TERMS[1][..., :2]], 1, None, 1),
    ),
    "nesting": (
        r"terms\[1\]: group size 4 does not",
        lambda o: o.forward(INPUT, TERMS[1:] * 2, 1, None, 1),
    ),
    "widths": (
        "group size 1 does not nest in 12",
        lambda o: o.forward(INPUT[:, :12], TERMS, 1, None, 1),
    ),
    "active": ("active: got 3, accepted is 1 to 2", lambda o: o.forward(INPUT, TERMS, 3, None, 1)),
    "gates": (
        "gates: accepted is one per term",
        lambda o: o.forward(INPUT, TERMS, 1, torch.ones(3), 1),
    ),
    "gates' dtype": (
        "gates: got float64",
        lambda o: o.forward(INPUT, TERMS, 1, torch.ones(2).double(), 1),
    ),
    "stride": ("stride: got 3", lambda o: o.forward(INPUT, TERMS, 1, None, 3)),
    "no pixels": (
        "input: accepted is at least one",
        lambda o: o.forward(INPUT[:, :, :0], TERMS, 1, None, 1),
    ),
    "gradient": ("grad: accepted is", lambda o: o.input_grad(GRAD, INPUT, TERMS, 1, None, 2)),
    "gradient's dtype": (
        "grad: accepted is",
        lambda o: o.weight_grad(GRAD.float(), INPUT, TERMS, 1, None, 1),
    ),
    "unserved": (
        "there is no kernel",
        lambda o: o.forward(INPUT[:, :3], [torch.ones(3, 1, 3, 3)], 1, None, 1),
    ),
    "sum's shapes": (r"terms\[1\]: accepted is the shape", lambda o: o.series_sum(TERMS, 2, None)),
    "operation": (
        "operation: got backward",
        lambda o: o.supports("backward", *[torch.half] * 2, 8, 8, 1, 1, [90, 4, 9]),
    ),
    "device": (
        "device: accepted is what",
        lambda o: o.supports("forward", *[torch.half] * 2, 8, 8, 1, 1, []),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what: str, operators: Any) -> None:
    """Catches a call that reaches a kernel with arguments that it trusts, whoever calls the
    operator."""
    message, call = WRONG[what]
    with pytest.raises(RuntimeError, match=message):
        call(operators)
