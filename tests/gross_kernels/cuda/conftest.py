"""The CUDA backend without a GPU: its library built for the host, with kernels on the emulator."""

import platform
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import host_library
import pytest

from gross_kernels.backends import cuda


@pytest.fixture(scope="session")
def operators() -> Any:
    """``torch.ops.gross_cuda_on_host``: csrc/cuda/library.cpp and every kernel, compiled for this
    machine."""
    if platform.machine() != "x86_64":
        pytest.skip("requires x86-64, whose stacks the emulator switches")
    return host_library.operators()


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
