"""Builds the CPU kernels as a plain shared library, ``gross_kernels/gross_cpu.so``, which remembers how it was built.

Everything else about the package is in pyproject.toml. The library uses LibTorch's stable ABI (2.10), and no Python:
one wheel serves every Python 3 and every torch from 2.10 on.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DTORCH_STABLE_ONLY",
]
RECORD = f'-DGROSS_BUILD_FLAGS="{" ".join(FLAGS)}"'
SOURCES = ["csrc/library.cpp", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))]


class BuildLibrary(BuildExtension):
    """Names the library without Python's suffix."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class WheelForAnyPython(bdist_wheel):
    """The library is bound to the platform, not to a Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        CppExtension("gross_kernels.gross_cpu", SOURCES, extra_compile_args=[*FLAGS, RECORD], py_limited_api=True),
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": WheelForAnyPython},
)
