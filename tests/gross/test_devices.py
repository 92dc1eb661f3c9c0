"""Where things run, without a GPU; what runs on one is in tests/gpu/test_networks.py."""

from collections.abc import Callable
from typing import Any

import gross
import pytest
import torch
from gross.devices import check_device, moved, placed
from torch import nn


def supernet() -> nn.Module:
    """Of logits for images of 3×6×6."""
    convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    made = gross.decompose(convs, (1, 2), method="random", quiet=True)
    return nn.Sequential(made, nn.Flatten(), nn.Linear(32, 2)).eval()


DATA = (torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 0, 1]))
CALLS: dict[str, Callable[..., Any]] = {
    "train": lambda **o: gross.train(supernet(), [DATA], quiet=True, epochs=1, **o),
    "finetune": lambda **o: gross.finetune(supernet(), [DATA], quiet=True, epochs=1, **o),
    "evaluate": lambda **o: gross.evaluate(supernet(), [(1,)], DATA, **o),
    "search": lambda **o: gross.search(supernet(), DATA, method="exhaustive", quiet=True, **o),
    "export": lambda **o: gross.export(supernet(), example=DATA[0], **o),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", CALLS)
def test_a_gpu_that_is_not_there(name: str) -> None:
    """Catches a device that torch's own error speaks of, minutes later, or nobody."""
    with pytest.raises(ValueError, match="device: got 'cuda', and no CUDA device is available"):
        CALLS[name](device="cuda")
    with pytest.raises(ValueError, match="device: got 'gpu', accepted are 'cpu', 'cuda'"):
        CALLS[name](device="gpu")


@pytest.mark.parametrize("name", CALLS)
def test_the_cpu_by_name(name: str) -> None:
    """Catches an argument that is refused where it changes nothing."""
    CALLS[name](device=torch.device("cpu"))


def test_moved() -> None:
    """Catches a model or a tensor that is not where it was asked to be."""
    model = nn.Linear(2, 2)
    assert placed(model, None) is model
    assert placed(model, "meta").weight.is_meta
    assert moved(torch.ones(2), torch.device("meta")).is_meta
    with pytest.raises(TypeError, match="device: got"):
        check_device(object())  # type: ignore[arg-type]


def test_graphs_need_a_gpu() -> None:
    """Catches graphs that are asked for and silently left out."""
    for call in (
        lambda: gross.Graphed(supernet()),
        lambda: gross.export(supernet(), example=DATA[0], graphs=True),
        lambda: gross.evaluate(supernet(), [(1,)], gross.Accuracy(DATA, graphs=True)),
    ):
        with pytest.raises(ValueError, match="graphs: got True for a model on cpu, accepted is"):
            call()
