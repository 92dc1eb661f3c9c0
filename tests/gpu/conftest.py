"""Runs without the other tests' conftest, whose packages a GPU machine may lack.

Failures are printed when they happen. After each the device is asked whether it still answers;
where it does not, the process ends, so that no later test fails for the same fault: pytest-xdist
starts another one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from larger import DRY

HERE = Path(__file__).parent
_config: pytest.Config

if DRY:
    import host_device

    host_device.play()


def pytest_configure(config: pytest.Config) -> None:
    global _config
    _config = config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DRY:
        items[:] = one_of_each(items)
        return
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason="requires a GPU"))


def one_of_each(items: list[pytest.Item]) -> list[pytest.Item]:
    """The first case of every test, for each backend."""
    first: dict[Any, pytest.Item] = {}
    for item in items:
        assert isinstance(item, pytest.Function)
        first.setdefault((item.path, item.originalname, "[triton" in item.name), item)
    return list(first.values())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed and item.path.is_relative_to(HERE) and (DRY or torch.cuda.is_initialized()):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            text = f"\n{item.nodeid} left a device that does not answer: {error}\n"
            os.write(2, (text + report.longreprtext + "\n").encode())
            os._exit(3)
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    printer = _config.pluginmanager.get_plugin("terminalreporter")
    if report.failed and printer is not None:
        printer.write_line(f"\n{report.nodeid}\n{report.longreprtext}")


@pytest.fixture(autouse=True)
def strict_float32() -> None:
    """float32 with the error of float32: strict for cuDNN, three passes of TF32 for Triton."""
    torch.manual_seed(0)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("high")
