"""What setup.py refuses before it compiles anything: systems and CUDA compilers that do not fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Runs setup.py up to its call of setup(), on a system and with a torch that are as told.
READ = """
import runpy, sys, torch, setuptools
sys.platform, torch.version.cuda, *missing = sys.argv[1:]
sys.modules.update(dict.fromkeys(missing))
setuptools.setup = lambda ext_modules, cmdclass: print(len(ext_modules))
runpy.run_path("setup.py")
"""


def read(
    cuda_home: Path,
    *missing: str,
    system: str = "linux",
    of_torch: str = "13.0",
    nvcc: str = "13.2",
) -> subprocess.CompletedProcess[str]:
    """setup.py's reading with a CUDA toolkit whose nvcc only tells its version, and without the
    modules that are missing."""
    compiler = cuda_home / "bin/nvcc"
    compiler.parent.mkdir()
    compiler.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {nvcc}, V{nvcc}.1\n")
    compiler.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GROSS_", "TORCH_", "CUDA_"))}
    return subprocess.run(
        [sys.executable, "-c", READ, system, of_torch, *missing],
        cwd=ROOT,
        env=kept | {"CUDA_HOME": str(cuda_home)},
        capture_output=True,
        text=True,
    )


def test_other_minor_version(tmp_path: Path) -> None:
    """Catches a refusal of toolkits that fit: one of the same major version does."""
    result = read(tmp_path, of_torch="13.0", nvcc="13.2")
    assert (result.returncode, result.stdout) == (0, "2\n"), result.stderr


def test_other_major_version(tmp_path: Path) -> None:
    """Catches a compilation of minutes that fails at the end, and users of build isolation who
    never learn that pip built against another torch than theirs."""
    result = read(tmp_path, of_torch="13.0", nvcc="12.4")
    assert (result.returncode, result.stdout) == (1, "")
    assert f"got nvcc of CUDA 12 (CUDA_HOME is {tmp_path}), accepted is 13.0" in result.stderr
    assert "--no-build-isolation" in result.stderr
    assert "GROSS_KERNELS_CUDA=0" in result.stderr


@pytest.mark.parametrize("system", ["win32", "cygwin"])
def test_other_system(tmp_path: Path, system: str) -> None:
    """Catches a build that fails in the compiler's words where it never had a chance."""
    result = read(tmp_path, system=system)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"got the system '{system}', accepted is Linux" in result.stderr


def test_untried_system(tmp_path: Path) -> None:
    """Catches a build on macOS that does not say that nobody has tried it."""
    result = read(tmp_path, system="darwin")
    assert result.returncode == 0, result.stderr
    assert "macOS is untried" in result.stderr


@pytest.mark.parametrize("missing", ["torch.utils.cpp_extension", "setuptools.command.bdist_wheel"])
def test_missing_build_tool(tmp_path: Path, missing: str) -> None:
    """Catches a build without isolation that ends in a traceback where torch is not installed, or
    where setuptools is as old as the one that Python 3.11 puts into a fresh environment."""
    result = read(tmp_path, missing)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"{missing} is needed for a build without isolation" in result.stderr
    assert "pip install 'setuptools>=77' ninja 'torch>=2.10'" in result.stderr
