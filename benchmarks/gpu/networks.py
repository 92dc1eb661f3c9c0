"""Whole layers and networks on a GPU, each way that they can run, as they are and through CUDA
graphs; and all configurations of the paper's small network on 10 000 images."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gross.evaluation import Accuracy, evaluate
from gross.supernet import decomposed_layers, dense_network, set_configuration
from torch import Tensor, nn

from gross_kernels import GroSSConv2d, dispatch

from ..measure import check_close, median, time_call
from ..shapes import supernet
from .results import Entry, Results

BATCH = 128
GROUP_SIZES = (1, 4, 16, 32)
#: Layers by name: in and out channels, size, stride.
LAYERS = {
    "64@56": (64, 64, 56, 1),
    "128@28": (128, 128, 28, 1),
    "256@14": (256, 256, 14, 1),
    "512@7": (512, 512, 7, 1),
    "64-128@56/2": (64, 128, 56, 2),
}
NETWORKS = ("vgg16", "resnet18")
#: Images of the evaluation, and configurations: as the paper has them.
IMAGES, CONFIGURATIONS = 10_000, 252


#: What a layer may be forced to; "merged" is the dense convolution that its product is.
WAYS: tuple[str, ...] = getattr(dispatch, "WAYS", ("parts",))


@dataclass(frozen=True)
class Way:
    """One way to run a network: its name ("dense", "as chosen", or one of :data:`WAYS`, then
    forced), the group size of every layer (None: dense), and how it is made from the supernet."""

    name: str
    group_size: int | None
    make: Callable[[nn.Module], nn.Module]

    def forced(self) -> AbstractContextManager[None]:
        """Within, layers run this way."""
        if self.name not in WAYS:
            return nullcontext()
        use_layer = getattr(dispatch, "use_layer", None)
        return dispatch.use_fused(False) if use_layer is None else use_layer(self.name)


def ways() -> Iterator[Way]:
    """Dense, and the supernet at each group size in every way."""
    yield Way("dense", None, dense_network)
    for size in (4, 16):
        for name in ("as chosen", *WAYS):
            yield Way(name, size, partial(at, size=size))


def at(net: nn.Module, size: int) -> nn.Module:
    """The supernet with every layer at a group size, or the nearest smaller one that it has."""
    layers = decomposed_layers(net).values()
    set_configuration(net, [max(s for s in x.group_sizes if s <= size) for x in layers])
    return net


def networks(results: Results, device: str, rounds: int, deadline: float) -> None:
    """The parts "networks" and "search", until the deadline."""
    dry = device == "cpu"
    for name, make, shape in subjects(dry):
        if time.monotonic() > deadline:
            print(f"out of time: everything from {name} is left out")
            return
        # Made once: the ways share the weights.
        made: list[nn.Module] = []

        def net(make: Callable[[], nn.Module] = make, made: list[nn.Module] = made) -> nn.Module:
            if not made:
                made.append(
                    make().eval().to(device, torch.bfloat16).to(memory_format=torch.channels_last)
                )
            return made[0]

        for way in ways():
            label = {"what": name, "batch": shape[0], "way": way.name, "group size": way.group_size}
            work = partial(measured, net, way, shape, device, rounds)
            results.add("networks", label, work)
    for graphs in (False, True):
        if time.monotonic() < deadline:
            count, images = (2, 3) if dry else (CONFIGURATIONS, IMAGES)
            label = {"configurations": count, "images": images, "graphs": graphs}
            results.add("search", label, partial(evaluated, count, images, graphs, device))


def subjects(dry: bool) -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Name, how it is made, and the shape of its input."""
    if dry:
        yield "8@5", partial(layer, 8, 8, 1), (2, 8, 5, 5)
        return
    for name, (inputs, outputs, size, stride) in LAYERS.items():
        yield name, partial(layer, inputs, outputs, stride), (BATCH, inputs, size, size)
    for name in NETWORKS:
        yield name, partial(supernet, name), (BATCH, 3, 224, 224)


def layer(inputs: int, outputs: int, stride: int) -> nn.Module:
    """A network of one decomposed layer."""
    sizes = [s for s in GROUP_SIZES if s <= inputs]
    return nn.Sequential(GroSSConv2d(inputs, outputs, 3, stride, padding=1, group_sizes=sizes))


def measured(
    net: Callable[[], nn.Module], way: Way, shape: tuple[int, ...], device: str, rounds: int
) -> Entry:
    """Milliseconds of a forward pass, launched call by call and as a graph."""
    images = torch.randn(*shape, device=device, dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    network = way.make(net())
    with torch.inference_mode(), way.forced():
        run = partial(network, images)
        expected = run()
        replay, output = captured(run)
        replay()
        found = {
            "milliseconds": 1e3 * median([time_call(run) for _ in range(rounds)]),
            "graph milliseconds": 1e3 * median([time_call(replay) for _ in range(rounds)]),
        }
        check_close(output, expected)
    return found


def captured(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A call as a graph: what replays it, and its output."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


def evaluated(count: int, images: int, graphs: bool, device: str) -> Entry:
    """Seconds of the evaluation of so many configurations, without what the first call compiles."""
    torch.manual_seed(0)
    net = supernet("4-layer").eval().to(device, torch.bfloat16)
    net.to(memory_format=torch.channels_last)
    sizes = [x.group_sizes for x in decomposed_layers(net).values()]
    every = list(itertools.islice(itertools.product(*sizes), count))
    data: Any = (
        torch.randn(images, 3, 32, 32, dtype=torch.bfloat16),
        torch.randint(10, (images,)),
    )
    accuracy = Accuracy(data, graphs=graphs, batch_size=max(1, min(images // 3, 1000)))
    evaluate(net, every[:1], accuracy)
    begin = time.perf_counter()
    found = evaluate(net, every, accuracy)
    assert len(found) == count, f"got {len(found)} accuracies of {count}"
    return {"seconds": time.perf_counter() - begin}
