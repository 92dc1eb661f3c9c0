"""The paper's networks in the configurations of its tables: time beside MACs, against the dense and
the folded network.

Two operations: inference, with the supernet packed (``gross_kernels.pack``), and one training step
(forward, backward, SGD with momentum). Everything is channels-last. The plain networks run eagerly:
at these batches packing their weights is little beside the convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gross.macs import macs
from gross.networks import NETWORKS as PAPER
from gross.networks import PUBLISHED, build
from gross.supernet import decomposed_layers, set_configuration
from torch import Tensor, nn

from gross_kernels import pack

from .measure import DEVICE, PRECISIONS, Call, by_definition, stopwatch
from .shapes import NETWORKS, supernet

pytestmark = pytest.mark.benchmark(group="networks", timer=stopwatch, disable_gc=True)

CPU_BATCH = 16


def cases() -> Iterator[Any]:
    for name in NETWORKS:
        for configuration in [
            row.configuration for row in PUBLISHED if row.network == name and row.configuration
        ]:
            for operation in ("inference", "training"):
                setting = " ".join(map(str, configuration))
                marks = () if _is_quick(name, configuration, operation) else pytest.mark.full
                yield pytest.param(name, setting, operation, marks=marks)


def _is_quick(name: str, configuration: tuple[int, ...], operation: str) -> bool:
    """All layers at 4; at 32×32 also the other uniform configurations in inference. A call of
    VGG-16 at 224×224 takes seconds on two cores."""
    uniform = set(configuration)
    if uniform == {4}:
        return name != "vgg16"
    return len(uniform) == 1 and operation == "inference" and PAPER[name].input_size[1] == 32


@pytest.mark.parametrize(("name", "setting", "operation"), list(cases()))
def test_network(compare: Callable[..., None], name: str, setting: str, operation: str) -> None:
    training = operation == "training"
    dtype, memory_format = PRECISIONS[0]
    dense, network = _networks(name)
    set_configuration(network, tuple(map(int, setting.split())))
    folded = fold(network)
    size = PAPER[name].input_size
    batch = CPU_BATCH if DEVICE.type == "cpu" else {32: 256, 224: 128}[size[1]]
    images = torch.randn(batch, *size, device=DEVICE, dtype=getattr(torch, dtype))
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(PAPER[name].num_classes, (batch,), device=DEVICE)
    calls: list[Call] = []
    for model in (network, dense, folded):
        model.train(training)
        calls.append(TrainingStep(model, images, labels) if training else partial(model, images))
    if not training:
        pack(network)
    # In training each of two gradients costs what the forward costs; parameters and momentum are
    # read and written.
    passes = 3 if training else 1
    weights = sum(parameter.nbytes for parameter in folded.parameters())
    with torch.inference_mode(not training):
        compare(
            calls[0],
            partial(by_definition, calls[0]),
            {"dense": {"eager": calls[1]}, "fold": {"eager": calls[2]}},
            suite="networks",
            subject=name,
            setting=setting,
            operation=operation,
            batch=batch,
            dtype=dtype,
            memory_format=memory_format,
            macs=passes * batch * macs(network, size).total,
            dense_macs=passes * batch * macs(dense, size).total,
            bytes=images.nbytes + (4 if training else 1) * weights,
        )


class TrainingStep:
    """One step of SGD on one batch. Learning rate 0 and always the same dropout: every step does
    the same work."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model = model
        self.images = images
        self.labels = labels
        self.layers = list(decomposed_layers(model).values())
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def __call__(self) -> Tensor:
        """The logits. Gradients are checked layer by layer elsewhere: here a ReLU or a maximum that
        decides otherwise moves those of the first layer by up to 0.003 of the largest in float32
        and 0.4 in bfloat16."""
        torch.manual_seed(0)
        self.optimizer.zero_grad()
        logits = self.model(self.images)
        F.cross_entropy(logits, self.labels).backward()
        for layer in self.layers:
            layer.release_inactive()
        self.optimizer.step()
        return logits.detach()


def fold(network: nn.Module) -> nn.Module:
    """The supernet at its configuration as a plain network: every decomposed layer as three
    convolutions."""
    plain = copy.deepcopy(network)
    for name, layer in decomposed_layers(plain).items():
        plain.set_submodule(name, layer.fold().to(memory_format=torch.channels_last))
    return plain


@lru_cache(maxsize=1)
def _networks(name: str) -> tuple[nn.Module, nn.Module]:
    """The dense network and the supernet made from it."""
    dense = build(NETWORKS[name])
    network = supernet(name, dense)
    for model in (dense, network):
        model.to(DEVICE, getattr(torch, PRECISIONS[0][0])).to(memory_format=torch.channels_last)
    return dense, network
