"""The CUDA backend without a GPU: its library built for the host, with kernels on the emulator."""

import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from build_once import ROOT, compiled, linked
from torch.utils.cpp_extension import include_paths, library_paths

from gross_kernels.backends import cuda

#: As in setup.py, and what makes library.cpp one for tensors of the CPU.
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DGROSS_ON_HOST"),
    "-DGROSS_CUDA_WARP_GROUPS",
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"),
]


@pytest.fixture(scope="session")
def operators() -> Any:
    """``torch.ops.gross_cuda_on_host``: csrc/cuda/library.cpp and every kernel, compiled for this
    machine."""
    if platform.machine() != "x86_64":
        pytest.skip("requires x86-64, whose stacks the emulator switches")
    include = [*include_paths(), ROOT / "tests/cuda_on_host"]
    sources = [ROOT / "csrc/cuda/library.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    with ThreadPoolExecutor(2) as workers:
        objects = workers.map(lambda each: compiled(each, *FLAGS, "-c", include=include), sources)
        link = [f"-L{path}" for path in library_paths()]
        link += ["-lc10", "-ltorch", "-ltorch_cpu"]
        library = linked("gross_cuda_on_host", list(objects), libraries=link)
    torch.ops.load_library(library)
    return torch.ops.gross_cuda_on_host


@pytest.fixture
def on_host(operators: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``gross_kernels.backends.cuda`` with the operators for the host, which plays a small H200."""
    operators.set_warpgroups(True)
    monkeypatch.setattr(cuda, "_operators", lambda: operators)
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda, "load_error", None)
    cuda.properties.cache_clear()
    yield cuda
    cuda.properties.cache_clear()
