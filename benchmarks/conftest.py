"""Options, the interleaved comparison as a fixture, and the summary at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import measure, report

ENTRIES = pytest.StashKey[list[dict[str, Any]]]()
#: Those of test_deployment.py, whose times are of other processes.
DEPLOYED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gross benchmarks")
    group.addoption(
        "--full", action="store_true", help="measure every shape, size and precision, for longer"
    )
    group.addoption(
        "--threads", type=int, help=f"CPU threads (default: torch's, {torch.get_num_threads()})"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: measured with --full alone")
    config.stash[ENTRIES] = []
    config.stash[DEPLOYED] = []
    # Options have defaults here: pytest takes none from a conftest that it meets while collecting
    # (`pytest .`).
    torch.set_num_threads(config.getoption("--threads", None) or torch.get_num_threads())
    torch.backends.cudnn.benchmark = True
    # Hundreds of rows; the summary has what they say, and --benchmark-verbose brings them back.
    config.option.benchmark_quiet = not config.option.benchmark_verbose


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full", False):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if not item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def keeps_memory() -> bool:
    return measure.keep_freed_memory()


@pytest.fixture
def compare(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, keeps_memory: bool
) -> Callable[..., None]:
    """:func:`measure.compare`, with its results and the ``facts`` that describe the entry put into
    ``extra_info``.

    Facts that the report needs: ``suite``, ``subject`` (shape or network), ``setting`` (group size
    or configuration), ``operation``, ``batch``, ``dtype``, ``memory_format``, ``macs``, ``bytes``
    (that must move), ``dense_macs`` where a baseline is "dense", and of a layer ``narrow``: whether
    its bottleneck is narrower than the convolution."""
    budget = measure.FULL if request.config.getoption("--full", False) else measure.QUICK

    def run(
        ours: measure.Call,
        reference: measure.Call,
        baselines: dict[str, dict[str, measure.Call]],
        **facts: Any,
    ) -> None:
        result = measure.compare(benchmark, ours, reference, baselines, budget)
        rates = measure.rates(facts["macs"], facts["bytes"], result["milliseconds"]["ours"])
        machine = measure.machine() | {
            "keeps_memory": keeps_memory,
            "best_product": measure.best_product(getattr(torch, facts["dtype"])),
        }
        benchmark.extra_info.update(facts | result | rates | machine)
        request.config.stash[ENTRIES].append(benchmark.extra_info)

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if entries := config.stash[ENTRIES]:
        terminalreporter.section("summary")
        terminalreporter.write_line(report.summary(entries))
    if deployed := config.stash[DEPLOYED]:
        terminalreporter.section("deployment")
        terminalreporter.write_line(report.deployment(deployed))
