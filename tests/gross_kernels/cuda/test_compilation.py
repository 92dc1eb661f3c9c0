"""What the compiler made of the CUDA kernels, read from the library as it was built, for each of its GPUs."""

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

from gross_kernels.backends import cuda

ROOT = Path(__file__).parents[3]
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
    return next((found for folder in folders if (found := shutil.which(name, path=folder))), shutil.which(name))


@pytest.fixture(scope="module")
def library() -> Path:
    """The library, built in place."""
    if torch.version.cuda is None or tool("nvcc") is None or os.environ.get("GROSS_KERNELS_CUDA") == "0":
        pytest.skip("requires a CUDA compiler and a CUDA build of torch: there are no CUDA kernels here")
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
    text = subprocess.run([tool("cuobjdump"), "-res-usage", file], capture_output=True, text=True, check=True).stdout
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
    """Catches an architecture whose kernels were left out, or that the library says it has and has not."""
    wanted = {f"sm_{major}{minor}" for major, minor in re.findall(r"(\d+)\.(\d+a?)", torch.ops.gross_cuda.build()[2])}
    names = {a: sorted(r.kernel for r in report if r.architecture == a) for a in {r.architecture for r in report}}
    assert set(names) == wanted
    assert len({tuple(kernels) for kernels in names.values()}) == 1
    assert len(report) > 20


def test_no_spills(report: list[Resources]) -> None:
    """Catches registers kept in memory: in a loop that runs at the memory's speed each costs as much as a load."""
    assert [(r.architecture, r.kernel, r.stack) for r in report if r.stack > 0] == []


def test_shared_memory_is_dynamic(report: list[Resources]) -> None:
    """Catches static shared memory, which the plans of shared memory do not count. 1 KB belongs to the system."""
    assert [(r.kernel, r.shared) for r in report if r.shared > 1024] == []
