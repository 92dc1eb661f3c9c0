"""The Triton kernels' values: their own tests and the operator's, in Triton's interpreter, a
process each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: Of test_operator.py, what says something about kernels that run one program after another.
OPERATOR = (
    "triton and (test_values or expanded or sixteen or rounded_once)"
    " or triton and bfloat16-float32 and (strided or leaks or no_images or infinite)"
)


def run(*arguments: str, **variables: str) -> str:
    """pytest with the interpreter's plugin; returns what it prints."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, **variables}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "interpreter",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    result = subprocess.run(
        command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    return result.stdout


def test_kernels() -> None:
    """Catches wrong values, addresses outside the tensors, and elements that are never written: see
    numerics.py."""
    assert "passed" in run(str(HERE / "numerics.py"))


@pytest.mark.parametrize("examples", ["3", pytest.param("60", marks=pytest.mark.sweep)])
def test_operator(examples: str) -> None:
    """Catches what the tests of every backend catch, over random geometries, strides and dtypes."""
    output = run(
        str(HERE.parent / "test_operator.py"), "-k", OPERATOR, GROSS_TEST_EXAMPLES=examples
    )
    assert "passed" in output
