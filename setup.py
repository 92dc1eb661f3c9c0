"""Builds the kernels as shared libraries that remember how they were built.
``gross_kernels/gross_cpu.so`` always, ``gross_kernels/gross_cuda.so`` wherever a CUDA compiler and
a CUDA build of torch are present, whether or not a GPU is.

``GROSS_KERNELS_CUDA=0`` leaves the CUDA kernels out, ``GROSS_KERNELS_CUDA=1`` makes a missing
compiler an error; ``TORCH_CUDA_ARCH_LIST`` names the GPUs. Everything else about the package is in
pyproject.toml. The libraries use LibTorch's stable ABI (2.10), and no Python: one wheel serves
every Python 3 and every torch from 2.10 on.

With build isolation pip builds against the newest torch of the package index, which for the CPU
kernels is as good as any. The CUDA kernels need the torch that nvcc fits: install torch first, then
this package with ``--no-build-isolation``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
FLAGS = [
    "-O3",
    # Python's own flags ask for what a debugger needs: 105 of 109 MB, and a fifth of the time.
    "-g0",
    "-std=c++17",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DTORCH_STABLE_ONLY",
]
#: A100 class; H200 class with its own instructions for warp groups (which "9.0" lacks); newer ones
#: by PTX.
ARCHITECTURES = "8.0;9.0a;10.0+PTX"


if sys.platform == "darwin":
    print("gross_kernels: macOS is untried: the portable kernels are built", file=sys.stderr)
elif sys.platform != "linux":
    raise SystemExit(
        f"gross_kernels: got the system {sys.platform!r}, accepted is Linux (on Windows: WSL); "
        "macOS is untried"
    )


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, /usr/local/cuda or where nvcc on the PATH lies."""
    on_path = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = (
        [named]
        if named
        else ["/usr/local/cuda", *([Path(on_path).resolve().parents[1]] if on_path else [])]
    )
    return next((Path(home) for home in candidates if (Path(home) / "bin/nvcc").is_file()), None)


# Torch looks for the toolkit when it is imported, and takes a wrapper of nvcc in /usr/local/bin to
# be a part of it.
CUDA_HOME = cuda_home()
if CUDA_HOME is not None:
    os.environ["CUDA_HOME"] = str(CUDA_HOME)

try:
    import torch
    from setuptools.command.bdist_wheel import bdist_wheel
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    raise SystemExit(
        f"gross_kernels: {error.name} is needed for a build without isolation, and missing. "
        "First: pip install 'setuptools>=77' ninja 'torch>=2.10'"
    ) from error


def cpu_library() -> Extension:
    """The CPU kernels and the operators' schemas."""
    record = f'-DGROSS_BUILD_FLAGS="{" ".join(FLAGS)}"'
    sources = ["csrc/library.cpp", *found("csrc/cpu", "*.cpp")]
    return CppExtension(
        "gross_kernels.gross_cpu", sources, extra_compile_args=[*FLAGS, record], py_limited_api=True
    )


def cuda_library() -> Extension | None:
    """The CUDA kernels, or None where they are left out."""
    wanted = os.environ.get("GROSS_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(
            f"GROSS_KERNELS_CUDA: got {wanted!r}, accepted are 0 (no CUDA kernels) and 1 (no build "
            "without)"
        )
    missing = []
    if torch.version.cuda is None:
        missing.append(f"a CUDA build of torch (torch {torch.__version__} is none)")
    if CUDA_HOME is None:
        missing.append("a CUDA compiler (bin/nvcc in CUDA_HOME, in /usr/local/cuda or on the PATH)")
    if wanted == "1" and missing:
        raise SystemExit(f"GROSS_KERNELS_CUDA=1: the CUDA kernels need {' and '.join(missing)}")
    if wanted == "0" or missing:
        return None
    check_compiler()
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    record = f'-DGROSS_CUDA_ARCHITECTURES="{architectures.replace(" ", ";")}"'
    # Kernels for warp groups compile to nothing anywhere but on 9.0a: their launchers must know
    # whether they exist.
    warp_groups = ["-DGROSS_CUDA_WARP_GROUPS"] if "9.0a" in architectures else []
    nvcc = [f"-Xcompiler={flag}" if flag.startswith(("-f", "-g")) else flag for flag in FLAGS]
    # The CUDA runtime is linked statically: whatever CUDA torch was built for, and where there is
    # no driver, it loads.
    return CppExtension(
        "gross_kernels.gross_cuda",
        ["csrc/cuda/library.cpp", *found("csrc/cuda", "*.cu")],
        include_dirs=[str(CUDA_HOME / "include")],
        library_dirs=[
            str(CUDA_HOME / folder) for folder in ("lib64", "lib") if (CUDA_HOME / folder).is_dir()
        ],
        libraries=["torch_cuda", "cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={
            "cxx": [*FLAGS, "-DUSE_CUDA", *warp_groups, record],
            "nvcc": [*nvcc, "-DUSE_CUDA", *warp_groups, "-Xptxas=--warn-on-spills"],
        },
        py_limited_api=True,
    )


def check_compiler() -> None:
    """Refuse an nvcc of another major version than torch's CUDA, before anything is compiled."""
    major = nvcc_major()
    if major is None or major == torch.version.cuda.split(".")[0]:
        return
    raise SystemExit(
        f"gross_kernels: got nvcc of CUDA {major} (CUDA_HOME is {CUDA_HOME}), accepted is "
        f"{torch.version.cuda}, what torch {torch.__version__} was built for. If this is not your "
        "torch, pip took it for an isolated build: install with --no-build-isolation. Otherwise "
        "name another toolkit in CUDA_HOME, or leave the CUDA kernels out: GROSS_KERNELS_CUDA=0"
    )


def nvcc_major() -> str | None:
    """The major version that nvcc says it has; None where it does not run, which its first file
    will say better."""
    command = [str(CUDA_HOME / "bin/nvcc"), "--version"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+)\.", answer)
    return release and release[1]


def found(folder: str, pattern: str) -> list[str]:
    """Sources in a folder, relative to this file."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))


class BuildLibrary(BuildExtension):
    """Names the libraries without Python's suffix, and says what to do when the CUDA kernels do not
    compile."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            if any(extension.name == "gross_kernels.gross_cuda" for extension in self.extensions):
                raise SystemExit(
                    f"{error}\ngross_kernels: the build failed. If the CUDA kernels are the reason "
                    f"(CUDA_HOME is {CUDA_HOME}, torch was built for CUDA {torch.version.cuda}), "
                    "name another toolkit in CUDA_HOME or leave them out: GROSS_KERNELS_CUDA=0"
                ) from error
            raise


class WheelForAnyPython(bdist_wheel):
    """The libraries are bound to the platform, not to a Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


libraries = [cpu_library(), cuda_library()]
setup(
    ext_modules=[library for library in libraries if library is not None],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": WheelForAnyPython},
)
