"""Exported networks against runtimes: the dense and the folded network in ONNX Runtime, OpenVINO
and PyTorch, every decomposed layer at group size 4, float32 and 8 bits, two threads.

Each candidate is a process of its own (:mod:`benchmarks.candidates`). They are timed in turn, in
blocks with pauses between them, and their outputs are compared first. ``--full`` takes more and
longer blocks. A runtime that is not installed is left out, and named."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import gross
import numpy as np
import pytest
import torch
from gross.supernet import dense_network
from pytest_benchmark.fixture import BenchmarkFixture

from gross_kernels.program import Step, Steps, run

from . import measure
from .candidates import CANDIDATES, NETWORKS, parsed, supernet
from .conftest import DEPLOYED
from .measure import stopwatch

pytestmark = [
    pytest.mark.benchmark(group="deployment", timer=stopwatch, disable_gc=True),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares processors"),
]

CASES = [
    *(
        (name, batch, precision)
        for precision in ("float32", "int8")
        for name, batch in (
            ("resnet18", 16),
            ("resnet18", 1),
            ("resnet50", 4),
            ("vgg16", 1),
            ("super-resolution", 1),
        )
    ),
    ("vgg16-cifar", 16, "float32"),
    ("vgg16-cifar", 1, "float32"),
    ("4-layer", 16, "float32"),
    ("4-layer", 1, "float32"),
]
PACKAGES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}
#: Largest difference from the folded network in float32, relative to the largest output; the second
#: catches what is wrong rather than what is coarse.
TOLERANCE = {"float32": 1e-4, "int8": 0.3}
PAUSE = 0.3


@pytest.mark.parametrize(("name", "batch", "precision"), CASES)
def test_network(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, tmp_path: Path, name: str,
    batch: int, precision: str,
) -> None:  # fmt: skip
    full = request.config.getoption("--full", False)
    seconds, rounds = (1.5, 5) if full else (1.0, 3)
    missing = [title for title, package in PACKAGES.items() if find_spec(package) is None]
    candidates = [one for one in CANDIDATES[precision] if parsed(one)[1] not in missing]
    ours = candidates[0]
    times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    with _processes(name, batch, candidates, tmp_path) as processes:
        _compare_outputs(name, batch, candidates, tmp_path, TOLERANCE[precision])
        for _ in range(rounds):
            for candidate, process in processes.items():
                times[candidate].append(_block(process, seconds))
                time.sleep(PAUSE)
    network, size = supernet(name), NETWORKS[name][1]
    entry = {
        "subject": name,
        "batch": batch,
        "precision": precision,
        "missing": missing,
        "milliseconds": {one: statistics.median(each) for one, each in times.items()},
        # Of blocks in the same round.
        "ratios": {
            one: statistics.median(
                other / own for other, own in zip(each, times[ours], strict=True)
            )
            for one, each in times.items()
        },
        "mac_ratio": gross.macs(dense_network(network), size).total
        / gross.macs(network, size).total,
        **measure.machine(),
    }
    benchmark.extra_info.update(entry)
    request.config.stash[DEPLOYED].append(entry)

    def timed() -> None:
        stopwatch.seconds += entry["milliseconds"][ours] / 1e3

    benchmark.pedantic(timed, rounds=1)


def test_host_time(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    """What a program's call, and each of its steps, costs beside arithmetic: layers of 16 channels
    on one pixel. Goal: at most 4 µs a step."""

    def microseconds(count: int) -> float:
        weights = [torch.randn(16, 16, 1, 1), torch.randn(16, 4, 3, 3), torch.randn(16, 16, 1, 1)]
        step = {
            "activation": "relu", "in_channels": 16, "width": (16, 16), "group_size": 4,
            "out_channels": 16, "kernel_size": (3, 3), "padding": (1, 1), "weights": 0,
        }  # fmt: skip
        steps = Steps(tuple(Step("layer", i, **step) for i in range(count)), 1, (count,))
        image = torch.randn(1, 16, 1, 1)
        program, text = steps.pack(weights, image), steps.text()
        times = []
        with torch.inference_mode():
            for _ in range(500):
                began = time.perf_counter()
                run([image], program, text)
                times.append(time.perf_counter() - began)
        return 1e6 * statistics.median(times)

    one, many = microseconds(1), microseconds(21)
    entry = {"call": one, "step": (many - one) / 20}
    benchmark.extra_info.update(entry)
    request.config.stash[DEPLOYED].append(entry)

    def ours() -> None:
        stopwatch.seconds += entry["step"] / 1e6

    benchmark.pedantic(ours, rounds=1)


@contextmanager
def _processes(
    name: str, batch: int, candidates: list[str], folder: Path
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One process for each candidate, ready. OpenVINO reads the files that ONNX Runtime's processes
    write."""
    started: dict[str, subprocess.Popen[str]] = {}
    later = [one for one in candidates if parsed(one)[1] == "OpenVINO"]
    try:
        for some in ([one for one in candidates if one not in later], later):
            for candidate in some:
                command = [sys.executable, "-m", "benchmarks.candidates", name, str(batch)]
                started[candidate] = subprocess.Popen(
                    [*command, candidate, str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=Path(__file__).parents[1],
                )
            for candidate in some:
                output = started[candidate].stdout
                assert output is not None
                while (line := output.readline()).strip() != "ready":
                    assert line, f"{candidate}: ended before it was ready"
        yield {candidate: started[candidate] for candidate in candidates}
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def _block(process: subprocess.Popen[str], seconds: float) -> float:
    """The median of one block's calls in milliseconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def _compare_outputs(
    name: str, batch: int, candidates: list[str], folder: Path, tolerance: float
) -> None:
    """Dense and folded compute the same."""
    outputs = {one: np.load(folder / f"{name}-{batch}-{one}.npy") for one in candidates}
    wanted = outputs.get("folded PyTorch", outputs["folded ours"])
    for candidate, output in outputs.items():
        error = np.abs(output - wanted).max() / np.abs(wanted).max()
        assert error <= tolerance, (candidate, error)
