"""What setup.py builds, by the compiler and the torch that it finds and by what it is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
#: Runs setup.py up to its call of setup(), and prints the extensions that it passes; torch is as
#: told.
READ = """
import json, runpy, sys, torch, setuptools
torch.version.cuda = json.loads(sys.argv[1])
def setup(ext_modules, cmdclass):
    print(json.dumps([[e.name, e.libraries, e.extra_compile_args] for e in ext_modules]))
    if len(sys.argv) > 2:
        command = cmdclass["build_ext"]
        def fail(self):
            raise RuntimeError("nvcc fatal")
        command.__base__.build_extensions = fail
        failed = object.__new__(command)
        failed.extensions = ext_modules
        failed.build_extensions()
setuptools.setup = setup
runpy.run_path("setup.py")
"""


def build(
    tmp_path: Path,
    *arguments: str,
    compiler: bool = True,
    cuda: str | None = "13.0",
    **variables: str,
) -> tuple[int, str, str]:
    """Status, output and errors of setup.py's reading, with a CUDA toolkit that is a file named
    nvcc, or none."""
    (tmp_path / "bin").mkdir()
    if compiler:
        (tmp_path / "bin/nvcc").touch()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GROSS_", "TORCH_", "CUDA_"))
    }
    environment = kept | {"CUDA_HOME": str(tmp_path)} | variables
    command = [sys.executable, "-c", READ, json.dumps(cuda), *arguments]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def test_with_a_compiler(tmp_path: Path) -> None:
    """Catches CUDA kernels that are not built for want of a GPU, for other architectures than
    documented, or bound to one version of the CUDA runtime."""
    status, output, errors = build(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert status == 0, errors
    (cpu, *_), (cuda, libraries, flags) = json.loads(output)
    assert (cpu, cuda) == ("gross_kernels.gross_cpu", "gross_kernels.gross_cuda")
    assert "cudart_static" in libraries
    assert "cudart" not in libraries
    assert '-DGROSS_CUDA_ARCHITECTURES="8.0;9.0a;10.0+PTX"' in flags["cxx"]
    assert all("-DGROSS_CUDA_WARP_GROUPS" in flags[compiler] for compiler in ("cxx", "nvcc"))


def test_for_named_architectures(tmp_path: Path) -> None:
    """Catches TORCH_CUDA_ARCH_LIST that is ignored, and kernels for warp groups launched where 9.0
    lacks them."""
    status, output, errors = build(tmp_path, TORCH_CUDA_ARCH_LIST="8.6 9.0")
    assert status == 0, errors
    flags = json.loads(output)[1][2]
    assert '-DGROSS_CUDA_ARCHITECTURES="8.6;9.0"' in flags["cxx"]
    assert not any("WARP_GROUPS" in flag for compiler in flags.values() for flag in compiler)


@pytest.mark.parametrize(
    "how",
    [{"GROSS_KERNELS_CUDA": "0"}, {"compiler": False}, {"cuda": None}],
    ids=["told", "no compiler", "CPU torch"],
)
def test_left_out(tmp_path: Path, how: dict) -> None:
    """Catches a build that fails where there is no CUDA, or that is not left out when told."""
    status, output, errors = build(tmp_path, **how)
    assert status == 0, errors
    assert [name for name, *_ in json.loads(output)] == ["gross_kernels.gross_cpu"]


@pytest.mark.parametrize(
    ("how", "missing"),
    [({"compiler": False}, "need a CUDA compiler"), ({"cuda": None}, "need a CUDA build of torch")],
    ids=["no compiler", "CPU torch"],
)
def test_required(tmp_path: Path, how: dict, missing: str) -> None:
    """Catches GROSS_KERNELS_CUDA=1 that builds without, or does not say what is missing."""
    status, output, errors = build(tmp_path, GROSS_KERNELS_CUDA="1", **how)
    assert (status, output) == (1, "")
    assert f"GROSS_KERNELS_CUDA=1: the CUDA kernels {missing}" in errors


def test_misspelt(tmp_path: Path) -> None:
    """Catches a value that is taken for another."""
    status, _, errors = build(tmp_path, GROSS_KERNELS_CUDA="yes")
    assert status == 1
    assert "GROSS_KERNELS_CUDA: got 'yes', accepted are 0" in errors


def test_failed_compilation(tmp_path: Path) -> None:
    """Catches a failed build that leaves the user with the compiler's words alone."""
    status, _, errors = build(tmp_path, "fail")
    assert status == 1
    assert "nvcc fatal\ngross_kernels: the build failed." in errors
    assert f"CUDA_HOME is {tmp_path}, torch was built for CUDA 13.0" in errors
    assert "GROSS_KERNELS_CUDA=0" in errors
