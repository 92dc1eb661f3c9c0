"""What the compiler made of the CUDA kernels, read from the library as it was built, for each of
its GPUs."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from build_once import ROOT, compiled

from gross_kernels.backends import cuda

#: Registers of a multiprocessor, and of a thread at most.
REGISTERS, MOST_REGISTERS = 65536, 255


@cache
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton brings cuobjdump."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    except ImportError:
        pass
    return next(
        (found for folder in folders if (found := shutil.which(name, path=folder))),
        shutil.which(name),
    )


@pytest.fixture(scope="module")
def library() -> Path:
    """The library, built in place."""
    if (
        torch.version.cuda is None
        or tool("nvcc") is None
        or os.environ.get("GROSS_KERNELS_CUDA") == "0"
    ):
        pytest.skip(
            "requires a CUDA compiler and a CUDA build of torch: there are no CUDA kernels here"
        )
    assert cuda.available(), f"{cuda.LIBRARY} is missing: pip install -e . builds it"
    assert cuda.load_error is None
    return cuda.LIBRARY


@dataclass
class Resources:
    """Of one kernel for one architecture."""

    architecture: str
    kernel: str
    registers: int
    stack: int
    shared: int


def resources_of(file: Path) -> Iterator[Resources]:
    """What the compiler recorded in a library or object file."""
    text = subprocess.run(
        [tool("cuobjdump"), "-res-usage", file], capture_output=True, text=True, check=True
    ).stdout
    architecture, kernel = "", ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r" Function (\w+):", line):
            kernel = found[1]
        elif found := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            yield Resources(architecture, kernel, registers, stack + local, shared)


@pytest.fixture(scope="module")
def report(library: Path) -> list[Resources]:
    return list(resources_of(library))


def test_every_architecture_has_every_kernel(report: list[Resources]) -> None:
    """Catches an architecture whose kernels were left out, or that the library says it has and has
    not."""
    wanted = {
        f"sm_{major}{minor}"
        for major, minor in re.findall(r"(\d+)\.(\d+a?)", torch.ops.gross_cuda.build()[2])
    }
    names = {
        a: sorted(r.kernel for r in report if r.architecture == a)
        for a in {r.architecture for r in report}
    }
    assert set(names) == wanted
    assert len({tuple(kernels) for kernels in names.values()}) == 1
    assert len(report) > 20


def test_no_spills(report: list[Resources]) -> None:
    """Catches registers kept in memory: in a loop that runs at the memory's speed each costs as
    much as a load."""
    assert [(r.architecture, r.kernel, r.stack) for r in report if r.stack > 0] == []


def test_shared_memory_is_dynamic(report: list[Resources]) -> None:
    """Catches static shared memory, which the plans of shared memory do not count. 1 KB belongs to
    the system."""
    assert [(r.kernel, r.shared) for r in report if r.shared > 1024] == []


def assembly_of(file: Path, architecture: str, kernels: list[str]) -> str:
    """The machine code of some kernels."""
    command = [tool("cuobjdump"), "-sass", "-arch", architecture, "-fun", ",".join(kernels), file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.build
def test_matrix_units(library: Path, report: list[Resources]) -> None:
    """Catches kernels without products of the matrix unit: guarded away, their instructions compile
    silently."""
    for architecture in {r.architecture for r in report}:
        kernels = {
            r.kernel for r in report if r.architecture == architecture and "plain" not in r.kernel
        }
        wide = sorted(kernel for kernel in kernels if "march_wide" in kernel)
        assert len(wide) == (8 if "9.0a" in torch.ops.gross_cuda.build()[2] else 0)
        some = sorted(kernel for kernel in kernels if re.search(r"\d+march(?!_wide)", kernel))[::5]
        assert len(some) > 3
        text = assembly_of(library, architecture, [*some, *wide])
        products = {name: len(re.findall("HMMA", body)) for name, body in functions(text)}
        wide_products = {name: len(re.findall("HGMMA", body)) for name, body in functions(text)}
        assert min(products[kernel] for kernel in some) >= 36
        # 24 and 36 per step.
        assert {wide_products[kernel] for kernel in wide} <= (
            {24, 36} if architecture == "sm_90a" else {0}
        )
        if architecture != "sm_90a":
            continue
        for name, body in functions(text):
            if name in wide:
                assert_sums_are_waited_for(body)


def assert_sums_are_waited_for(body: str) -> None:
    """A step's products are one batch, and nothing rounds their sums before they are there, which
    is the compiler's to decide."""
    products = re.search(r"HGMMA.*HGMMA[^;]*;", body, re.DOTALL)[0]
    assert "WARPGROUP.DEPBAR" not in products
    rest = body[body.rindex("HGMMA") :]
    assert "F2FP" not in rest[: rest.index("WARPGROUP.DEPBAR")]


def functions(text: str) -> Iterator[tuple[str, str]]:
    """Names and bodies in what cuobjdump prints."""
    _, *parts = re.split(r"Function : (\w+)", text)
    yield from zip(parts[::2], parts[1::2], strict=True)


def wide(*flags: str) -> Path:
    """wide.cu for plain 9.0, which has no instructions for warpgroups."""
    options = ("-std=c++17", "-O3", "-arch=sm_90", "-c")
    return compiled(ROOT / "csrc/cuda/wide.cu", *options, *flags, compiler=tool("nvcc"))


@pytest.mark.build
@pytest.mark.usefixtures("library")
def test_no_warpgroups_on_plain_hopper() -> None:
    """Catches kernels that compute nothing: built for 9.0 alone they must not exist."""
    assert list(resources_of(wide())) == []


@pytest.mark.build
@pytest.mark.usefixtures("library")
def test_warpgroups_elsewhere_are_traps() -> None:
    """Catches the same beside 9.0a: for other GPUs the kernels must stop whoever launches them."""
    made = wide("-DGROSS_CUDA_WARP_GROUPS")
    kernels = [resources.kernel for resources in resources_of(made)]
    assert len(kernels) == 8
    for _, body in functions(assembly_of(made, "sm_90", kernels)):
        assert "BPT.TRAP" in body
        assert "MMA" not in body
