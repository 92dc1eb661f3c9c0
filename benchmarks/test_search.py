"""Searches: the tree of configurations against the same configurations one by one.

Times of 10 000 random images in the shape of CIFAR-10's. One by one, some of the 252 configurations
stand for all (``--full``: all of them); the paper's GPU took 9 s for the tree."""

from __future__ import annotations

import itertools
import time

import gross
import pytest
import torch
from gross import Accuracy
from gross.architecture_search.space import Space
from gross.supernet import Configuration, decomposed_layers
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from .measure import DEVICE
from .shapes import supernet

pytestmark = pytest.mark.benchmark(group="search")

#: Configurations that are timed one by one, out of 252.
ALONE = 12
#: Images for VGG-16's neighbours.
IMAGES = 512


def test_every_configuration_of_the_4_layer_network(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    """Goal on two cores: at most 12 s, and 5 times as fast as one by one."""
    net = _network("4-layer")
    sizes = [layer.group_sizes for layer in decomposed_layers(net).values()]
    configurations = list(itertools.product(*sizes))
    step = 1 if request.config.getoption("--full", False) else len(configurations) // ALONE
    _compare(benchmark, net, configurations, configurations[step // 2 :: step], 10_000)


def test_neighbours_of_vgg16(benchmark: BenchmarkFixture) -> None:
    """One step of a breadth-first search. Goal: 1.8 times as fast as one by one."""
    net = _network("vgg16-cifar")
    sizes = tuple(layer.group_sizes for layer in decomposed_layers(net).values())
    neighbours = Space(sizes).neighbours((4,) * len(sizes))
    _compare(benchmark, net, neighbours, neighbours, IMAGES)


def _compare(
    benchmark: BenchmarkFixture,
    net: nn.Module,
    configurations: list[Configuration],
    alone: list[Configuration],
    images: int,
) -> None:
    """Time the tree, then some of its configurations one by one, and check that they agree."""
    torch.manual_seed(0)
    pixels = torch.randn(images, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    data = (pixels, torch.randint(10, (images,)))
    gross.evaluate(net, configurations[:1], Accuracy(data, images=512))
    accuracies = benchmark.pedantic(gross.evaluate, (net, configurations, data), rounds=1)
    began = time.perf_counter()
    one_by_one = [gross.evaluate(net, [c], data)[0] for c in alone]
    seconds = (time.perf_counter() - began) / len(alone) * len(configurations)
    found = dict(zip(configurations, accuracies, strict=True))
    assert one_by_one == [found[c] for c in alone]
    assert len(set(one_by_one)) > 1
    tree = benchmark.stats.stats.max
    benchmark.extra_info.update(
        configurations=len(configurations), images=images, one_by_one=seconds, ratio=seconds / tree
    )
    print(
        f"\n{len(configurations)} configurations, {images} images: {tree:.1f} s as a tree, "
        f"{seconds:.1f} s one by one ({len(alone)} timed), {seconds / tree:.2f} times"
    )


def _network(name: str) -> nn.Module:
    """Fresh weights, and no biases: in a deep network they would decide alone, for every image."""
    net = supernet(name).eval().to(DEVICE).to(memory_format=torch.channels_last)
    for parameter_name, parameter in net.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.zeros_(parameter)
    return net
