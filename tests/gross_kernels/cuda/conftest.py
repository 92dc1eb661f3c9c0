"""The CUDA backend without a GPU: its library built for the host, with kernels on the emulator."""

import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from gross_kernels.backends import cuda

ROOT = Path(__file__).parents[3]
#: As in setup.py, and what makes library.cpp one for tensors of the CPU.
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-DGROSS_ON_HOST"),
    "-DGROSS_CUDA_WARP_GROUPS",
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"),
]


@pytest.fixture(scope="session")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``torch.ops.gross_cuda_on_host``: csrc/cuda/library.cpp and every kernel, compiled for this
    machine."""
    if platform.machine() != "x86_64":
        pytest.skip("requires x86-64, whose stacks the emulator switches")
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    library = tmp_path_factory.mktemp("cuda_on_host") / "gross_cuda_on_host.so"
    includes = [f"-I{path}" for path in (*include_paths(), ROOT / "tests/cuda_on_host")]
    objects, compilers = [], []
    for source in (ROOT / "csrc/cuda/library.cpp", *sources):
        objects.append(library.with_name(source.name + ".o"))
        compilers.append(
            subprocess.Popen(
                ["c++", *FLAGS, *includes, "-c", "-x", "c++", source, "-o", objects[-1]]
            )
        )
        if len(compilers) == 2:
            assert [compiler.wait() for compiler in compilers] == [0] * len(compilers)
            compilers.clear()
    assert all(compiler.wait() == 0 for compiler in compilers)
    link = [f"-L{path}" for path in library_paths()]
    subprocess.run(
        ["c++", *FLAGS, *objects, *link, "-lc10", "-ltorch", "-ltorch_cpu", "-o", library],
        check=True,
    )
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
