"""Compiles the CUDA sources for the host, where emulator.h runs them: no GPU and no CUDA toolkit is
needed."""

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WARNINGS = ("-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-Og", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

#: Compiles a source of this folder and returns the program.
Compile = Callable[..., Path]


def build(source: Path, program: Path, *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("requires g++ on x86-64, whose stacks the emulator switches")
    command = [compiler, "-std=c++17", *flags, f"-I{source.parent}", source, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return program


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    folder = tmp_path_factory.mktemp("cuda_on_host")
    programs: dict[tuple[str, ...], Path] = {}

    def compile_once(name: str, *flags: str) -> Path:
        key = (name, *flags)
        if key not in programs:
            programs[key] = build(
                HERE / name, folder / f"program{len(programs)}", *WARNINGS, *flags
            )
        return programs[key]

    return compile_once


@pytest.fixture
def with_fault(tmp_path: Path) -> Callable[..., Path]:
    """Changes a copy of the sources: ``with_fault("test_x.cpp", ("x.h", old, new), …)`` returns the
    program."""

    def plant(test: str, *changes: tuple[str, str, str]) -> Path:
        for folder in ("csrc", "tests/cuda_on_host"):
            shutil.copytree(ROOT / folder, tmp_path / folder)
        for file, old, new in changes:
            path = tmp_path / "csrc/cuda" / file
            path.write_text(changed(path.read_text(), old, new))
        return build(tmp_path / "tests/cuda_on_host" / test, tmp_path / "program", "-O0", "-w")

    return plant


def changed(text: str, old: str, new: str) -> str:
    """``text`` with ``new`` for ``old``, which stands there once, however its lines are broken."""
    places = [i for i, letter in enumerate(text) if not letter.isspace()]
    solid, wanted = "".join(text[i] for i in places), "".join(old.split())
    assert solid.count(wanted) == 1, f"stands {solid.count(wanted)} times: {old}"
    first = solid.index(wanted)
    return text[: places[first]] + new + text[places[first + len(wanted) - 1] + 1 :]


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
