"""Plans: what the host does for a call, every plan's values, and what measurements ask and
force."""

import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from accuracy import Target, assert_accurate
from case import Case
from torch import Tensor

from gross_kernels.backends import cuda
from gross_kernels.geometry import Geometry
from gross_kernels.series import Series

OPERATIONS = ("forward", "input_grad", "weight_grad")
COMMON = {"kernel_size": (3, 3), "padding": (1, 1), "channels_last": True}
#: Lines of several images and parts of images, one warp and warpgroups, both strides.
CASES = {
    "groups of 16": Case(5, 64, 64, (4, 16), size=(5, 7), active=2, gated=True, **COMMON),
    "groups of 32": Case(3, 64, 64, (8, 32), size=(6, 9), active=2, gated=True, **COMMON),
    "groups of 64": Case(2, 64, 64, (4, 64), size=(4, 9), active=2, gated=True, **COMMON),
    "stride 2": Case(3, 32, 32, (2, 16), size=(8, 7), stride=(2, 2), active=2, **COMMON),
}
H200 = (90, 132, 232448)


@pytest.fixture(autouse=True)
def settings(operators: Any) -> Iterator[None]:
    """Leaves nothing forced."""
    yield
    for operation in OPERATIONS:
        operators.set_plan(operation, -1)
    operators.set_passes(3)
    operators.set_warpgroups(True)


def asked(case: Case, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """A case as :func:`cuda.plans` takes it, without its numbers."""
    input = torch.empty(case.batch, case.in_channels, *case.size, dtype=dtype, device="meta")
    terms = [
        torch.empty(case.out_channels, s, 3, 3, dtype=dtype, device="meta")
        for s in case.group_sizes
    ]
    return input, Series(terms, case.active or len(terms)), Geometry(case.stride, (1, 1))


def run(
    operation: str,
    case: Case,
    input: Tensor,
    terms: list[Tensor],
    gates: Tensor | None,
    grad: Tensor,
) -> tuple[int, list[Tensor]]:
    """Results of one operation, and from where on :meth:`Target.run` lists them."""
    rest = (Series(terms, case.active, gates), case.geometry)
    if operation == "forward":
        return 0, [cuda.forward(input, *rest)]
    if operation == "input_grad":
        return 1, [cuda.input_grad(grad, input, *rest)]
    grad_terms, grad_gates = cuda.weight_grad(grad, input, *rest)
    return 2, grad_terms if grad_gates is None else [*grad_terms, grad_gates]


@pytest.mark.usefixtures("on_host")
def test_work_of_a_call(operators: Any) -> None:
    """Catches a plan that is made for every call, and an attribute of a kernel that is set again:
    microseconds of the host each."""
    case, target = CASES["groups of 16"], Target("cuda", "cpu", torch.bfloat16, torch.bfloat16)
    arguments = target.arguments(case)
    target.run(case, *arguments)
    planned, prepared, launched = operators.counts()
    for _ in range(3):
        target.run(case, *arguments)
    # Forward, input gradient, both passes of the weight gradient and its gates.
    assert operators.counts() == [planned, prepared, launched + 3 * 5]
    other = Case(4, 64, 64, (4, 16), size=(5, 7), active=2, gated=True, **COMMON)
    target.run(other, *target.arguments(other))
    assert operators.counts() == [planned + 3, prepared, launched + 4 * 5]


@pytest.mark.usefixtures("on_host")
def test_what_a_plan_depends_on(operators: Any) -> None:
    """Catches a plan kept for one kind of calls that serves another."""
    target = Target("cuda", "cpu", torch.bfloat16, torch.bfloat16)
    seen = []
    for case in (
        *(CASES["groups of 16"], CASES["groups of 32"], CASES["stride 2"]),
        Case(5, 64, 64, (4, 16), size=(5, 8), active=2, **COMMON),
        Case(5, 64, 64, (4, 16), size=(6, 7), active=2, **COMMON),
        Case(5, 64, 64, (2, 16), size=(5, 7), active=2, **COMMON),
        Case(5, 64, 64, (16,), size=(5, 7), active=1, **COMMON),
        Case(5, 64, 64, (4, 16), size=(5, 7), active=1, **COMMON),
        Case(5, 128, 64, (4, 16), size=(5, 7), active=2, **COMMON),
    ):
        before = operators.counts()[0]
        arguments = target.arguments(case)
        assert_accurate(target.run(case, *arguments), case, arguments)
        seen.append(operators.counts()[0] - before)
    # A test before this one may have run the first.
    assert seen[1:] == [3] * (len(seen) - 1) or seen == [0] * len(seen)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "name",
    [
        *("groups of 64", "stride 2"),
        *(pytest.param(name, marks=pytest.mark.build) for name in ("groups of 16", "groups of 32")),
    ],
)
def test_every_plan(name: str, operation: str, operators: Any) -> None:
    """Catches a plan that computes something else, which a sweep would time, or that is not the one
    which runs."""
    case, target = CASES[name], Target("cuda", "cpu", torch.bfloat16, torch.bfloat16)
    arguments = target.arguments(case)
    numbers = operators.device(0)
    plans = cuda.plans(operation, *asked(case), device=numbers)
    assert [each["chosen"] for each in plans].count(True) == 1
    least = min(plans, key=lambda each: each["clocks"])
    assert next(each for each in plans if each["chosen"])["clocks"] == least["clocks"]
    kernels = {each["kernel"] for each in plans}
    if operation != "weight_grad" and case.stride == (1, 1):
        assert ("march_wide" in kernels) == (max(case.group_sizes) > 16)
    results = target.run(case, *arguments)
    for number, plan in enumerate(plans):
        with cuda.forced(operation, number):
            place, result = run(operation, case, *arguments)
        results[place : place + len(result)] = result
        assert_accurate(results, case, arguments)
        assert json.loads(operators.ran(operation)) == plan | {"chosen": True}
    with cuda.forced(operation, len(plans)), pytest.raises(RuntimeError, match="has no plan"):
        run(operation, case, *arguments)


@pytest.mark.usefixtures("on_host")
def test_without_warpgroups(operators: Any) -> None:
    """Catches numbers of plans that change when warpgroups are switched off, and warpgroups that
    run nevertheless."""
    case = CASES["groups of 64"]
    numbers = operators.device(0)
    everything = cuda.plans("forward", *asked(case), device=numbers)
    operators.set_warpgroups(False)
    single = cuda.plans("forward", *asked(case), device=numbers)
    strip = [[plan | {"chosen": False} for plan in plans] for plans in (everything, single)]
    assert strip[0][: len(single)] == strip[1]
    assert {plan["kernel"] for plan in everything[len(single) :]} == {"march_wide"}
    target = Target("cuda", "cpu", torch.bfloat16, torch.bfloat16)
    target.run(case, *target.arguments(case))
    assert json.loads(operators.ran("forward"))["kernel"] == "march"


def test_passes_apart(on_host: ModuleType, operators: Any) -> None:
    """Catches a pass that runs when the other alone is measured."""
    case, target = CASES["groups of 16"], Target("cuda", "cpu", torch.bfloat16, torch.bfloat16)
    input, terms, gates, grad = target.arguments(case)
    counted = []
    for passes in (1, 2, 3):
        operators.set_passes(passes)
        before = operators.counts()[2]
        on_host.weight_grad(
            grad, input, Series(terms, case.active, gates), Geometry(padding=(1, 1))
        )
        counted.append(operators.counts()[2] - before)
    assert counted == [1, 2, 3]


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_possible_share(operation: str) -> None:
    """Catches a bound that is none: more than a copy, or nothing read twice where shares are a few
    rows."""
    shares = {}
    for size in (112, 7):
        case = Case(128, 512, 512, (4, 16), size=(size, size), active=2, **COMMON)
        shares[size] = cuda.possible_share(operation, *asked(case), device=H200)
    assert 0.9 < shares[112] < 1
    assert shares[7] < 0.9
    with pytest.raises(ValueError, match="operation: got"):
        cuda.possible_share(operation, *asked(case, torch.float64), device=H200)


def test_product_clocks(operators: Any) -> None:
    """Catches a measurement that does not run, or whose offset is no address of the products."""
    assert operators.product_clocks(torch.empty(1), 32).shape == (4,)
    for wrong in (8, 128, -16):
        with pytest.raises(RuntimeError, match=f"offset: got {wrong}"):
            operators.product_clocks(torch.empty(1), wrong)


WRONG = {
    "operation: got backward": lambda o: o.set_plan("backward", 0),
    "plan: got -2": lambda o: o.set_plan("forward", -2),
    "passes: got 0": lambda o: o.set_passes(0),
    "shape: accepted is": lambda o: o.plans("forward", *[torch.half] * 2, [1, 8], [8], 1, H200),
    r"group_sizes\[1\]: 3": lambda o: o.plans(
        "forward", *[torch.half] * 2, [1, 24, 5, 5, 24], [2, 3], 1, H200
    ),
    "stride: got 3": lambda o: o.plans("forward", *[torch.half] * 2, [1, 8, 5, 5, 8], [8], 3, H200),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message: str, operators: Any) -> None:
    """Catches a misspelt setting that is taken for another."""
    with pytest.raises(RuntimeError, match=message):
        WRONG[message](operators)
