"""What the CUDA library's plans do: ``sweep`` times every plan of six layers beside the model's
estimate; ``profile`` has Nsight Compute count what eight kernels do."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gross_kernels.backends import cuda
from gross_kernels.geometry import Geometry
from gross_kernels.series import Series

from ..measure import Call, check_close, median, time_call
from .cases import OPERATIONS, SIZES, TINY, Shape
from .results import Entry, Results, described

#: Layer and group size: small and large maps, every kernel, both strides.
SWEPT = (
    (Shape(128, 64, 56), 16),
    (Shape(128, 64, 56), 64),
    (Shape(128, 128, 28), 32),
    (Shape(128, 512, 7), 4),
    (Shape(128, 64, 56, 2), 16),
    (Shape(128, 256, 14), 1),
)
#: Timed calls of each plan.
ROUNDS = 5
PROFILED = (
    *((Shape(128, 64, 56), size, "forward") for size in (16, 32, 64)),
    *((Shape(128, 64, 56), size, "input gradient") for size in (16, 64)),
    *((Shape(128, 64, 56), size, "weight gradient") for size in (16, 64)),
    (Shape(128, 512, 7), 16, "forward"),
)
#: By what the table calls it: time, share of the memory's and the matrix unit's peak, cycles lost
#: to conflicts in shared memory, and what a warp waits for, as parts of its cycles.
COUNTERS = {
    "µs": "gpu__time_duration.sum",
    "memory %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "matrix unit %": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "bank conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "bank reads": "l1tex__data_bank_reads.sum",
    **{
        f"waits: {reason}": f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
        for reason in (
            *("barrier", "long_scoreboard", "short_scoreboard"),
            *("mio_throttle", "math_pipe_throttle", "wait"),
        )
    },
}
#: What a profiled process prints before the calls of a case.
MARK = "profiled case"


def arguments(
    shape: Shape, group_size: int, device: str
) -> tuple[Tensor, Tensor, Series, Geometry]:
    """Input, gradient, series and geometry of a case, 16-bit and channels-last."""
    geometry = Geometry((shape.stride,) * 2, (1, 1))
    size = geometry.output_size((shape.size,) * 2, (3, 3))
    input, grad = (
        torch.randn(shape.batch, shape.channels, *each, device=device, dtype=torch.bfloat16).to(
            memory_format=torch.channels_last
        )
        for each in ((shape.size,) * 2, size)
    )
    group_sizes = [s for s in SIZES if s <= group_size]
    terms = [
        torch.randn(shape.channels, s, 3, 3, device=device, dtype=torch.bfloat16)
        for s in group_sizes
    ]
    return input, grad, Series(terms, len(terms)), geometry


def call_of(operation: str, shape: Shape, group_size: int, device: str) -> Call:
    """A call of the CUDA backend."""
    input, grad, series, geometry = arguments(shape, group_size, device)
    function = getattr(cuda, OPERATIONS[operation])
    if operation == "forward":
        return partial(function, input, series, geometry)
    return partial(function, grad, input, series, geometry)


# Every plan -------------------------------------------------------------------------------------


def sweep(results: Results, device: str, rounds: int, deadline: float) -> None:
    """The part "sweep": every plan of every case, as far as its share of the time goes; those that
    the model likes best first."""
    cases: Sequence[tuple[Shape, int]] = SWEPT if device == "cuda" else [(TINY[0], 32)]
    work = [(shape, size, operation) for shape, size in cases for operation in OPERATIONS]
    for i, (shape, size, operation) in enumerate(work):
        label = {"shape": shape.label, "group size": size, "operation": operation}
        share = max(0.0, deadline - time.monotonic()) / (len(work) - i)
        results.add(
            "sweep",
            label,
            partial(swept, shape, size, operation, device, min(share, 0.8 * results.longest)),
        )


def swept(shape: Shape, size: int, operation: str, device: str, seconds: float) -> Entry:
    """Plans of one case with their measured microseconds, for so long."""
    end = time.monotonic() + seconds
    # A plan number counts for this case alone.
    library, name = torch.ops.gross_cuda, OPERATIONS[operation]
    numbers = cuda.properties(0)
    shape_numbers = [shape.batch, shape.channels, shape.size, shape.size, shape.channels]
    group_sizes = [s for s in SIZES if s <= size]
    types = (torch.bfloat16, torch.bfloat16)
    found = library.plans(name, *types, shape_numbers, group_sizes, shape.stride, numbers)
    plans: list[dict[str, Any]] = json.loads(found)
    if device == "cpu":
        plans = plans[:3]
    with torch.inference_mode():
        call = call_of(operation, shape, size, device)
        expected = call()
        order = sorted(
            range(len(plans)), key=lambda i: (not plans[i]["chosen"], plans[i]["clocks"])
        )
        try:
            for number in order:
                if time.monotonic() > end:
                    break
                plans[number] |= timed(call, expected, name, number)
        finally:
            library.set_plan(name, -1)
    wrong = [i for i, plan in enumerate(plans) if "error" in plan]
    return {"plans": plans} | (
        {"error": f"{len(wrong)} plans, first {wrong[0]}: {plans[wrong[0]]['error']}"}
        if wrong
        else {}
    )


def timed(call: Call, expected: Any, name: str, number: int) -> dict[str, Any]:
    """One plan's microseconds; its error where it fails, or where its values are others."""
    torch.ops.gross_cuda.set_plan(name, number)
    found: dict[str, Any] = {}
    try:
        check_close(call(), expected)
    except AssertionError as error:
        found["error"] = str(error)
    except RuntimeError as error:
        return {"error": described(error)}
    return found | {"measured": 1e6 * median([time_call(call) for _ in range(ROUNDS)])}


# Counters ---------------------------------------------------------------------------------------


def profile(results: Results, device: str, rounds: int, deadline: float) -> None:
    """The part "profile": ``ncu`` on a process that runs the cases; where there is none, the cases
    run without it, and an entry says so."""
    if os.environ.get("GROSS_PROFILED") == "1":
        run_profiled(device)
        return
    ncu = shutil.which("ncu") or next(
        (str(path) for path in sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))), None
    )
    command = [sys.executable, "-m", "benchmarks.gpu", str(results.folder), "--part", "profile"]
    if device == "cpu":
        command.append("--dry")
    if ncu is not None:
        # Clocks are left as they are: the machine may be shared.
        options = ["--clock-control", "none", "--profile-from-start", "off", "--csv"]
        metrics = ["--page", "raw", "--metrics", ",".join(COUNTERS.values())]
        command = [ncu, *options, *metrics, *command]
    seconds = max(5.0, deadline - time.monotonic())
    results.longest = max(results.longest, seconds + 10)
    results.add("profile", {"by": ncu or "no ncu"}, partial(counted, command, ncu, seconds))


def counted(command: list[str], ncu: str | None, seconds: float) -> Entry:
    """What the profiled process and ``ncu`` print, read."""
    finished = subprocess.run(
        command,
        env=os.environ | {"GROSS_PROFILED": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{command[0]}: {finished.stdout[-300:]} {finished.stderr[-300:]}")
    if ncu is None:
        cases = [line for line in finished.stdout.splitlines() if line.startswith(MARK)]
        return {"error": f"ncu is not installed; {len(cases)} cases run without it"}
    return {"kernels": list(read(finished.stdout))}


def read(printed: str) -> Iterator[dict[str, str]]:
    """Kernels with their case and counters, from what ncu and the profiled process print: a line
    for every case and, below it, one for each kernel; at last CSV (``--page raw``), a line of
    names, one of units, then a line a kernel."""
    cases, case = [], ""
    for line in printed.splitlines():
        if line.startswith(MARK):
            case = line.removeprefix(MARK).strip()
        elif line.startswith("==PROF== Profiling"):
            cases.append(case)
    table = [line for line in printed.splitlines() if line.startswith('"')]
    rows = list(csv.reader(io.StringIO("\n".join(table))))
    if len(rows) < 3:
        raise RuntimeError(f"ncu: got no table, {printed[-300:]}")
    for row in rows[2:]:
        values = dict(zip(rows[0], row, strict=True))
        yield {
            "case": cases[int(values["ID"])],
            "kernel": values["Kernel Name"][:60],
            **{title: values.get(name, "–") for title, name in COUNTERS.items()},
        }


def run_profiled(device: str) -> None:
    """The cases, each once warm and once between the profiler's start and stop."""
    runtime = torch.cuda.cudart() if device == "cuda" else None
    cases = PROFILED if device == "cuda" else [(TINY[0], 16, each) for each in OPERATIONS]
    for shape, size, operation in cases:
        with torch.inference_mode():
            call = call_of(operation, shape, size, device)
            call()
            print(MARK, shape.label, size, operation, flush=True)
            if runtime is not None:
                torch.cuda.synchronize()
                runtime.cudaProfilerStart()
            call()
            if runtime is not None:
                torch.cuda.synchronize()
                runtime.cudaProfilerStop()
