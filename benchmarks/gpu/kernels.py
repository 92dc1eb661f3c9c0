"""The grouped convolution on a GPU as dispatch serves it, beside the Triton kernels, cuDNN,
expand + sum + cuDNN, and a copy of what must move, with the plan that ran: 16-bit, channels-last,
every call below autograd and from a cold second-level cache, on those shapes of ``shapes.cores()``
whose widths are powers of two."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gross_kernels import explain, ops
from gross_kernels.backends import reference
from gross_kernels.dispatch import BACKENDS, serving
from gross_kernels.geometry import Geometry
from gross_kernels.series import Series, convolution_macs, restrict, sum_terms

from ..measure import Call, check_close, machine, median, rates, time_call
from .cases import OPERATIONS, SHAPES, SIZES, TINY, Shape, sizes
from .results import Entry, Results, described


def calls(
    shape: Shape, active: int, operation: str, dtype: torch.dtype, device: str
) -> tuple[str, dict[str, Call]]:
    """The backend that serves a case, and the calls: ours, its definition, what it is compared
    with."""
    geometry = Geometry((shape.stride,) * 2, (1, 1))
    size = geometry.output_size((shape.size,) * 2, (3, 3))
    shapes = (
        (shape.batch, shape.channels, shape.size, shape.size),
        (shape.batch, shape.channels, *size),
    )
    input, grad = (
        torch.randn(each, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for each in shapes
    )
    terms = [torch.randn(shape.channels, s, 3, 3, device=device, dtype=dtype) for s in sizes(shape)]
    series = Series(terms, active)
    weight = sum_terms(series, shape.channels)
    needs = (operation == "input gradient", operation == "weight gradient", False)
    count = torch.tensor(active)

    def cudnn(weight: Tensor, input: Tensor = input, grad: Tensor = grad) -> Any:
        arguments = (
            input,
            weight,
            None,
            *geometry,
            False,
            (0, 0),
            shape.channels // weight.shape[1],
        )
        if operation == "forward":
            return torch.ops.aten.convolution(*arguments)
        return torch.ops.aten.convolution_backward(grad, *arguments, needs)

    def materialised() -> Any:
        result = cudnn(sum_terms(series, shape.channels))
        if operation == "weight gradient":
            return [restrict(result[1], term.shape[1], shape.channels) for term in terms[:active]]
        return result

    def ours() -> Any:
        if operation == "forward":
            return torch.ops.gross.series_conv2d(input, terms, count, None, *geometry)
        return torch.ops.gross.series_conv2d_backward(
            grad, input, terms, count, None, *geometry, needs
        )

    def definition() -> Any:
        arguments = (input, series, geometry)
        if operation == "forward":
            return reference.forward(*arguments)
        if operation == "input gradient":
            return reference.input_grad(grad, *arguments)
        return reference.weight_grad(grad, *arguments)[0]

    def triton() -> Any:
        arguments = (input, series, geometry)
        function = getattr(BACKENDS["triton"], OPERATIONS[operation])
        return function(*arguments) if operation == "forward" else function(grad, *arguments)

    def with_set(name: str, value: Any, otherwise: Any) -> Call:
        """Ours, while the CUDA library is told something."""
        tell = getattr(torch.ops.gross_cuda, name)

        def call() -> Any:
            tell(value)
            try:
                return ours()
            finally:
                tell(otherwise)

        return call

    chosen = serving(OPERATIONS[operation], input, series, geometry)
    variants: dict[str, Call] = {}
    if chosen is BACKENDS["cuda"]:
        if "triton" in BACKENDS:
            variants["Triton"] = triton
        if operation == "weight gradient":
            variants |= {"first pass": with_set("set_passes", 1, 3)}
            variants |= {"second pass": with_set("set_passes", 2, 3)}
        elif SIZES[active - 1] >= 32:
            variants["without warpgroups"] = with_set("set_warpgroups", False, True)
    # As many bytes read and written together as input and output have.
    half = torch.empty((input.nbytes + grad.nbytes) // 2, device=device, dtype=torch.uint8)
    target = torch.empty_like(half)
    contiguous = [tensor.contiguous() for tensor in (input, grad)]
    by = next(name for name, backend in BACKENDS.items() if backend is chosen)
    return by, {
        "ours": ours,
        "definition": definition,
        **variants,
        "cuDNN channels-last": partial(cudnn, weight.contiguous(memory_format=torch.channels_last)),
        "cuDNN contiguous": partial(cudnn, weight, *contiguous),
        "expand + sum + cuDNN": materialised,
        "copy": partial(target.copy_, half),
    }


@contextlib.contextmanager
def without_search() -> Iterator[None]:
    """Within, cuDNN takes its first algorithm: of float32 and grouped convolutions it would try all
    for seconds."""
    if not torch.backends.cudnn.benchmark:
        yield
        return
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = True


def measure(
    shape: Shape, active: int, operation: str, dtype: torch.dtype, device: str, rounds: int
) -> Entry:
    """What is found of one case: medians in milliseconds and, pairwise, how many times as fast ours
    is. Checked against the definition first; with wrong values, or without a rival that fails, it
    is measured all the same, and "error" says so."""
    by, each = calls(shape, active, operation, dtype, device)
    errors = []
    with without_search():
        expected = each.pop("definition")()
    for name in ("ours", "Triton"):
        if name in each:
            try:
                check_close(each[name](), expected)
            except AssertionError as error:
                errors.append(f"{name}: wrong values: {error}")
    del expected
    first: dict[str, float] = {}
    for name, call in list(each.items()):
        try:
            call()
            first[name] = time_call(call)
        except Exception as error:
            if name == "ours":
                raise
            errors.append(f"{name}: {described(error)}")
            del each[name]
            synchronise(device)
    # The slower of two layouts is not what a user would run.
    layouts = [name for name in first if name.startswith("cuDNN")]
    if len(layouts) == 2:
        del each[max(layouts, key=first.__getitem__)]
    seconds: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(rounds):
        for name, call in each.items():
            seconds[name].append(time_call(call))
    names = {name: "cuDNN" if name.startswith("cuDNN") else name for name in each}
    ratios = {
        names[name]: median([b / a for a, b in zip(seconds["ours"], seconds[name], strict=True)])
        for name in each
    }
    geometry = Geometry((shape.stride,) * 2, (1, 1))
    size = geometry.output_size((shape.size,) * 2, (3, 3))
    milliseconds = {names[name]: 1e3 * median(values) for name, values in seconds.items()}
    macs = shape.batch * convolution_macs(shape.channels, SIZES[active - 1], (3, 3), size)
    pixels = shape.size**2 + size[0] * size[1]
    kept = [name for name in each if name.startswith("cuDNN")]
    each["ours"]()
    return {
        "batch": shape.batch,
        "size": shape.size,
        "dtype": str(dtype).removeprefix("torch."),
        "macs": macs,
        "milliseconds": milliseconds,
        **rates(macs, shape.batch * shape.channels * pixels * dtype.itemsize, milliseconds["ours"]),
        "cuDNN format": kept[0].removeprefix("cuDNN ") if kept else "none",
        "ratios": ratios,
        "backend": by,
        **({"plan": ran(operation)} if by == "cuda" else {}),
        **({"error": "; ".join(errors)} if errors else {}),
    }


def ran(operation: str) -> dict[str, Any] | None:
    """The plan of the CUDA library that the last call of an operation ran."""
    text = torch.ops.gross_cuda.ran(OPERATIONS[operation])
    return json.loads(text) if text else None


def host_microseconds(device: str, repeats: int) -> float:
    """Wall time of one forward call without gradients on a tiny tensor: what the host spends, as
    long as the GPU is faster."""
    input = torch.randn(1, 64, 4, 4, device=device, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    terms = [torch.randn(64, s, 3, 3, device=device, dtype=torch.bfloat16) for s in SIZES[:4]]
    arguments = (input, terms, torch.tensor(2), None, (1, 1), (1, 1), (1, 1))
    with torch.inference_mode():
        for _ in range(min(100, repeats)):
            torch.ops.gross.series_conv2d(*arguments)
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            torch.ops.gross.series_conv2d(*arguments)
        elapsed = time.perf_counter() - begin
        synchronise(device)
    return 1e6 * elapsed / repeats


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run(
    results: Results,
    shapes: Sequence[Shape],
    device: str,
    rounds: int,
    deadline: float,
    progress: Callable[[str], None],
) -> None:
    """The part "kernels", until the deadline (``time.monotonic``)."""
    for shape in shapes:
        count = len(sizes(shape))
        for active in range(1, count + 1) if device == "cuda" else {1, count}:
            for operation in OPERATIONS:
                label = {
                    "shape": shape.label,
                    "group size": SIZES[active - 1],
                    "operation": operation,
                }
                if time.monotonic() > deadline:
                    begin = f"{shape.label}, group size {SIZES[active - 1]}"
                    progress(f"out of time: everything from {begin} is left out")
                    return
                with torch.inference_mode():
                    results.add(
                        "kernels",
                        label,
                        partial(measure, shape, active, operation, torch.bfloat16, device, rounds),
                    )
        progress(f"{shape.label} done")


def measure_all(results: Results, device: str, rounds: int, deadline: float) -> None:
    """Facts of the run, and the part "kernels"."""
    sample = torch.empty(1, 64, 8, 8, device=device, dtype=torch.bfloat16).to(
        memory_format=torch.channels_last
    )
    term = torch.empty(64, 4, 3, 3, device=device, dtype=torch.bfloat16)
    results.state(
        machine()
        | clocks()
        | {
            "backend": explain(sample, [term], padding=1),
            **({} if device == "cuda" else {"measured": "nothing: a CPU played the card"}),
            "CPU kernels": "loaded" if ops.load_error is None else "not loaded",
        }
    )
    results.add(
        "host",
        {"call": "forward"},
        lambda: {"microseconds": host_microseconds(device, 2000 if device == "cuda" else 2)},
    )
    run(results, SHAPES if device == "cuda" else TINY, device, rounds, deadline, print)


def clocks() -> dict[str, str]:
    """Clocks and driver as the driver says them; nothing where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem"]
    try:
        found = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"driver, clocks now, at most, of memory": found.stdout.strip()}
