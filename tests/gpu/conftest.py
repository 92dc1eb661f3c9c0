"""Runs without the other tests' conftest, whose packages a GPU machine may lack: finds what the
tests share."""

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / folder) for folder in ("definition", "gross_kernels/triton", "gpu")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(TESTS / "gpu"):
            item.add_marker(pytest.mark.skip(reason="requires a GPU"))


@pytest.fixture(autouse=True)
def strict_float32() -> None:
    """float32 with the error of float32: strict for cuDNN, three passes of TF32 for Triton."""
    torch.manual_seed(0)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("high")
