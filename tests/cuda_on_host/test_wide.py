"""The kernels for warpgroups on the host: values, counted traffic, planted faults."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from build_once import SANITIZERS

from .conftest import Compile, faults, run


def test_numerics(program: Compile) -> None:
    """Every kernel and dtype, both ways for copies to land, under AddressSanitizer and
    UndefinedBehaviorSanitizer."""
    finished = run(program("test_wide.cpp", *SANITIZERS), "numerics")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


@pytest.mark.build
def test_traffic(program: Compile) -> None:
    """Bytes of global memory within 1.3 times what must move at 56×56 and above, 1.6 times
    below."""
    finished = run(program("test_wide.cpp", "-O2"), "traffic")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


def test_conflicts(program: Compile) -> None:
    """Shared memory, nearly all of it while weights are assembled: within 1.05 times the wavefronts
    of no conflicts of banks, copies 1.15, forward's writes at groups of 32 1.4."""
    finished = run(program("test_wide.cpp", "-O2"), "conflicts")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


WRONG = "values wrong"
#: What a fault is, its change in wide.h, and what must be reported.
FAULTS = {
    "no barrier in a step": (
        "    barrier(1 + team, warpgroup_threads);\n    request(",
        "    request(",
        "race|in flight",
    ),
    "a wait too few": (
        "copy_async_wait<S::ahead - 1>();",
        "copy_async_wait<S::ahead>();",
        "in flight",
    ),
    "a stage too few": ("stages - lead - 1;  //", "stages - lead;  //", "race|in flight"),
    "one half of staging": ("    half ^= S::half_step;\n", "", "race"),
    "no barrier at the end": (
        "  copy_async_wait<0>();\n  barrier(1 + team, warpgroup_threads);\n  store();",
        "  copy_async_wait<0>();\n  store();",
        "race",
    ),
    "rows beyond the image": ("inside && (pieces", "(pieces", "out of range|allocation|" + WRONG),
    "the wrong kernel row": (
        "const int kh = i - output_row;",
        "const int kh = 2 - i + output_row;",
        WRONG,
    ),
    "the wrong column": ("row + kw + k * 2", "row + (2 - kw) + k * 2", WRONG),
    "another image's pixels": ("image * load_gap", "0", WRONG),
    "lead-in of the first image alone": (
        "        now = 0;\n        filled = 0;",
        "        now = 0;",
        WRONG,
    ),
}


#: One of each kind: the others are of the same kinds in other places.
TYPICAL = {
    "no barrier in a step",
    "a wait too few",
    "rows beyond the image",
    "the wrong kernel row",
}


@pytest.mark.parametrize("what", faults(FAULTS, "a wait too few", TYPICAL))
def test_planted_fault(with_fault: Callable[..., Path], what: str) -> None:
    """A test that does not notice these would not notice the real ones either."""
    old, new, report = FAULTS[what]
    finished = run(with_fault("test_wide.cpp", ("wide.h", old, new)), "quick")
    assert finished.returncode == 1
    assert re.search(report, finished.stdout), finished.stdout[-2000:]
