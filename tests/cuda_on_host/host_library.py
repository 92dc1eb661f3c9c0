"""The whole CUDA library for this machine: csrc/cuda/library.cpp on tensors of the CPU, and every
kernel on the emulator."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from build_once import ROOT, compiled, linked
from torch.utils.cpp_extension import include_paths, library_paths

#: As in setup.py, and what makes library.cpp one for tensors of the CPU.
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DGROSS_ON_HOST"),
    "-DGROSS_CUDA_WARP_GROUPS",
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"),
]


@cache
def operators() -> Any:
    """``torch.ops.gross_cuda_on_host``, compiled where it is not yet. It needs g++ on x86-64, whose
    stacks the emulator switches."""
    include = [*include_paths(), ROOT / "tests/cuda_on_host"]
    sources = [ROOT / "csrc/cuda/library.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    with ThreadPoolExecutor(2) as workers:
        objects = workers.map(lambda each: compiled(each, *FLAGS, "-c", include=include), sources)
        link = [f"-L{path}" for path in library_paths()]
        link += ["-lc10", "-ltorch", "-ltorch_cpu"]
        library = linked("gross_cuda_on_host", list(objects), libraries=link)
    torch.ops.load_library(library)
    return torch.ops.gross_cuda_on_host
