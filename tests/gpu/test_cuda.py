"""The CUDA C++ kernels on a GPU. Every primitive alone first: the emulator, on which all else was
tested, shares its reading of the PTX manual with the kernels. Then the plain kernels, then every
kernel."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accuracy import Target, assert_accurate
from case import Case
from larger import DEVICE, DRY, LARGER, TYPICAL
from torch import Tensor

from gross_kernels import explain, series_conv2d, use_backend
from gross_kernels.backends import cuda

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("primitives.cu")
PRIMITIVES = [
    *("copies", "matrices", "float16 products", "bfloat16 products", "TF32 products"),
    *("conversions", "accesses", "exchanges"),
]
WARPGROUP_PRIMITIVES = [
    *("float16 warpgroup products", "bfloat16 warpgroup products"),
    "bfloat16 warpgroup products from the next pixel on",
    "float16 warpgroup products of 64 columns from the next pixel on",
    "bfloat16 warpgroup products of 64 columns from the second pixel on",
]
TYPES = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]
COMMON = {"kernel_size": (3, 3), "padding": (1, 1), "channels_last": True}
#: Each group size and width, each stride, maps of all sizes.
CASES = {
    **{
        f"groups of {s}{'/2' if stride == 2 else ''}": Case(
            3, channels, channels, (s,), size=(9, 14), stride=(stride, stride), gated=True, **COMMON
        )
        for s in (1, 2, 3, 4, 5, 7, 8, 9, 11, 14, 15, 16, 28, 32, 56, 64)
        for channels in [128 if 128 % s == 0 else 56 if s == 56 else 8 * s]
        for stride in (1, 2)
    },
    **{
        f"{size} wide{'/2' if stride == 2 else ''}": Case(
            5, 64, 64, (1, 16), size=(7, size), stride=(stride, stride), active=2, **COMMON
        )
        for size in (1, 2, 3, 4, 7, 8, 14, 16, 28, 32, 33, 57, 64, 112, 150)
        for stride in (1, 2)
    },
    "many terms": Case(
        2, 64, 64, (1, 2, 4, 8, 16, 32, 64), size=(8, 8), active=7, gated=True, **COMMON
    ),
    "twice as many outputs": Case(
        2, 64, 128, (4, 32), size=(14, 13), active=2, gated=True, **COMMON
    ),
    "half as many outputs": Case(
        2, 128, 64, (4, 32), size=(14, 13), active=2, gated=True, **COMMON
    ),
    "inactive terms": Case(
        2, 256, 256, (1, 16, 128, 256), size=(8, 8), active=2, gated=True, **COMMON
    ),
    **{name: case for name, case in LARGER.items() if case.channels_last},
}


# Primitives -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """primitives.cu for this GPU and for the emulator."""
    folder = tmp_path_factory.mktemp("primitives")
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    shared = ["-std=c++17", "-O1" if DRY else "-O2", "-shared", f"-I{ROOT / 'csrc/cuda'}"]
    on_host = ["-fPIC", f"-I{ROOT / 'tests/cuda_on_host'}", "-x", "c++"]
    subprocess.run(["c++", *shared, *on_host, SOURCE, "-o", folder / "host.so"], check=True)
    if DRY:
        shutil.copy(folder / "host.so", folder / "gpu.so")
    else:
        target = f"{capability}{'a' if capability == '90' else ''}"
        on_gpu = [f"-gencode=arch=compute_{target},code=sm_{target}", "-Xcompiler=-fPIC"]
        subprocess.run([nvcc(), *shared, *on_gpu, SOURCE, "-o", folder / "gpu.so"], check=True)
    return {name: ctypes.CDLL(str(folder / f"{name}.so")) for name in ("gpu", "host")}


def nvcc() -> str:
    """The CUDA compiler."""
    named = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"
    found = str(named) if named.exists() else shutil.which("nvcc")
    if found is None:
        pytest.fail("the primitives' test needs nvcc, in CUDA_HOME or on the PATH")
    return found


def run_primitive(library: ctypes.CDLL, name: str) -> Tensor:
    """What one block writes, from words without NaN as float32, bfloat16 or float16."""
    library.name_of.restype = ctypes.c_char_p
    names = []
    while (found := library.name_of(len(names))) is not None:
        names.append(found.decode())
    assert names == PRIMITIVES + WARPGROUP_PRIMITIVES
    words = (
        torch.randn(4096, generator=torch.Generator().manual_seed(1)).view(torch.int32)
        & ~0x04000400
    )
    output = torch.zeros(4096, dtype=torch.int32)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (words, output)]
    assert library.run(names.index(name), *pointers) == 0
    return output


@pytest.mark.parametrize("name", PRIMITIVES + WARPGROUP_PRIMITIVES)
def test_primitives(name: str, builds: dict[str, ctypes.CDLL]) -> None:
    """Catches an instruction that does something else than its twin on the host, by any bit."""
    if name in WARPGROUP_PRIMITIVES and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these instructions exist on compute capability 9.0 alone")
    on_gpu, on_host = (run_primitive(builds[place], name) for place in ("gpu", "host"))
    assert on_host.any()
    wrong = (on_gpu != on_host).nonzero().flatten()
    assert len(wrong) == 0, (
        f"{len(wrong)} words differ, first at {wrong[0]}: {on_gpu[wrong[0]]}, {on_host[wrong[0]]}"
    )


# Values -----------------------------------------------------------------------------------------


def plain(
    case: Case, input: Tensor, terms: list[Tensor], gates: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """As ``Target.run``, by the plain kernels."""
    operators, rest = torch.ops.gross_cuda, (terms, case.active, gates, case.stride[0])
    grad_terms, grad_gates = operators.plain_weight_grad(grad, input, *rest)
    results = [
        operators.plain_forward(input, *rest),
        operators.plain_input_grad(grad, input, *rest),
        *grad_terms,
    ]
    return results if gates is None else [*results, grad_gates.to(gates.dtype)]


@pytest.mark.parametrize("dtypes", [*TYPES, (torch.float32, torch.float32)], ids=str)
@pytest.mark.parametrize(
    "name", ["groups of 3", "groups of 16/2", "twice as many outputs", "inactive terms"]
)
def test_plain_kernels_values(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Catches a second reference that is no reference."""
    arguments = Target("cuda", DEVICE, *dtypes).arguments(CASES[name])
    assert_accurate(plain(CASES[name], *arguments), CASES[name], arguments)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case: Case) -> None:
    """Catches whatever the emulator does not see: time, real asynchrony, the compiler."""
    target = Target("cuda", DEVICE, torch.bfloat16, torch.float32)
    arguments = target.arguments(case)
    assert_accurate(target.run(case, *arguments), case, arguments)


@pytest.fixture
def single_warps() -> Iterator[None]:
    """The kernels that every GPU has, where there are others for warpgroups."""
    torch.ops.gross_cuda.set_warpgroups(False)
    yield
    torch.ops.gross_cuda.set_warpgroups(True)


@pytest.mark.usefixtures("single_warps")
@pytest.mark.parametrize(
    "name", ["groups of 32", "groups of 64", "64@56, groups of 32", "64@56, groups of 64"]
)
def test_values_without_warpgroups(name: str) -> None:
    """Catches wrong values that a GPU with warpgroup products would hide until another GPU runs
    them."""
    test_values(CASES[name])


@pytest.mark.parametrize("dtypes", TYPES[1:], ids=str)
@pytest.mark.parametrize("case", [TYPICAL, CASES["many terms"], CASES["groups of 11/2"]], ids=str)
def test_values_in_other_dtypes(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Catches the same in the other precisions."""
    target = Target("cuda", DEVICE, *dtypes)
    arguments = target.arguments(case)
    assert_accurate(target.run(case, *arguments), case, arguments)


@pytest.mark.parametrize(
    "name", ["64@56", "64@56, groups of 32", "128@28/2", "groups of 3", "groups of 16/2"]
)
def test_values_as_tf32(name: str) -> None:
    """Catches TF32 with more error than TF32 has: factors are rounded to 11 bits, or cut."""
    target = Target("cuda", DEVICE, torch.float32, torch.float32)
    arguments = target.arguments(CASES[name])
    for result, exact in zip(
        target.run(CASES[name], *arguments), plain(CASES[name], *arguments), strict=True
    ):
        assert (result - exact).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("name", ["64@56", "64@56, groups of 32", "64@56, groups of 64", "512@7"])
def test_values_of_a_large_batch(name: str) -> None:
    """Catches what shows only where all multiprocessors have several shares of rows."""
    case = replace(CASES[name], batch=2 if DRY else 64)
    target = Target("cuda", DEVICE, torch.bfloat16, torch.float32)
    arguments = target.arguments(case)
    for result, exact in zip(target.run(case, *arguments), plain(case, *arguments), strict=True):
        difference = (result.float() - exact.float()).abs().max()
        assert difference <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


# Dispatch ---------------------------------------------------------------------------------------


def test_dispatch() -> None:
    """Catches a call that matters served by something else, and one that the kernels do not serve
    but get."""
    input, terms, *_ = TYPICAL.tensors(torch.bfloat16, torch.float32, DEVICE)
    assert cuda.available()
    assert explain(input, terms, 3, padding=1).startswith("cuda: first of cuda, triton, reference")
    assert explain(input.contiguous(), terms, 3, padding=1).endswith(
        "; cuda serves dense channels-last memory"
    )
    assert "cuda serves 3×3 kernels with padding 1" in explain(input, terms, 3)
    wide = [input.float(), [term.float() for term in terms], 3]
    assert "which torch.backends.cudnn.conv.fp32_precision does not allow" in explain(
        *wide, padding=1
    )
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert explain(*wide, padding=1).startswith("cuda: first of")


def test_changed_precision_is_obeyed() -> None:
    """Catches a choice that outlives the permission to use TF32."""
    input, terms, *_ = TYPICAL.tensors(torch.float32, torch.float32, DEVICE)
    with use_backend("reference"):
        strict = series_conv2d(input, terms, 3, padding=1)
    errors = {}
    for precision in ("tf32", "ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = precision
        errors[precision] = (
            series_conv2d(input, terms, 3, padding=1) - strict
        ).abs().max() / strict.abs().max()
    assert errors["ieee"] < 1e-5 < errors["tf32"]
