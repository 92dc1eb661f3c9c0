"""Gradient checkpointing: what is computed again is computed at the size of the forward pass."""

import copy
import pickle
import threading
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from gross_kernels import GroSSConv2d, SeriesConv2d, use_fused
from gross_kernels.layers import REMEMBERED

SIZES = (1, 2, 4, 8)


class Block(nn.Module):
    """Both layers, each with what stands around it in a network."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = GroSSConv2d(8, 8, 3, padding=1, group_sizes=SIZES, relu=True)
        self.series = SeriesConv2d(8, 8, 3, padding=1, group_sizes=SIZES)

    def forward(self, input: Tensor) -> Tensor:
        return self.series(self.whole(input)).tanh()


@pytest.fixture
def network() -> nn.Sequential:
    return nn.Sequential(Block(), Block())


def configure(network: nn.Module, size: int) -> None:
    for module in network.modules():
        if isinstance(module, (GroSSConv2d, SeriesConv2d)):
            module.group_size = size


INPUT = torch.randn(2, 8, 6, 5, requires_grad=True)


def step(
    network: nn.Module, run: Callable[[Tensor], Tensor], sizes: tuple[int, ...]
) -> list[Tensor]:
    """Gradients of a step that runs several sizes before its one backward pass."""
    network.zero_grad()
    INPUT.grad = None
    loss = torch.zeros(())
    for size in sizes:
        configure(network, size)
        loss = loss + run(INPUT).square().sum()
    configure(network, 4)
    loss.backward()
    assert {m.group_size for m in network.modules() if hasattr(m, "group_sizes")} == {4}
    return [INPUT.grad, *(p.grad for p in network.parameters())]


Ways = dict[str, Callable[[nn.Sequential, Tensor], Tensor]]
WAYS: Ways = {}
for _reentrant in (False, True):
    _options = {"use_reentrant": _reentrant}
    _name = "reentrant" if _reentrant else "not reentrant"
    WAYS |= {
        f"network, {_name}": lambda n, x, o=_options: checkpoint(n, x, **o),
        f"blocks, {_name}": lambda n, x, o=_options: checkpoint(
            n[1], checkpoint(n[0], x, **o), **o
        ),
        f"layers, {_name}": lambda n, x, o=_options: n[1](
            checkpoint(n[0].series, checkpoint(n[0].whole, x, **o), **o).tanh()
        ),
        f"sequential, {_name}": lambda n, x, o=_options: checkpoint_sequential(n, 2, x, **o),
        f"the same layers twice, {_name}": lambda n, x, o=_options: checkpoint(
            lambda x: n(n(x)), x, **o
        ),
    }
for _outer, _inner in product((False, True), repeat=2):
    WAYS[f"nested, {_outer}, {_inner}"] = lambda n, x, o=_outer, i=_inner: checkpoint(
        lambda x: n[1](checkpoint(n[0], x, use_reentrant=i)), x, use_reentrant=o
    )


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "parts"])
@pytest.mark.parametrize("way", WAYS)
def test_sizes_of_one_step(way: str, fused: bool, network: nn.Sequential) -> None:
    """Catches a recomputation at the size that was set last: its gradients are another's."""
    run = WAYS[way]

    def plain(input: Tensor) -> Tensor:
        return network(network(input)) if "twice" in way else network(input)

    with use_fused(fused):
        for sizes in ((1, 8, 2), (4, 1), (2, 2, 8)):
            expected = step(network, plain, sizes)
            results = step(network, lambda input: run(network, input), sizes)
            for result, value in zip(results, expected, strict=True):
                # Of a layer that runs twice, the order of two gradients' sum may change.
                tolerance = 1e-5 if "twice" in way else 0
                torch.testing.assert_close(result, value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reentrant", [False, True])
def test_losses_differentiated_one_by_one(reentrant: bool, network: nn.Sequential) -> None:
    """Catches a size found by the order of the recomputations."""
    for order in ((0, 1, 2), (2, 0, 1)):
        results = []
        for checkpointed in (False, True):
            network.zero_grad()
            losses = []
            for size in (1, 8, 2):
                configure(network, size)
                output = (
                    checkpoint(network, INPUT, use_reentrant=reentrant)
                    if checkpointed
                    else network(INPUT)
                )
                losses.append(output.square().sum())
            for which in order:
                losses[which].backward()
            results.append([p.grad for p in network.parameters()])
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("reentrant", [False, True])
def test_size_set_inside(reentrant: bool, network: nn.Sequential) -> None:
    """Catches a checkpointed function that sets its sizes itself and is not obeyed, or that
    disturbs one that does not."""

    def inside(input: Tensor) -> Tensor:
        configure(network, 1)
        output = network(input)
        configure(network, 8)
        return output + network(input)

    def run(input: Tensor) -> Tensor:
        configure(network, 2)
        before = call(network, input)
        return before + call(inside, input)

    def call(function: Callable, input: Tensor) -> Tensor:
        return function(input)

    expected = step(network, run, (4,))

    def call(function: Callable, input: Tensor) -> Tensor:  # noqa: F811
        return checkpoint(function, input, use_reentrant=reentrant)

    # Afterwards the layers keep what the recomputation set, as after any function run again.
    network.zero_grad()
    INPUT.grad = None
    run(INPUT).square().sum().backward()
    results = [INPUT.grad, *(p.grad for p in network.parameters())]
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_group_size_reads_the_size_in_force(reentrant: bool) -> None:
    """Catches code that chooses by ``group_size``, as norms of every size do, and chooses another
    in the recomputation."""
    layer, seen = GroSSConv2d(8, 8, 3, group_sizes=SIZES), []

    def run(input: Tensor) -> Tensor:
        seen.append(layer.group_size)
        return layer(input)

    layer.group_size = 2
    output = checkpoint(run, INPUT, use_reentrant=reentrant)
    layer.group_size = 8
    output.sum().backward()
    assert seen == [2, 2]
    assert layer.group_size == 8


def test_record_is_short(network: nn.Sequential) -> None:
    """Catches a record of sizes that grows for ever, and a wrong size where it was too short."""
    layer = network[0].whole
    layer.group_size = 2
    output = checkpoint(layer, INPUT, use_reentrant=False)
    for i in range(REMEMBERED):
        layer.group_size = SIZES[i % 2]
    with pytest.raises(RuntimeError, match=rf"group_size: got more than {REMEMBERED} sizes"):
        output.sum().backward()
    assert len(layer._sizes) == REMEMBERED


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies(copied: Callable, network: nn.Sequential) -> None:
    """Catches a copy that goes by the clock of another time or process."""
    configure(network, 2)
    other = copied(network)
    expected = step(other, other, (1, 8))
    assert all(
        map(
            torch.equal,
            step(other, lambda x: checkpoint(other, x, use_reentrant=False), (1, 8)),
            expected,
        )
    )


def test_another_thread(network: nn.Sequential) -> None:
    """Catches a size found by the clock of another thread."""
    results: list[list[Tensor]] = []

    def work() -> None:
        for run in (network, lambda x: checkpoint(network, x, use_reentrant=False)):
            results.append(step(network, run, (1, 8)))

    configure(network, 8)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert all(map(torch.equal, *results))


def test_size_set_in_inference_mode() -> None:
    """Catches a size whose tensor no later training step can save: an evaluation between two
    epochs."""
    for layer in (
        GroSSConv2d(8, 8, 3, group_sizes=SIZES),
        SeriesConv2d(8, 8, 3, group_sizes=SIZES),
    ):
        layer.group_size = 4
        expected = torch.autograd.grad(layer(INPUT).sum(), list(layer.parameters()))
        with torch.inference_mode():
            for size in (1, 4):
                layer.group_size = size
                layer(INPUT.detach())
        results = torch.autograd.grad(layer(INPUT).sum(), list(layer.parameters()))
        assert all(map(torch.equal, results, expected))
