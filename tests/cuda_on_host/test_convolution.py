"""The CUDA convolution on the host: values against plain loops in float64, counted traffic, planted
faults."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from build_once import SANITIZERS

from .conftest import Compile, faults, run


@pytest.mark.build
def test_numerics(program: Compile) -> None:
    """Every kernel, dtype and packing, both ways for copies to land, under both sanitizers."""
    finished = run(program("test_convolution.cpp", *SANITIZERS), "numerics")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


def test_traffic(program: Compile) -> None:
    """Global memory within 1.3 times what must move at 56×56 and above, 1.6 times at 14×14, for
    group sizes to 32.

    29 to 31 are not served in 16 bits: groups that lie across a tile's edge make five products of
    it."""
    finished = run(program("test_convolution.cpp", "-O2", "-Wno-array-bounds"), "traffic")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


@pytest.mark.build
def test_conflicts(program: Compile) -> None:
    """Shared memory, while weights are assembled and in the input gradient of stride 2: within 1.05
    times the wavefronts of no conflicts of banks, copies 1.15."""
    finished = run(program("test_convolution.cpp", "-O2", "-Wno-array-bounds"), "conflicts")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


STEP = "barrier(1 + place.team, team_threads);\n    "
STORE = (
    "store_previous(step);\n"
    "    reader.request(step + t.stages - 1 < last_step, ring.last(place));\n    "
)
HALF = (
    "const auto half_of = [&](int step) { return (step & 1) * t.teams * t.staging_bytes; };\n"
    "  const auto store_previous = [&](int step) {"
)
RACE, WRONG = "in flight|race", "values wrong"
#: What the fault is: the file, what stands there and what instead, and what must be reported.
FAULTS = {
    "no barrier in a step": (
        "convolution.h",
        STEP + "if (store_first) store",
        "if (store_first) store",
        RACE,
    ),
    "no barrier in a halving step": (
        "convolution.h",
        STEP + STORE + "GROSS_UNROLL",
        STORE + "GROSS_UNROLL",
        RACE,
    ),
    "no barrier in a doubling step": (
        "convolution.h",
        STEP + STORE + "if (step",
        STORE + "if (step",
        RACE,
    ),
    "a lane misses the barrier": (
        "convolution.h",
        STEP + "if (store_first)",
        "if (place.lane != 3) " + STEP + "if (store_first)",
        "divergent",
    ),
    "waits for a row too few": (
        "convolution.h",
        "copy_async_wait<6>()",
        "copy_async_wait<7>()",
        "in flight",
    ),
    "requests into the stage in use": (
        "convolution.h",
        "return (stage == 0 ? place.stages_end : stage) - place.stage_step",
        "return stage",
        RACE,
    ),
    "one half for finished rows": (
        "convolution.h",
        HALF + "  // what",
        HALF.replace("(step & 1)", "0") + "  // what",
        "race",
    ),
    "terms read before all are there": (
        "convolution.h",
        "for (;;) {\n    barrier(0, place.threads);\n",
        "for (;;) {\n",
        RACE,
    ),
    "weights read before all are there": (
        "convolution.h",
        "outputs.end)};\n    barrier(0, place.threads);",
        "outputs.end)};",
        "race",
    ),
    "rows over weights": (
        "convolution.h",
        "matrix, place.lane);\n  barrier(0, place.threads);",
        "matrix, place.lane);",
        RACE,
    ),
    "terms not waited for": (
        "convolution.h",
        "copy_async_wait<early_rows>()",
        "copy_async_wait<early_rows + 1>()",
        "in flight",
    ),
    "gaps between images not cleared": (
        "convolution.h",
        "if (S::many) reader.clear_gaps(place);",
        "",
        WRONG,
    ),
    "right of odd widths not cleared": (
        "convolution.h",
        "halving && p.source.width % 2 ? t.pitch / 16 : 0",
        "0",
        WRONG,
    ),
    "beyond the groups not cleared": (
        "convolution.h",
        "Weights::clear(t.tiles, matrix, place.thread, place.threads);",
        "",
        WRONG,
    ),
    "kernel rows exchanged": (
        "convolution.h",
        "sum[finished][a], weight[6 + kw]",
        "sum[finished][a], weight[kw]",
        WRONG,
    ),
    "sums kept from the last image": (
        "convolution.h",
        "clear(sum);  // once",
        "if (step == first_step) clear(sum);  // once",
        WRONG,
    ),
    "halving takes a wrong column": (
        "convolution.h",
        "kw == 0 ? 0 - t.pitch : kw == 1",
        "kw == 0 ? 0 : kw == 1",
        WRONG,
    ),
    "doubling takes a wrong tap": (
        "convolution.h",
        "multiply<S::type>(sum[1][a], weight[tap][k]",
        "multiply<S::type>(sum[1][a], weight[tap - 2][k]",
        WRONG,
    ),
    "halving keeps the row before": (
        "convolution.h",
        "first_step = share.row > 0 ? -1 : 0",
        "first_step = 0",
        WRONG + "|race|written once",
    ),
    "images beyond the last": (
        "convolution.h",
        "(left & 1u << 2 * j) && (!S::many || image < images)",
        "left & 1u << 2 * j",
        "out of range",
    ),
    "columns beyond the image": (
        "convolution.h",
        "static_cast<unsigned>(column + j * t.read_pixels) < static_cast<unsigned>(p.source.width)",
        "true",
        "out of range|" + WRONG,
    ),
    "channels beyond the last": (
        "convolution.h",
        "const bool on = channel < p.channels.destination && image",
        "const bool on = image",
        "out of range|race|written once",
    ),
    "shares overlap": (
        "convolution.h",
        "begin = static_cast<int>(rows * share / shares)",
        "begin = static_cast<int>(rows * share / shares) - (share > 0)",
        "race|written once",
    ),
    "taps not turned": ("assembly.h", "((8 - tap) * rows", "(tap * rows", WRONG),
    "gates forgotten": (
        "assembly.h",
        "terms.gates ? as_float(load_global_32(terms.gates + i, true)) : 1.f",
        "1.f",
        WRONG,
    ),
    "a group too wide": (
        "assembly.h",
        "const bool on = inside && relative >= 0 && relative < s;",
        "const bool on = inside && relative >= 0 && relative <= s;",
        WRONG + "|out of range",
    ),
    "a pitch of half a piece more": (
        "convolution.cu",
        "t.pitch = (choice.chunks | 1) * 16;",
        "t.pitch = (choice.chunks | 1) * 16 + 8;",
        "misaligned",
    ),
    "too little shared memory": (
        "convolution.cu",
        "t.shared_bytes = larger(marching, limit - left + t.piece * raw);",
        "t.shared_bytes = larger(marching, limit - left + t.piece * raw) - 4096;",
        "out of range",
    ),
}


@pytest.mark.build
def test_cases_of_faults(program: Compile) -> None:
    """Without a fault they pass."""
    finished = run(program("test_convolution.cpp", *SANITIZERS), "faults")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


#: One of each kind: the others are of the same kinds in other places.
TYPICAL = {
    "no barrier in a step",
    "a lane misses the barrier",
    "waits for a row too few",
    "one half for finished rows",
    "gaps between images not cleared",
    "images beyond the last",
    "channels beyond the last",
    "taps not turned",
    "a pitch of half a piece more",
    "too little shared memory",
}


@pytest.mark.parametrize("fault", faults(FAULTS, "no barrier in a step", TYPICAL))
def test_fault_is_seen(fault: str, with_fault: Callable[..., Path]) -> None:
    file, before, after, report = FAULTS[fault]
    program = with_fault("test_convolution.cpp", (file, before, after), flags=["-DONE_TYPE"])
    finished = run(program, "faults")
    assert finished.returncode == 1, finished.stdout[-4000:] + finished.stderr[-4000:]
    assert re.search("FAILED.*(" + report + ")", finished.stdout), finished.stdout[-4000:]
