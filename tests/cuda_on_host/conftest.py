"""Compiles the CUDA sources for the host, where emulator.h runs them: no GPU and no CUDA toolkit is
needed.

A default run builds the emulator and one kernel with the sanitizers, two with -O2, and a fault in
each; ``-m build`` adds the other ways and one fault of each kind."""

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from build_once import ROOT, WARNINGS, compiled

HERE = Path(__file__).parent

#: Compiles a source of this folder and returns the program.
Compile = Callable[..., Path]


def build(source: Path, *flags: str) -> Path:
    """The program of a source, whose own folder has the emulator."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("requires g++ on x86-64, whose stacks the emulator switches")
    return compiled(source, "-std=c++17", *flags, include=[source.parent])


@pytest.fixture(scope="session")
def program() -> Compile:
    return lambda name, *flags: build(HERE / name, *WARNINGS, *flags)


@pytest.fixture
def with_fault(tmp_path: Path) -> Callable[..., Path]:
    """Changes a copy of the sources: ``with_fault("test_x.cpp", ("x.h", old, new), …)`` returns the
    program, compiled with ``flags``."""

    def plant(test: str, *changes: tuple[str, str, str], flags: Iterable[str] = ()) -> Path:
        for folder in ("csrc", "tests/cuda_on_host"):
            shutil.copytree(ROOT / folder, tmp_path / folder)
        for file, old, new in changes:
            path = tmp_path / "csrc/cuda" / file
            path.write_text(changed(path.read_text(), old, new))
        return build(tmp_path / "tests/cuda_on_host" / test, "-O0", "-w", *flags)

    return plant


def changed(text: str, old: str, new: str) -> str:
    """``text`` with ``new`` for ``old``, which stands there once, however its lines are broken."""
    places = [i for i, letter in enumerate(text) if not letter.isspace()]
    solid, wanted = "".join(text[i] for i in places), "".join(old.split())
    assert solid.count(wanted) == 1, f"stands {solid.count(wanted)} times: {old}"
    first = solid.index(wanted)
    return text[: places[first]] + new + text[places[first + len(wanted) - 1] + 1 :]


def faults(all: Iterable[str], first: str, typical: Iterable[str]) -> list[Any]:
    """One planted fault for every run, one of each kind for ``-m build``, the others for sweeps."""
    marks = {first: (), **{name: pytest.mark.build for name in typical if name != first}}
    return [pytest.param(name, marks=marks.get(name, pytest.mark.sweep)) for name in all]


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
