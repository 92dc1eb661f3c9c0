"""Runs without the other tests' conftest, whose packages a GPU machine may lack."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason="requires a GPU"))


@pytest.fixture(autouse=True)
def strict_float32() -> None:
    """float32 with the error of float32: strict for cuDNN, three passes of TF32 for Triton."""
    torch.manual_seed(0)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("high")
