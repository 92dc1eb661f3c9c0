"""The CUDA weight gradient on the host: values against plain loops in double precision, the same
bits whatever runs first, counted traffic, planted faults."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from build_once import SANITIZERS

from .conftest import Compile, faults, run


@pytest.mark.build
def test_kernels(program: Compile) -> None:
    """Every kernel under AddressSanitizer and UndefinedBehaviorSanitizer."""
    finished = run(program("test_weight_grad.cpp", *SANITIZERS), "kernels")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


def test_numerics(program: Compile) -> None:
    """Every dtype, packing and corner, and random cases."""
    finished = run(program("test_weight_grad.cpp", "-O2"), "numerics")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


def test_traffic(program: Compile) -> None:
    """Bytes of global memory, for group sizes up to 32: within 1.3 times the tensors' at 56×56 and
    above, 1.6 below."""
    finished = run(program("test_weight_grad.cpp", "-O2"), "traffic")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


WRONG = "values wrong"
HEADER, LAUNCHER = "weight_grad.h", "weight_grad.cu"
#: What a fault is, its file and change, and what must be reported.
FAULTS = {
    "no barrier in a step": (
        HEADER,
        "    barrier(1 + team, p.team_threads);\n",
        "",
        "race|in flight",
    ),
    "a wait too few": (
        HEADER,
        "copy_async_wait<weight_grad_stages - 2>",
        "copy_async_wait<weight_grad_stages - 1>",
        "in flight",
    ),
    "a request into the stage in use": (
        HEADER,
        "(phase + live - 1) % live * p",
        "phase * p",
        "race|in flight",
    ),
    "images beyond the last": (
        HEADER,
        "(image < images_left && ",
        "(image < never && ",
        "out of range|" + WRONG,
    ),
    "columns beyond the image": (
        HEADER,
        " && static_cast<unsigned>(x) < static_cast<unsigned>(of_input ? p.in_w : p.out_w));",
        ");",
        "out of range|" + WRONG,
    ),
    "another team's gradient rows": (
        HEADER,
        "t < p.out_h && steps > absent ?",
        "t < p.out_h ?",
        WRONG,
    ),
    "no zeros below the last row": (
        HEADER,
        "t < p.out_h && steps > absent ?",
        "steps > absent ?",
        "out of range|" + WRONG,
    ),
    "the first row takes the last image's": (HEADER, "if (now > 0) {", "{", WRONG),
    "the wrong kernel row": (
        HEADER,
        "sum[(first_kh + step_kh * row) * 3 + kw]",
        "sum[(2 - first_kh - step_kh * row) * 3 + kw]",
        WRONG,
    ),
    "the wrong gradient row": (
        HEADER,
        "gradient[(phase + live - row) % live]",
        "gradient[(phase + row) % live]",
        WRONG,
    ),
    "the next line begins where a strip would": (
        HEADER,
        "          in_row += p.in_next_line;\n",
        "",
        WRONG,
    ),
    "sums over rows still read": (
        HEADER,
        "    barrier(0, p.threads);\n    GROSS_UNROLL\n    for (int kw = 0",
        "    GROSS_UNROLL\n    for (int kw = 0",
        "race",
    ),
    "sums read before they are there": (
        HEADER,
        "    barrier(0, p.threads);\n    GROSS_NO_UNROLL\n    for (int kw = 0",
        "    for (int kw = 0",
        "race",
    ),
    "a team left out": (HEADER, "other < p.teams; other++", "other < p.teams - 1; other++", WRONG),
    "sums spread when written alone": (
        HEADER,
        "(kw * plane + row * width + spread(row, column, width)) * 4;",
        "(kw * plane + row * width + column) * 4;",
        WRONG,
    ),
    "activations cut to TF32": (
        HEADER,
        "words[i] ="
        " round_tf32(as_float(load_shared_32(address + i % 2 * 32 + i / 2 * half_bytes, true)));",
        "words[i] = load_shared_32(address + i % 2 * 32 + i / 2 * half_bytes, true);",
        WRONG,
    ),
    "a block left out": (
        HEADER,
        "block < p.blocks; block +=",
        "block < p.blocks - 1; block +=",
        WRONG,
    ),
    "blocks' sums read before they are there": (
        HEADER,
        "true);\n  barrier(0, weight_grad_adders * 32);",
        "true);",
        "race",
    ),
    "gradients without their gates": (HEADER, "gate * sum, inside)", "sum, inside)", WRONG),
    "inactive terms left as they were": (
        HEADER,
        "for (int i = p.series.active; i < p.series.count; i++) {",
        "for (int i = p.series.count; i < 0; i++) {",
        WRONG,
    ),
    "a gate with parts of another": (
        HEADER,
        "first + thread < count));",
        "true));",
        "out of range|race|" + WRONG,
    ),
    "pixels a power of two apart": (LAUNCHER, ": chunks | 1);", ": chunks);", "bank conflicts"),
    "one stage too little": (
        LAUNCHER,
        "larger(weight_grad_stages * p.stage_bytes, sums)",
        "larger((weight_grad_stages - 1) * p.stage_bytes, sums)",
        "out of range",
    ),
    "odd columns exchanged": (LAUNCHER, "slots + kw / 2) * p", "slots + 1 - kw / 2) * p", WRONG),
    "the last odd row left out": (LAUNCHER, ": p.in_h / 2;", ": (p.in_h - 1) / 2;", WRONG),
    "half of a product forgotten": (
        LAUNCHER,
        "- 1 <= line - step / 2",
        "- 2 <= line - step / 2",
        WRONG,
    ),
}


#: One of each kind: the others are of the same kinds in other places.
TYPICAL = {
    "the wrong gradient row",
    "sums over rows still read",
    "activations cut to TF32",
    "gradients without their gates",
    "pixels a power of two apart",
    "one stage too little",
    "odd columns exchanged",
}


@pytest.mark.parametrize("what", faults(FAULTS, "activations cut to TF32", TYPICAL))
def test_planted_fault(with_fault: Callable[..., Path], what: str) -> None:
    """A test that does not notice these would not notice the real ones either."""
    file, old, new, report = FAULTS[what]
    finished = run(with_fault("test_weight_grad.cpp", (file, old, new)), "numerics")
    assert finished.returncode == 1, finished.stdout[-2000:] + finished.stderr[-2000:]
    assert re.search(report, finished.stdout), finished.stdout[-2000:]
