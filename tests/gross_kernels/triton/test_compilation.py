"""Every Triton kernel compiled for GPUs that are not here: no spills in a loop, shared memory
within limits, the matrix unit used, 128-bit loads and stores where channels-last allows them."""

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from ahead_of_time import SHARED, TARGETS, Compiled, compile_for
from case import Case
from packing import CASES as PACKING
from packing import WARP_GROUP_CASES

from gross_kernels.backends.triton import tiles
from gross_kernels.backends.triton.launch import Kernel, layout
from gross_kernels.epilogue import Epilogue
from gross_kernels.geometry import Geometry

# The package's names are the functions.
PACKAGE = "gross_kernels.backends.triton"
forward, weight_grad, sums, pairs, pools = (
    importlib.import_module(f"{PACKAGE}.{name}")
    for name in ("forward", "weight_grad", "series_sum", "grouped_pointwise", "sum_pool")
)


def powers(
    most: int, channels: int = 64, kernel: tuple[int, int] = (3, 3), stride: int = 1
) -> Case:
    """Every power of two to ``most`` as a term, all active, with gates: the most registers that a
    size needs."""
    sizes = tuple(2**i for i in range(most.bit_length()))
    padding = (kernel[0] // 2, kernel[1] // 2)
    return Case(
        2, channels, channels, sizes, kernel, (16, 16), (stride, stride), padding,
        active=len(sizes), gated=True, channels_last=True,
    )  # fmt: skip


CASES = {
    "16": powers(16),
    "32": powers(32),
    "64": powers(64),
    "512": powers(512, channels=512),
    "16 strided": powers(16, stride=2),
    "64 strided": powers(64, stride=2),
    "16 of 5×5": powers(16, kernel=(5, 5)),
    "16 of 7×7": powers(16, kernel=(7, 7)),
    "16 of 1×1": powers(16, kernel=(1, 1)),
    "18": Case(
        2,
        18,
        18,
        (3, 9, 18),
        (3, 3),
        (16, 16),
        padding=(1, 1),
        active=3,
        gated=True,
        channels_last=True,
    ),
    "one of 8": Case(
        2, 8, 8, (2, 8), (3, 3), (16, 16), padding=(1, 1), active=2, gated=True, channels_last=True
    ),
}
DTYPES = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "ieee": (torch.float32, "ieee"),
}
KERNELS = ("forward", "input gradient", "weight gradient")
#: Each kernel once (``march``, ``gather``, ``accumulate``), compiled in every run.
DEFAULT = {
    ("sm_90", "bfloat16", kernel, case)
    for kernel, case in (("forward", "16"), ("forward", "512"), ("weight gradient", "16"))
}
#: What ``-m build`` adds: every architecture and every dtype. The rest is a sweep of 15 minutes.
BUILT = {
    *((arch, "bfloat16", kernel, "16") for arch in TARGETS for kernel in KERNELS),
    *((arch, "bfloat16", kernel, "64") for arch in TARGETS for kernel in KERNELS[::2]),
    *(
        ("sm_90", "bfloat16", kernel, case)
        for kernel in KERNELS
        for case in ("32", "64", "16 strided")
    ),
    *(("sm_90", "bfloat16", kernel, "512") for kernel in KERNELS[:2]),
    *((arch, "tf32", kernel, "16") for arch in TARGETS for kernel in KERNELS),
    *((arch, "float16", "forward", "16") for arch in TARGETS),
    *((arch, "ieee", kernel, "16") for arch in TARGETS for kernel in KERNELS[::2]),
    *(
        (arch, "tf32x3", kernel, "16")
        for arch in ("sm_80", "sm_90", "sm_100")
        for kernel in KERNELS[::2]
    ),
}


def every() -> Iterator[object]:
    for arch in TARGETS:
        for dtype in DTYPES:
            if arch.startswith("gfx") and dtype == "tf32x3":
                continue  # No three passes of TF32: AMD's matrix unit has strict float32.
            for kernel in KERNELS:
                for case in CASES:
                    key = (arch, dtype, kernel, case)
                    mark = pytest.mark.build if key in BUILT else pytest.mark.sweep
                    yield pytest.param(*key, marks=() if key in DEFAULT else mark)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Kernel, tuple], Compiled]:
    """Compile for an architecture; plans ask it of the device, which is not here."""

    def build(arch: str, make: Callable[[], tuple[Kernel, tuple]]) -> Compiled:
        for module in (forward, weight_grad, pairs):
            monkeypatch.setattr(module, "architecture", lambda device: arch)
        return compile_for(arch, *make())

    return build


def correlation(
    case: Case, dtype: torch.dtype, precision: str, transposed: bool
) -> tuple[Kernel, tuple]:
    """The kernel of the forward pass or the input gradient, and its tensors."""
    input, terms, gates, grad = case.tensors(dtype, torch.float32)
    source, result = (grad, input) if transposed else (input, grad)
    call = forward.Call(
        transposed, layout(source), result.shape, result.stride(),
        tuple(map(layout, terms)), layout(gates),
        case.geometry, precision, None,
    )  # fmt: skip
    tile = tiles.correlation(forward.shape_of(call))[0]
    return forward.plan(call, tile), (source, result, tuple(terms), gates)


def gradient(
    case: Case, dtype: torch.dtype, precision: str
) -> tuple[weight_grad.Plan, tuple, tuple]:
    """Both passes of the weight gradient, and the tensors of each."""
    input, terms, gates, grad = case.tensors(dtype, torch.float32)
    used = tuple(map(layout, terms))
    call = weight_grad.Call(
        layout(input), layout(grad), used, layout(gates), False, case.geometry, precision, None
    )
    plan = weight_grad.plan_of(call, tiles.weight_gradient(weight_grad.shape_of(call))[0])
    partial = torch.empty(16)
    return (
        plan,
        (input, grad, partial),
        (partial, tuple(terms), gates, tuple(terms), torch.empty(16)),
    )


#: Bytes of a thread's stack. What lies there is read and written once for a tile of many rows, by
#: some versions of Triton: three to five numbers of the weight gradient's addresses, and weights
#: while ``march`` assembles them, 216 loads of each thread together.
MOST_STACK, MOST_STACK_OF_MARCH = 48, 768


@pytest.mark.parametrize(("arch", "dtype", "kernel", "case"), list(every()))
def test_resources(arch: str, dtype: str, kernel: str, case: str, compiled: Callable) -> None:
    """Catches registers spilled in the loop over the rows, too much shared memory, a kernel that
    misses the matrix unit or reads in small pieces."""
    number, precision = DTYPES[dtype]

    def make() -> tuple[Kernel, tuple]:
        if kernel == "weight gradient":
            plan, tensors, _ = gradient(CASES[case], number, precision)
            return plan.accumulate, tensors
        return correlation(CASES[case], number, precision, kernel == "input gradient")

    result = compiled(arch, make)
    assert result.spilled_in_loops == 0
    assert result.stack <= (MOST_STACK_OF_MARCH if result.name == "march" else MOST_STACK)
    assert result.shared <= SHARED[arch]
    assert bool(result.matrix) == (dtype != "ieee" or arch.startswith("gfx"))
    if case not in ("18", "one of 8"):
        assert result.wide_loads > 0
        # Groups of 64 on 8 warps leave 4 elements of the result to a thread.
        assert (
            result.wide_stores > 0 or kernel == "weight gradient" or case.startswith(("32", "64"))
        )
    if (
        tiles.WARP_GROUPS
        and arch == "sm_90"
        and kernel != "weight gradient"
        and dtype in ("bfloat16", "tf32")
        and case == "32"
    ):
        assert "wgmma.mma_async" in result.assembly


#: By name: channels everywhere, largest group, output channels, and what follows.
PAIRS = {
    "256": (256, 4, 256, Epilogue(torch.empty(256), torch.empty(0), "relu")),
    "512 of 64": (512, 64, 512, Epilogue(torch.empty(512), None, "silu")),
    "64 of 32": (
        64, 32, 64, Epilogue(torch.empty(64), torch.empty(0), "prelu", torch.empty(64), True),
    ),
}  # fmt: skip
#: Compiled in every run, and with ``-m build``: all architectures and dtypes of the largest tile.
DEFAULT_PAIR = ("sm_90", "bfloat16", "256")
BUILT_PAIRS = {
    *((arch, dtype, "256") for arch in TARGETS for dtype in ("bfloat16", "tf32")),
    *(("sm_90", "bfloat16", name) for name in PAIRS),
    *(("sm_90", dtype, "64 of 32") for dtype in ("tf32x3", "ieee")),
}


def every_pair() -> Iterator[object]:
    for arch in TARGETS:
        for dtype in DTYPES:
            for name in PAIRS:
                key = (arch, dtype, name)
                if not (arch.startswith("gfx") and dtype == "tf32x3"):
                    mark = pytest.mark.build if key in BUILT_PAIRS else pytest.mark.sweep
                    yield pytest.param(*key, marks=() if key == DEFAULT_PAIR else mark)


def pair_of(name: str, dtype: torch.dtype, precision: str) -> tuple[Kernel, tuple]:
    """The kernel of grouped and last convolution, and its tensors."""
    channels, size, out_channels, epilogue = PAIRS[name]
    input = torch.empty(8, channels, 56, 56, dtype=dtype).to(memory_format=torch.channels_last)
    output = torch.empty(8, out_channels, 56, 56, dtype=dtype).to(memory_format=torch.channels_last)
    residual = None if epilogue.residual is None else output
    terms = (torch.empty(channels, 1, 3, 3), torch.empty(channels, size, 3, 3))
    last = (torch.empty(out_channels, channels, 1, 1),) * 2
    optional = (epilogue.bias, residual, epilogue.slopes)
    call = pairs.Layout(
        layout(input), tuple(map(layout, terms)), tuple(map(layout, last)), None,
        *(None if each is None else layout(each) for each in optional),
        epilogue.activation, epilogue.residual_last, Geometry((1, 1), (1, 1), (1, 1)), precision,
        None,
    )  # fmt: skip
    scratch = torch.empty(16, dtype=dtype)
    tensors = (input, output, scratch, scratch, epilogue.bias, epilogue.slopes, residual)
    return pairs.plan(call).product, tensors


@pytest.mark.parametrize(("arch", "dtype", "name"), list(every_pair()))
def test_resources_of_pairs(arch: str, dtype: str, name: str, compiled: Callable) -> None:
    """Catches sums or weights that do not fit the registers, too much shared memory, and products
    without the matrix unit, of grouped and last convolution in one kernel."""
    result = compiled(arch, lambda: pair_of(name, *DTYPES[dtype]))
    assert result.spilled_in_loops == 0
    assert result.stack <= MOST_STACK
    assert result.shared <= SHARED[arch]
    assert bool(result.matrix) == (dtype != "ieee" or arch.startswith("gfx"))
    assert result.wide_loads > 0
    assert result.wide_stores > 0


@pytest.mark.parametrize("taps", ["3×3", "2×2"])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input gradient"])
def test_weights_are_read_in_their_order(transposed: bool, taps: str, compiled: Callable) -> None:
    """Catches weights read across the terms' rows, every one from a line of its own, weights that
    the loop fetches from shared memory by single numbers, and numbers read four at a time where the
    kernel's taps lie between them."""
    height, width = map(int, taps.split("×"))
    case = powers(16, kernel=(height, width))
    result = compiled("sm_90", lambda: correlation(case, torch.bfloat16, "ieee", transposed))
    assert result.name == "march"
    assert result.orders == {(1, 2, 0) if transposed else (2, 1, 0)}
    assert result.wide_terms == 0
    assert not re.search(r"ld\.shared[.\w:]*\.[bu]16", result.assembly)
    # 16×16 weights of a tap are one instruction; what comes beside is the source's.
    assert result.assembly.count("ldmatrix") >= height * width


def warp_groups(name: str, arch: str, compiled: Callable) -> set[str]:
    """Which of the kernels of a case of packing.py use the instructions of warp groups."""
    case = replace(PACKING[name], gated=True)
    made: dict[str, Callable[[], tuple[Kernel, tuple]]] = {
        "forward": lambda: correlation(case, torch.bfloat16, "ieee", False),
        "input gradient": lambda: correlation(case, torch.bfloat16, "ieee", True),
        "weight gradient": lambda: (
            (found := gradient(case, torch.bfloat16, "ieee"))[0].accumulate, found[1]
        ),
    }  # fmt: skip
    return {kernel for kernel, make in made.items() if "wgmma.mma" in compiled(arch, make).assembly}


@pytest.mark.build
def test_first_are_the_cases_of_warp_groups(compiled: Callable) -> None:
    """Catches a list of what is to be checked first on a card that leaves out a kernel with the
    instructions of warp groups."""
    found = {name for name in PACKING if warp_groups(name, "sm_90", compiled)}
    assert found <= set(list(PACKING)[: len(WARP_GROUP_CASES)]) == set(WARP_GROUP_CASES)


@pytest.mark.parametrize(
    "arch",
    [
        "sm_90",
        *(pytest.param(each, marks=pytest.mark.build) for each in TARGETS if each != "sm_90"),
    ],
)
def test_small_kernels(arch: str, compiled: Callable) -> None:
    """Catches the same in the weight gradient's second pass and in the sum."""

    def distribute() -> tuple[Kernel, tuple]:
        plan, _, tensors = gradient(CASES["64"], torch.bfloat16, "ieee")
        return plan.distribute, tensors

    def add() -> tuple[Kernel, tuple]:
        terms = tuple(torch.empty(16, 64, 64, 1, 1))
        call = sums.Call(tuple(map(layout, terms)), layout(torch.empty(16)), None)
        return sums.plan(call), (torch.empty(64, 64, 1, 1), terms, torch.empty(16))

    result = compiled(arch, distribute)
    assert result.spilled_in_loops == 0
    assert result.stack <= MOST_STACK
    result = compiled(arch, add)
    assert result.stack == 0
    assert result.wide_loads >= 16
    assert result.wide_stores >= 1


def test_sums_over_windows(compiled: Callable) -> None:
    """Catches sums over windows that spill, or read channels-last images in small pieces."""
    shapes = (2, 64, 17, 17), (2, 64, 16, 16)
    target, source = (torch.empty(shape).to(memory_format=torch.channels_last) for shape in shapes)
    axis = pools.Axis(2, offset=-1)
    call = pools.Sums(1, pools.Axis(), axis, axis)

    def add() -> tuple[Kernel, tuple]:
        return pools.plan((target, source, source), call), (target, source, source)

    result = compiled("sm_90", add)
    assert result.stack == 0
    assert result.wide_loads >= 1
    assert result.wide_stores >= 1


def test_spills_are_seen(compiled: Callable) -> None:
    """Catches a reading of the compiler's report that finds no spills where there are: weights of
    128 lanes."""

    def make() -> tuple[Kernel, tuple]:
        input, terms, gates, grad = CASES["16"].tensors(torch.float32)
        call = forward.Call(
            False, layout(input), grad.shape, grad.stride(),
            tuple(map(layout, terms)), layout(gates),
            CASES["16"].geometry, "tf32x3", None,
        )  # fmt: skip
        return forward.plan(call, tiles.Tile(True, 64, 2, 16, 16, 2, 2)), (
            input,
            grad,
            tuple(terms),
            gates,
        )

    result = compiled("sm_90", make)
    assert result.stack > MOST_STACK
    assert result.spilled_in_loops > 0
