"""What was built, what is installed, and which backend serves a typical call: ``python -m
gross_kernels.environment``.

Meant to be pasted into a bug report.
"""

from __future__ import annotations

import ctypes
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, ops
from .backends import cpu, cuda
from .functional import explain


def report() -> str:
    """The report as text, one ``name: value`` a line."""
    return "\n".join(f"{name + ':':16} {value}" for name, value in facts())


def facts() -> list[tuple[str, str]]:
    """What the report says, as pairs of name and value."""
    return [
        ("gross-kernels", __version__),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("triton", _version("triton")),
        (
            "processor",
            f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        ),
        ("gpu", _gpu()),
        ("cpu kernels", _cpu_library()),
        ("cuda kernels", _cuda_library()),
        (
            "variables",
            ", ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith("GROSS_"))
            or "none set",
        ),
        *((f"{device} call", _typical_call(device)) for device in ("cpu", "cuda")),
    ]


def _cpu_library() -> str:
    if ops.load_error is not None:
        return f"not loaded: {ops.load_error}"
    library = ctypes.CDLL(str(cpu.LIBRARY))
    library.gross_cpu_build.restype = ctypes.c_char_p
    return f"running as {instruction_set()}, built with {library.gross_cpu_build().decode()}"


def instruction_set() -> str:
    """That of the CPU kernels, as ``GROSS_KERNELS_ISA`` names it; "none" where they are not
    loaded."""
    if ops.load_error is not None:
        return "none"
    library = ctypes.CDLL(str(cpu.LIBRARY))
    library.gross_cpu_isa.restype = ctypes.c_char_p
    return library.gross_cpu_isa().decode()


def weight_bits() -> int:
    """Of weights in 8 bits, how many the instruction set multiplies at its best: 8; or 7 where it
    sums pairs of products in 16 bits, and weights of 8 bits take an exact, slower way."""
    return 7 if instruction_set() in ("avx2", "avx512") else 8


def _cuda_library() -> str:
    if cuda.load_error is not None:
        return f"not loaded: {cuda.load_error}"
    if not cuda.available():
        return "not built" if torch.version.cuda else "not loaded: torch is no CUDA build"
    of_torch, toolkit, architectures = torch.ops.gross_cuda.build()
    cuda_version = f"{toolkit // 1000}.{toolkit % 1000 // 10}"
    return f"built with torch {of_torch}, CUDA {cuda_version}, for {architectures}"


def _typical_call(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    input = torch.empty(1, 64, 8, 8, device=device, dtype=dtype).to(
        memory_format=torch.channels_last
    )
    terms = [torch.empty(64, s, 3, 3, device=device) for s in (1, 4, 16, 32)]
    return explain(input, terms, padding=1)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return f"none available (torch built for CUDA {torch.version.cuda or 'none'})"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return f"{name}, compute capability {capability[0]}.{capability[1]}, CUDA {torch.version.cuda}"


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
