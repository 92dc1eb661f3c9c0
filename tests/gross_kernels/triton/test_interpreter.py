"""The Triton kernels' values: their own tests and the operator's, in Triton's interpreter, a
process each."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from packing import CASES

HERE = Path(__file__).parent
#: Of test_operator.py, what says something about kernels that run one program after another.
OPERATOR = (
    "test_values",
    "test_values_of_wide_groups",
    "test_values_of_whole_pixels",
    "test_sixteen_terms",
    "test_the_sum_is_rounded_once",
    "test_expanded_arguments",
    "test_strided_arguments",
    "test_nothing_leaks_from_inactive_terms",
    "test_infinite_input",
    "test_no_images",
)
#: The dtypes of most of it in the default run; the others are continuous integration's.
TYPICAL = (
    "bfloat16-float32 or test_values[ or test_sixteen_terms or test_the_sum_is_rounded_once"
    " or test_expanded_arguments"
)


def run(report: Path, *arguments: str, **variables: str) -> Counter[str]:
    """How many tests of each function passed, by pytest with the interpreter's plugin; none may
    fail or be skipped."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, **variables}
    options = ["-q", "-p", "interpreter", "-p", "no:cacheprovider", f"--junitxml={report}"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=HERE.parents[2], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    tests = ElementTree.parse(report).findall(".//testcase")
    assert not [test.get("name") for test in tests if test.find("skipped") is not None]
    return Counter(test.get("name", "").split("[")[0] for test in tests)


@pytest.mark.parametrize("file", ["numerics.py", "pairs.py"])
def test_kernels(file: str, tmp_path: Path) -> None:
    """Catches wrong values, addresses outside the tensors, and elements that are never written: see
    the file."""
    passed = run(tmp_path / "report.xml", str(HERE / file))
    written = [
        line.split("(")[0].removeprefix("def ")
        for line in (HERE / file).read_text().splitlines()
        if line.startswith("def test_")
    ]
    assert sorted(passed) == sorted(written)
    assert passed["test_bfloat16"] >= (len(CASES) if file == "numerics.py" else 14)


@pytest.mark.parametrize(
    ("dtypes", "examples"),
    [
        (TYPICAL, "3"),
        pytest.param("float", "3", marks=pytest.mark.build),
        pytest.param("float", "60", marks=pytest.mark.sweep),
    ],
    ids=["one", "every", "sweep"],
)
def test_operator(dtypes: str, examples: str, tmp_path: Path) -> None:
    """Catches what the tests of every backend catch, over random geometries, strides and dtypes."""
    chosen = f"triton and ({dtypes}) and ({' or '.join(OPERATOR)})"
    file = str(HERE.parent / "test_operator.py")
    passed = run(tmp_path / "report.xml", file, "-k", chosen, GROSS_TEST_EXAMPLES=examples)
    assert sorted(passed) == sorted(OPERATOR)
