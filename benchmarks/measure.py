"""Interleaved timing: ours and every baseline in turn, A B C A B C …, so that a ratio compares
neighbouring calls.

On a shared machine single timings mean little; the median of pairwise ratios holds still.
pytest-benchmark records the times of ours through :data:`stopwatch`; everything else goes to
``extra_info``."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from gross_kernels import use_backend
from gross_kernels.series import convolution_macs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: (dtype, memory format) by device, as names in torch; the first is measured on every shape.
PRECISIONS = {
    "cpu": (
        ("float32", "channels_last"),
        ("float32", "contiguous_format"),
        ("bfloat16", "channels_last"),
    ),
    "cuda": (("bfloat16", "channels_last"), ("float16", "channels_last")),
}[DEVICE.type]
#: Largest difference from the reference that passes, relative to the largest magnitude: eight units
#: in the last place in 16-bit, and in float32 room for sums of 10⁵ products in another order.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 6e-2}
#: A variant of a baseline that takes this many times as long as the fastest one, both warm, is not
#: timed further.
HOPELESS = 3.0
#: Read between calls on a GPU: more than its second-level cache holds, and long enough (0.1 ms at
#: 4.3 TB/s) to hide the next launch.
FLUSH_BYTES = 512 * 2**20
#: Touched before anything is timed on a CPU: the outputs of one round of most entries.
HEAP_BYTES = 2**30

Call = Callable[[], Any]


@dataclass(frozen=True)
class Budget:
    """How long one comparison is measured: rounds that fill ``seconds``, at least ``least`` and at
    most ``most``."""

    seconds: float
    least: int
    most: int

    def rounds(self, seconds_per_round: float) -> int:
        return min(self.most, max(self.least, int(self.seconds / seconds_per_round)))


QUICK = Budget(seconds=0.15, least=3, most=40)
FULL = Budget(seconds=0.5, least=9, most=100)


class Stopwatch:
    """The clock that pytest-benchmark reads: it advances by what was measured for ours, and stands
    still otherwise."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def __repr__(self) -> str:
        return "stopwatch"


stopwatch = Stopwatch()


def compare(
    benchmark: BenchmarkFixture,
    ours: Call,
    reference: Call,
    baselines: Mapping[str, Mapping[str, Call]],
    budget: Budget,
) -> dict[str, Any]:
    """Check ``ours`` against ``reference``, then time it in turn with every baseline.

    Args:
        benchmark: pytest-benchmark's fixture; it records the times of ours.
        ours, reference: calls that return tensors, or nested sequences of tensors and None; empty
            tensors are ignored.
        baselines: by name, the variants of each; the one with the smallest median counts.
        budget: how long to measure.

    Returns:
        ``milliseconds``, medians of ours and of each baseline's fastest variant; ``variants``, of
        each baseline, the median of every variant in ms, one call's time for the hopeless;
        ``fastest``, each baseline's variant; ``ratios``, each baseline's :func:`ratio`.

    Raises:
        AssertionError: if ours and the reference disagree.
    """
    check_close(ours(), reference())
    warm = {
        (name, variant): _warm(call)
        for name, calls in baselines.items()
        for variant, call in calls.items()
    }
    best = {
        name: min(warm[name, variant] for variant in calls) for name, calls in baselines.items()
    }
    calls = {
        key: baselines[key[0]][key[1]]
        for key, seconds in warm.items()
        if seconds <= HOPELESS * best[key[0]]
    }
    ours_seconds: list[float] = []
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}

    def one_round() -> None:
        ours_seconds.append(time_call(ours))
        stopwatch.seconds += ours_seconds[-1]
        for key, call in calls.items():
            seconds[key].append(time_call(call))

    rounds = budget.rounds(_warm(ours) + sum(warm[key] for key in calls))
    benchmark.pedantic(one_round, rounds=rounds)
    milliseconds = {key: 1e3 * median(values) for key, values in seconds.items()}
    fastest = {
        name: min((k for k in calls if k[0] == name), key=milliseconds.__getitem__)
        for name in baselines
    }
    return {
        "milliseconds": {"ours": 1e3 * median(ours_seconds)}
        | {name: milliseconds[fastest[name]] for name in baselines},
        "variants": {
            name: {
                variant: milliseconds.get((name, variant), 1e3 * warm[name, variant])
                for variant in calls
            }
            for name, calls in baselines.items()
        },
        "fastest": {name: key[1] for name, key in fastest.items()},
        "ratios": {name: ratio(ours_seconds, seconds[key]) for name, key in fastest.items()},
    }


def time_call(call: Call) -> float:
    """Seconds that one call takes, the release of its result included: by the wall clock on a CPU,
    between two events and from a cold second-level cache on a GPU."""
    if DEVICE.type == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    # Summed, not overwritten: lines left dirty would be written back at the cost of the call.
    _flush_buffer().sum()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _flush_buffer() -> Tensor:
    return torch.zeros(FLUSH_BYTES // 4, device=DEVICE)


def _warm(call: Call) -> float:
    """Seconds of the faster of two calls after a first one, which chooses algorithms, compiles and
    fills caches."""
    call()
    return min(time_call(call) for _ in range(2))


def median(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def ratio(ours: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the pairwise ratios ``baseline[i] / ours[i]``: above 1 ours is
    faster."""
    ratios = torch.tensor([b / o for o, b in zip(ours, baseline, strict=True)], dtype=torch.float64)
    q1, q2, q3 = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": q2, "q1": q1, "q3": q3}


def check_close(actual: Any, expected: Any) -> None:
    """Assert that tensors, or nested sequences of tensors, agree within :data:`TOLERANCE` of the
    expected dtype."""
    pairs = list(zip(_tensors(actual), _tensors(expected), strict=True))
    assert pairs, "there is nothing to compare"
    for i, (a, e) in enumerate(pairs):
        assert a.shape == e.shape, (
            f"result {i}: shape {tuple(a.shape)}, the reference's is {tuple(e.shape)}"
        )
        difference = (a.float() - e.float()).abs().max().item()
        allowed = TOLERANCE[e.dtype] * e.abs().max().item()
        assert difference <= allowed, (
            f"result {i}: differs from the reference by {difference:.3g}, allowed {allowed:.3g}"
        )


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        if result.numel():
            yield result
    elif result is not None:
        for part in result:
            yield from _tensors(part)


def by_definition(call: Call) -> Any:
    """The same call with the series convolution served by its definition."""
    with use_backend("reference"):
        return call()


def rates(macs: int, bytes: int, milliseconds: float) -> dict[str, float]:
    """GFLOP/s (two per multiply–accumulate) and GB/s of a call."""
    return {"gflops": 2e-6 * macs / milliseconds, "gbps": 1e-6 * bytes / milliseconds}


def best_product(dtype: torch.dtype) -> dict[str, Any]:
    """The machine's best rate now, as ``gflops``, and ``by`` what: a matrix product or a dense
    convolution.

    All are tried: on processors of AMD ``torch.mm`` is the slowest. One call of each takes 20 ms on
        two cores, so that
    every entry can bring its own figure: the highest of all is what the machine reaches
    undisturbed."""
    with torch.inference_mode():
        rates = {
            name: 2e-9 * macs / time_call(call) for name, (macs, call) in _products(dtype).items()
        }
    by = max(rates, key=rates.__getitem__)
    return {"gflops": rates[by], "by": by}


@cache
def _products(dtype: torch.dtype) -> dict[str, tuple[int, Call]]:
    """By name, the MACs and a call, warm; the tensors fill the device."""
    n, batch = (1024, 16) if DEVICE.type == "cpu" else (8192, 256)
    if dtype == torch.int8:
        return _products_in_8_bits(batch)
    made: Any = {"device": DEVICE, "dtype": dtype}
    matrices = torch.randn(2, n, n, **made)
    calls: dict[str, tuple[int, Call]] = {"torch.mm": (n**3, partial(torch.mm, *matrices))}
    for channels, k in ((256, 1), (128, 3)):
        input, weight = (
            torch.randn(*shape, **made).contiguous(memory_format=torch.channels_last)
            for shape in ((batch, channels, 28, 28), (channels, channels, k, k))
        )
        macs = batch * convolution_macs(channels, channels, (k, k), (28, 28))
        calls[f"{k}×{k} convolution"] = (macs, partial(F.conv2d, input, weight, padding=k // 2))
    for _, call in calls.values():
        _warm(call)
    return calls


def _products_in_8_bits(batch: int) -> dict[str, tuple[int, Call]]:
    """Convolutions of uint8 by int8, by oneDNN's operator."""
    calls: dict[str, tuple[int, Call]] = {}
    for channels, k in ((256, 1), (128, 3)):
        input = torch.randint(0, 256, (batch, channels, 28, 28), dtype=torch.uint8)
        input = input.contiguous(memory_format=torch.channels_last)
        weight = torch.randint(-63, 64, (channels, channels, k, k), dtype=torch.int8)
        scales, zeros = torch.ones(channels), torch.zeros(channels, dtype=torch.int64)
        geometry = ([1, 1], [k // 2, k // 2], [1, 1], 1)
        packed = torch.ops.onednn.qconv_prepack(weight, scales, 1.0, 0, *geometry)
        arguments = (input, 1.0, 0, packed, scales, zeros, None, *geometry)
        call = partial(
            torch.ops.onednn.qconv2d_pointwise, *arguments, 1e4, 0, torch.uint8, "none", [], ""
        )
        macs = batch * convolution_macs(channels, channels, (k, k), (28, 28))
        calls[f"{k}×{k} convolution"] = (macs, call)
    for _, call in calls.values():
        _warm(call)
    return calls


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, and say whether it does; only glibc can be told.

    By default it gives large blocks back to the system at once, and every large output then comes
    in fresh pages: that halves the speed of large layers, of ours and of the library's (64→64 at
    56×56, batch 16, dense: 370 instead of 500 GFLOP/s), and the ratio compares page faults."""
    if DEVICE.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    # M_MMAP_MAX = 0: no block is mapped on its own; M_TRIM_THRESHOLD = -1: the end of the heap is
    # never given back.
    kept = mallopt(-4, 0) == 1 and mallopt(-1, -1) == 1
    if kept:
        # An aligned block seldom fits where its like was freed: five calls pass before no page is
        # fresh.
        torch.ones(HEAP_BYTES, dtype=torch.uint8)
    return kept


@cache
def machine() -> dict[str, Any]:
    """What a time depends on: device, threads, torch."""
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name(DEVICE)
    else:
        import cpuinfo

        brand = cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
        name = f"{brand}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": name,
        "device_type": DEVICE.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
