"""The benchmarks' arithmetic: a wrong ratio, or a wrong kernel that passes the check, would go
unnoticed in a table."""

import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure


class Recorder:
    """Stands in for pytest-benchmark's fixture: runs the rounds, and reads the clock as it does."""

    def __init__(self) -> None:
        self.recorded: list[float] = []

    def pedantic(self, target, rounds):  # type: ignore[no-untyped-def]
        for _ in range(rounds):
            begin = measure.stopwatch()
            target()
            self.recorded.append(measure.stopwatch() - begin)


@pytest.fixture
def durations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes as many seconds as it returns in ``.item()``: timing without waiting."""
    monkeypatch.setattr(measure, "time_call", lambda call: call().item())


def call_taking(*seconds: float, log: list[str] | None = None, name: str = ""):  # type: ignore[no-untyped-def]
    """A call that takes these seconds in turn, then the last ones for ever."""
    remaining = list(seconds)

    def call() -> torch.Tensor:
        if log is not None:
            log.append(name)
        return torch.tensor(remaining.pop(0) if len(remaining) > 1 else remaining[0])

    return call


BUDGET = measure.Budget(seconds=1.0, least=3, most=5)


def test_ratio_pairs_neighbours() -> None:
    """Catches a ratio of medians: pair by pair the baseline takes 2, 3 and 4 times as long, its
    median 30 times."""
    assert measure.ratio([1.0, 10.0, 100.0], [2.0, 30.0, 400.0]) == {
        "median": 3.0,
        "q1": 2.5,
        "q3": 3.5,
    }


def test_ratio_of_one_pair() -> None:
    """Catches quantiles that need two values: with --benchmark-disable there is one round."""
    assert measure.ratio([2.0], [3.0]) == {"median": 1.5, "q1": 1.5, "q3": 1.5}


def test_ratio_above_one_means_ours_is_faster() -> None:
    """Catches a ratio upside down."""
    assert measure.ratio([1.0, 1.0], [2.0, 2.0])["median"] == 2.0


@pytest.mark.parametrize(("seconds", "rounds"), [(0.25, 4), (10.0, 3), (1e-6, 5)])
def test_budget(seconds: float, rounds: int) -> None:
    """Catches a slow entry without enough pairs and a fast one without end."""
    assert BUDGET.rounds(seconds) == rounds


@pytest.mark.usefixtures("durations")
def test_calls_alternate() -> None:
    """Catches blocks of one call after the other (A A B B), which drift of the machine would
    bias."""
    log: list[str] = []
    ours, library, user = (
        call_taking(0.1, log=log, name=name) for name in ("ours", "library", "user")
    )
    expected = call_taking(0.1)
    measure.compare(
        Recorder(), ours, expected, {"library": {"": library}, "materialised": {"": user}}, BUDGET
    )
    assert log[-9:] == ["ours", "library", "user"] * 3


@pytest.mark.usefixtures("durations")
def test_fastest_variant_counts_and_hopeless_ones_are_not_timed() -> None:
    """Catches a baseline that is represented by its slower memory format, and minutes spent on a
    hopeless one."""
    log: list[str] = []
    slow, hopeless = (
        call_taking(3.0, log=log, name="slow"),
        call_taking(9.0, log=log, name="hopeless"),
    )
    baselines = {"library": {"slow": slow, "fast": call_taking(2.0), "hopeless": hopeless}}
    result = measure.compare(Recorder(), call_taking(1.0), call_taking(1.0), baselines, BUDGET)
    assert result["fastest"] == {"library": "fast"}
    assert result["ratios"]["library"]["median"] == 2.0
    assert result["milliseconds"] == {"ours": 1000.0, "library": 2000.0}
    assert result["variants"] == {"library": {"slow": 3000.0, "fast": 2000.0, "hopeless": 9000.0}}
    assert (log.count("hopeless"), log.count("slow")) == (3, 6)


@pytest.mark.usefixtures("durations")
def test_one_disturbed_call_does_not_make_a_variant_hopeless() -> None:
    """Catches the faster memory format dropped because something else ran during its warm-up."""
    baselines = {"library": {"fast": call_taking(50.0, 50.0, 1.0), "slow": call_taking(2.0)}}
    result = measure.compare(Recorder(), call_taking(1.0), call_taking(1.0), baselines, BUDGET)
    assert result["fastest"] == {"library": "fast"}


@pytest.mark.usefixtures("durations")
def test_warm_up_is_not_counted() -> None:
    """Catches a first call (algorithm choice, compilation) in the medians, and rounds planned from
    it."""
    recorder = Recorder()
    ours, library = call_taking(0.125, 100.0, 0.125), call_taking(50.0, 0.125)
    result = measure.compare(recorder, ours, call_taking(0.125), {"library": {"": library}}, BUDGET)
    assert result["milliseconds"] == {"ours": 125.0, "library": 125.0}
    assert len(recorder.recorded) == 4


@pytest.mark.usefixtures("durations")
def test_pytest_benchmark_records_ours_alone() -> None:
    """Catches baselines in the times that pytest-benchmark stores."""
    recorder = Recorder()
    measure.compare(
        recorder, call_taking(0.25), call_taking(0.25), {"library": {"": call_taking(0.5)}}, BUDGET
    )
    assert recorder.recorded == [0.25] * 3


def test_nothing_is_timed_before_the_results_agree() -> None:
    """Catches a fast wrong kernel in the tables."""
    never = partial(pytest.fail, "a call was timed")
    with pytest.raises(AssertionError, match="differs from the reference by 1"):
        measure.compare(
            Recorder(),
            lambda: torch.tensor([1.0, 2.0]),
            lambda: torch.tensor([1.0, 1.0]),
            {"library": {"": never}},
            BUDGET,
        )


def test_one_wrong_element_is_noticed() -> None:
    """Catches a check by norms, in which one wrong border pixel of many drowns."""
    expected = torch.randn(1000, 1000)
    actual = expected.clone()
    actual[-1, -1] += 1e-2
    measure.check_close(expected.clone(), expected)
    with pytest.raises(AssertionError, match="differs"):
        measure.check_close(actual, expected)


def test_results_are_compared_one_by_one() -> None:
    """Catches a gradient that is missing, of another shape, or not a number; what was not asked for
    does not count."""
    ones, nothing = torch.ones(2), torch.empty(0)
    measure.check_close((nothing, [ones, ones], nothing), ([ones, ones], None))
    with pytest.raises(ValueError, match="longer"):
        measure.check_close([ones], [ones, ones])
    with pytest.raises(AssertionError, match="shape"):
        measure.check_close(torch.ones(2, 1), ones)
    with pytest.raises(AssertionError, match="differs"):
        measure.check_close(torch.tensor([1.0, torch.nan]), ones)
    with pytest.raises(AssertionError, match="nothing to compare"):
        measure.check_close(nothing, nothing)


def test_rates() -> None:
    """Catches a factor of two between MACs and FLOP, and of a thousand in the units."""
    assert measure.rates(macs=10**9, bytes=3 * 10**9, milliseconds=1000.0) == {
        "gflops": 2.0,
        "gbps": 3.0,
    }


def test_time_call_includes_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a clock read on one side of the call."""
    monkeypatch.setattr(measure, "DEVICE", torch.device("cpu"))
    assert 0.02 <= measure.time_call(lambda: time.sleep(0.02)) < 0.5


@pytest.mark.usefixtures("durations")
def test_best_product_counts_two_flop_for_each_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the slowest in place of the fastest, MACs for FLOP, and a thousand in the unit."""
    calls = {
        "slow": (10**9, call_taking(1.0)),
        "fast": (10**9, call_taking(0.5)),
        "small": (10**8, call_taking(0.25)),
    }
    monkeypatch.setattr(measure, "_products", lambda dtype: calls)
    assert measure.best_product(torch.float32) == {"gflops": 4.0, "by": "fast"}


def test_products_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches MACs of another product than the one that is timed: each is counted by torch's own
    counter."""
    monkeypatch.setattr(measure, "_warm", lambda call: 0.0)
    for macs, call in measure._products.__wrapped__(torch.float32).values():
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == 2 * macs


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="asks glibc, which other systems lack"
)
def test_freed_memory_is_kept() -> None:
    """Catches a setting that glibc ignores: 64 MB in fresh pages are 16384 faults, and next to none
    may remain."""
    script = """
import resource

import torch

from benchmarks import measure

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), measure.keep_freed_memory(), faults())
"""
    before, kept, after = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert kept == "True"
    assert int(after) < 0.01 * int(before)
