"""Accuracy of many configurations of one supernet at once.

The configurations form a tree: one level per decomposed layer, one branch per group size. The
network is cut into segments between the layers, wherever a single tensor flows, and the tree is
walked depth first, batch by batch. What configurations with the same leading group sizes share is
computed once, and one tensor per level is kept. Every segment runs the modules that the network
itself runs, on the same tensors, so that the logits are those of each configuration alone at the
same batch size: on the CPU bit for bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn

from gross_kernels import GroSSConv2d, SeriesConv2d

from .arguments import check_callable, check_module, check_type
from .copying import unwrapped
from .data import Split
from .devices import Replay, check_graphs, layout, moved, placed
from .supernet import (
    Configuration,
    check_configuration,
    configuration,
    decomposed_layers,
    set_configuration,
)

#: Bytes of activations by default. Blocks beyond 32 MiB are mapped afresh by glibc at every
#: allocation, which costs more than the convolutions; a batch of this budget stays below that.
MEMORY = 96 * 2**20
#: Standard errors below ``give_up_below`` at which a configuration is given up.
STANDARD_ERRORS = 4.0

Images = tuple[Tensor, Tensor]
#: Called with what has been done and what there is to do, in images times configurations.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Top-1 accuracy in percent: the metric whose evaluations share a tree.

    Attributes:
        data: images ``[N, …]`` and labels ``[N]``, as a pair of tensors, an iterable of such pairs
            (a loader), or a split of :mod:`gross.data`. Images of four dimensions run in
            channels-last.
        images: evaluate on the first so many alone; by default on all.
        give_up_below: stop evaluating a configuration once its accuracy so far is four standard
            errors below this percentage; its accuracy is then NaN. By default nothing is given up.
        memory: bytes of activations, from which the batch size follows; by default 96 MiB.
        batch_size: images a batch, in place of ``memory``. A loader's batches are split, not
            joined.
        graphs: on a GPU, replay the walk over a batch as one CUDA graph, captured at the second
            batch: for networks whose kernels are shorter than their launches.
    """

    data: Images | Iterable[Images] | Split
    images: int | None = None
    give_up_below: float | None = None
    memory: int = MEMORY
    batch_size: int | None = None
    graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("images", "memory", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, accepted are ints of at least 1")
        data: Any = self.data
        if _is_pair(data):
            images, labels = data
            if len(images) != len(labels):
                raise ValueError(
                    f"data: got {len(images)} images and {len(labels)} labels, accepted is one "
                    "label per image"
                )
        elif isinstance(data, Tensor) or not (
            isinstance(data, Iterable) or hasattr(data, "batches")
        ):
            raise TypeError(
                f"data: got {type(self.data).__name__}, accepted is a pair of tensors, images and "
                "labels, or a loader of such pairs"
            )

    def __call__(self, model: nn.Module) -> float:
        """Accuracy of ``model`` in the configuration that it is in."""
        return evaluate(model, [configuration(model)], self)[0]

    def batches(self, size: int) -> Iterator[Images]:
        """The images and labels in batches of at most ``size``."""
        remaining = math.inf if self.images is None else self.images
        for images, labels in self._pairs(size):
            for start in range(0, len(images), size):
                count = int(min(size, len(images) - start, remaining))
                if count == 0:
                    return
                remaining -= count
                yield images[start : start + count], labels[start : start + count]

    def _pairs(self, size: int) -> Iterable[Images]:
        data: Any = self.data
        if _is_pair(data):
            return [data]
        return data.batches(size) if hasattr(data, "batches") else data


def evaluate(
    supernet: nn.Module,
    configurations: Iterable[Sequence[int]],
    data: Images | Iterable[Images] | Split | Accuracy,
    *,
    progress: Progress | None = None,
    device: str | int | torch.device | None = None,
) -> list[float]:
    """Top-1 accuracy in percent of each configuration: what running it alone gives, at a fraction
    of the time.

    Any model that ``torch.fx`` can trace is walked as a tree; others are run configuration by
    configuration, with a warning that says why. The model is evaluated in evaluation mode, where
    its parameters are; its mode and configuration are as before afterwards.

    Args:
        supernet: a network with decomposed layers, from one tensor to logits ``[N, classes]``.
        configurations: each one group size per decomposed layer, in network order.
        data: images and labels as a pair of tensors or a loader, or an :class:`Accuracy` with
            options.
        progress: called after every configuration and batch.
        device: where to evaluate, such as "cuda"; the supernet is moved there and stays. By default
            where it is.

    Returns:
        One accuracy per configuration, in their order.

    Raises:
        ValueError: before the walk, if a configuration is not the supernet's, there is no image,
            the supernet does not take the images, a label is not one of its classes, or the
            device is not there.
    """
    accuracy = data if isinstance(data, Accuracy) else Accuracy(data)
    check_type("configurations", configurations, Iterable, "a sequence of configurations")
    if progress is not None:
        check_callable("progress", progress, "a function of two ints")
    supernet = placed(unwrapped(check_module("supernet", supernet)), device)
    check_graphs(accuracy.graphs, next(supernet.parameters()).device)
    layers = list(decomposed_layers(supernet).values())
    sizes = [layer.group_sizes for layer in layers]
    active = configuration(supernet)
    wanted = [check_configuration(c, sizes, active) for c in configurations]
    if not wanted:
        return []
    with inference(supernet):
        first = next(accuracy.batches(1), None)
        if first is None:
            raise ValueError("data: got no image, accepted is at least one")
        classes = _check_fits(supernet, first[0])
        segments = cut(supernet, first[0])
        size = accuracy.batch_size or _batch_size(segments, supernet, first[0], accuracy.memory)
        walk = _Walk(segments, layers, sorted(set(wanted)), accuracy.give_up_below, accuracy.graphs)
        total = accuracy.images or _length(accuracy.data)
        for images, labels in accuracy.batches(size):
            least, most = torch.stack(labels.aminmax()).tolist()
            if least < 0 or most >= classes:
                raise ValueError(
                    f"data: got labels {least} to {most}, accepted are 0 to {classes - 1}: the "
                    f"supernet has {classes} outputs"
                )
            walk.batch(_like(supernet, images), labels, total, progress)
        found = walk.accuracies()
    return [found[c] for c in wanted]


# Where the network is cut -------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """A part of the network that one tensor enters and one leaves.

    Attributes:
        run: from the entering to the leaving tensor.
        layers: positions of the decomposed layers that it calls, in network order.
        keeps_input: whether it leaves the entering tensor as it is.
    """

    run: nn.Module
    layers: tuple[int, ...]
    keeps_input: bool = True


def cut(supernet: nn.Module, example: Tensor) -> list[Segment]:
    """The network as a chain of segments, with as few decomposed layers in each as can be.

    A segment begins at a decomposed layer and ends before the next one, at the last place where a
    single tensor flows. The chain is run once on ``example`` against the network itself.

    Returns:
        The segments. If the network cannot be traced, has no place to cut, or the chain computes
        something else, it is one segment, and a warning says why."""
    whole = Segment(supernet, tuple(range(len(decomposed_layers(supernet)))), keeps_input=False)
    try:
        segments = _cut(supernet)
        example = _like(supernet, example)
        segments, output = _run_once(segments, example)
    except Exception as error:
        # Tracing runs the model's own Python code on symbols, and anything may go wrong there.
        return _say([whole], f"torch.fx cannot trace the model: {error}")
    if not torch.allclose(output, supernet(example), rtol=0, atol=0, equal_nan=True):
        return _say([whole], "the traced model computes something else")
    if len(whole.layers) > 1 and any(len(s.layers) == len(whole.layers) for s in segments):
        return _say(segments, "no single tensor flows between the decomposed layers")
    return segments


def _say(segments: list[Segment], reason: str) -> list[Segment]:
    warnings.warn(
        f"every configuration runs on its own, which takes longer: {reason}", stacklevel=4
    )
    return segments


class _Tracer(fx.Tracer):
    """Decomposed layers stay whole, as torch's own modules do."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, GroSSConv2d | SeriesConv2d) or super().is_leaf_module(
            m, module_qualified_name
        )


def _cut(supernet: nn.Module) -> list[Segment]:
    graph = _Tracer().trace(supernet)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in graph.nodes if node.op == "output")
    if any(node.users for node in inputs[1:]) or not isinstance(output.args[0], fx.Node):
        raise ValueError("accepted are models from one tensor to one tensor")
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    positions = {layer: i for i, layer in enumerate(decomposed_layers(supernet).values())}
    layers_of = [
        tuple(
            positions[m]
            for m in (supernet.get_submodule(str(n.target)).modules())
            if isinstance(m, GroSSConv2d)
        )
        if n.op == "call_module"
        else ()
        for n in nodes
    ]
    single = _single_tensors(inputs[0], nodes)
    ends: list[int] = []
    latest: int | None = -1
    for i, layers in enumerate(layers_of):
        if layers and latest is not None:
            ends.append(latest)
            latest = None
        if i in single:
            latest = i
    segments: list[Segment] = []
    start, entering = 0, inputs[0]
    for end in [*(e for e in ends if e >= 0), len(nodes) - 1]:
        leaving = single.get(end, output.args[0])
        segment = Segment(
            _part(supernet, nodes[start : end + 1], entering, leaving),
            tuple(dict.fromkeys(i for layers in layers_of[start : end + 1] for i in layers)),
        )
        segments.append(segment)
        start, entering = end + 1, leaving
    return segments


def _single_tensors(entry: fx.Node, nodes: list[fx.Node]) -> dict[int, fx.Node]:
    """The value that is needed after each node, where it is one alone."""
    position = {node: i for i, node in enumerate([entry, *nodes], -1)}
    last_use = {
        node: max((position.get(user, len(nodes)) for user in node.users), default=-1)
        for node in position
    }
    single: dict[int, fx.Node] = {}
    live: set[fx.Node] = {entry}
    for i, node in enumerate(nodes):
        live = {n for n in live | {node} if last_use[n] > i}
        if len(live) == 1:
            (single[i],) = live
    return single


def _part(
    supernet: nn.Module, nodes: Sequence[fx.Node], entering: fx.Node, leaving: Any
) -> nn.Module:
    """Some of the graph's nodes as a module of their own."""
    graph = fx.Graph()
    copies = {entering: graph.placeholder("input")}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:
            # An attribute of the model, read where it is used.
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in nodes:
        copies[node] = graph.node_copy(node, copy_of)
    graph.output(copy_of(leaving))
    return fx.GraphModule(supernet, graph)


def _run_once(segments: list[Segment], example: Tensor) -> tuple[list[Segment], Tensor]:
    """Run the chain, and find the segments that write into the tensor that enters them."""
    checked = []
    # In inference mode tensors do not count how often they were written.
    with torch.inference_mode(False), torch.no_grad():
        example = example.clone()
        for segment in segments:
            version = example._version
            output = segment.run(example)
            checked.append(replace(segment, keeps_input=example._version == version))
            example = output
    return checked, example


# The walk -----------------------------------------------------------------------------------------


class _Walk:
    """Right answers of every configuration, added up over batches."""

    def __init__(
        self,
        segments: Sequence[Segment],
        layers: Sequence[GroSSConv2d],
        configurations: Sequence[Configuration],
        give_up_below: float | None,
        graphs: bool,
    ) -> None:
        self.segments = segments
        self.layers = layers
        self.remaining = list(configurations)
        self.give_up_below = give_up_below
        # Counted on the device: asking it after every configuration would make the host wait.
        self.places = {c: place for place, c in enumerate(configurations)}
        device = next(layers[0].parameters()).device
        self.right = torch.zeros(len(configurations), dtype=torch.int64, device=device)
        self.seen = 0
        self.graphs = graphs
        # The kind of the last batch, and the graph of its walk once there were two of it.
        self.kind: Any = None
        self.replay: Replay | None = None

    def batch(
        self, images: Tensor, labels: Tensor, total: int | None, progress: Progress | None
    ) -> None:
        """Add one batch. ``total`` is the number of images where it is known."""
        labels = moved(labels, images.device)
        finished = self.seen * len(self.places)

        def walk(images: Tensor, labels: Tensor, progress: Progress | None) -> None:
            done = finished

            def count(configuration: Configuration, logits: Tensor) -> None:
                nonlocal done
                self.right[self.places[configuration]] += (logits.argmax(1) == labels).sum()
                done += len(images)
                if progress is not None and total is not None:
                    progress(done, total * len(self.places))

            self._descend(0, images, self.remaining, count)

        kind = (*layout(images), *layout(labels), len(self.remaining))
        if not self.graphs or kind != self.kind:
            self.kind, self.replay = kind, None
            walk(images, labels, progress)
        else:
            if self.replay is None:
                self.replay = Replay(partial(walk, progress=None), (images, labels))
            self.replay(images, labels)
            if progress is not None and total is not None:
                done = finished + len(images) * len(self.remaining)
                progress(done, total * len(self.places))
        self.seen += len(images)
        if self.give_up_below is not None:
            self._give_up(self.give_up_below / 100)

    def _descend(
        self,
        level: int,
        input: Tensor,
        configurations: Sequence[Configuration],
        count: Callable[[Configuration, Tensor], None],
    ) -> None:
        """Run the segments from ``level`` on; ``configurations``, sorted, agree in what came
        before."""
        segment = self.segments[level]
        for sizes, group in groupby(configurations, lambda c: tuple(c[i] for i in segment.layers)):
            for i, size in zip(segment.layers, sizes, strict=True):
                self.layers[i].group_size = size
            output = segment.run(input if segment.keeps_input else input.clone())
            if level + 1 == len(self.segments):
                for configuration in group:
                    count(configuration, output)
            else:
                self._descend(level + 1, output, list(group), count)

    def _give_up(self, threshold: float) -> None:
        error = math.sqrt(threshold * (1 - threshold) / self.seen)
        least = (threshold - STANDARD_ERRORS * error) * self.seen
        right = self.right.tolist()
        self.remaining = [c for c in self.remaining if right[self.places[c]] >= least]

    def accuracies(self) -> dict[Configuration, float]:
        """In percent; NaN where a configuration was given up."""
        kept = set(self.remaining)
        right = self.right.tolist()
        return {
            c: 100 * right[place] / self.seen if c in kept else math.nan
            for c, place in self.places.items()
        }


# What the network takes ---------------------------------------------------------------------------


@contextmanager
def inference(supernet: nn.Module, wanted: Sequence[int] | None = None) -> Iterator[None]:
    """Evaluation mode without gradients, in a configuration if one is wanted; mode and
    configuration come back afterwards."""
    modes = {module: module.training for module in supernet.modules()}
    before = configuration(supernet)
    try:
        supernet.eval()
        if wanted is not None:
            set_configuration(supernet, wanted)
        with torch.inference_mode():
            yield
    finally:
        set_configuration(supernet, before)
        for module, training in modes.items():
            # Not module.train(mode), which sets the modules inside as well.
            module.training = training


def _check_fits(supernet: nn.Module, image: Tensor) -> int:
    """Run one image; the number of classes."""
    try:
        logits = supernet(_like(supernet, image))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"data: got images of shape {tuple(image.shape[1:])} and {image.dtype}, which the "
            f"supernet does not take: {error}"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"supernet: got the output {got}, accepted are logits [N, classes]; search other "
            "networks with a metric of your own"
        )
    return logits.shape[1]


def _like(supernet: nn.Module, images: Tensor) -> Tensor:
    """The images on the supernet's device, in channels-last."""
    parameter = next(supernet.parameters())
    images = moved(images, parameter.device)
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def _batch_size(
    segments: Sequence[Segment], supernet: nn.Module, image: Tensor, memory: int
) -> int:
    """How many images fit: a tensor per level, and the three largest that live inside a
    segment."""
    input = _like(supernet, image)
    levels, inside = input.nbytes, 0

    def note(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal inside
        if isinstance(output, Tensor):
            inside = max(inside, output.nbytes)

    handles = [
        module.register_forward_hook(note)
        for module in supernet.modules()
        if not any(module.children()) or isinstance(module, GroSSConv2d)
    ]
    try:
        for segment in segments:
            input = segment.run(input.clone())
            levels += input.nbytes
    finally:
        for handle in handles:
            handle.remove()
    return max(1, memory // (levels + 3 * inside))


def _is_pair(data: object) -> bool:
    return (
        isinstance(data, Sequence) and len(data) == 2 and all(isinstance(x, Tensor) for x in data)
    )


def _length(data: Any) -> int | None:
    """Images in the data, None where a loader does not say."""
    if _is_pair(data):
        return len(data[0])
    try:
        return len(data if hasattr(data, "batches") else data.dataset)
    except (TypeError, AttributeError):
        return None
