"""What the emulator promises to see, it sees."""

from pathlib import Path

import pytest
from build_once import SANITIZERS

from .conftest import HERE, Compile, build, run


def test_emulator(program: Compile) -> None:
    finished = run(program("test_emulator.cpp", *SANITIZERS))
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("overflow", "report"),
    [
        (
            "int local[4]; for (int i = 0; i < 4 + volatile_one; i++) local[i] = i;"
            " keep(local[volatile_one]);",
            "stack-buffer-overflow",
        ),
        (
            "int* heap = new int[4]; heap[3 + volatile_one] = 1; keep(heap[0]); delete[] heap;",
            "heap-buffer-overflow",
        ),
    ],
)
def test_address_sanitizer_sees_fibers(tmp_path: Path, overflow: str, report: str) -> None:
    """A fiber's own overflow, after switches between fibers, is reported, and as what it is."""
    source = tmp_path / "overflow.cpp"
    source.write_text(
        f'#include "{HERE.parents[1]}/csrc/cuda/primitives.h"\n'
        "using namespace gross::cuda;\n"
        "volatile int volatile_one = 1;\n"
        "int main() {\n"
        "  emulator::launch(1, 1, 64, 64, [] {\n"
        "    barrier(0, 64);\n"
        f"    if (thread_index() == 37) {{ {overflow} }}\n"
        "    barrier(0, 64);\n"
        "  });\n"
        "}\n"
    )
    finished = run(build(source, "-O0", "-g", "-fsanitize=address", f"-I{HERE}"))
    assert finished.returncode != 0
    assert report in finished.stderr
