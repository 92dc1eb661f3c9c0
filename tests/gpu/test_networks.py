"""Networks on a GPU: nothing waits for the device where it need not, and CUDA graphs compute what
calls do."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product

import gross
import pytest
import torch
from gross.supernet import set_configuration
from larger import DEVICE, DRY
from torch import Tensor, nn

from gross_kernels import GroSSConv2d, use_backend


def network() -> nn.Module:
    """A supernet of two layers, for images of 3 channels."""
    sizes = (1, 4, 8)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        GroSSConv2d(8, 8, 3, padding=1, group_sizes=sizes),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        GroSSConv2d(8, 16, 3, stride=2, padding=1, group_sizes=sizes),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, 10),
    ).to(DEVICE, memory_format=torch.channels_last)


def data(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 6, 6), torch.arange(count) % 10


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    """The GPU's own; where a CPU plays it the definition, for float32 takes the interpreter
    minutes."""
    with use_backend("reference") if DRY else nullcontext():
        yield


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Within, an operation that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("policy", ["uniform", "sandwich"])
def test_training_never_waits(policy: str) -> None:
    """Catches a step that asks for a value of the device: a loss, a norm, a mask."""
    batches = [data(4) for _ in range(3)]
    options = {"epochs": 1, "sampling.policy": policy, "optimizer.clip": 1.0}
    history = gross.finetune(network(), batches, quiet=True, **options)
    assert 0 < history.epochs[0]["loss"] < 10


def test_losses_are_all_counted() -> None:
    """Catches the loss that is read late read twice, or never."""
    torch.manual_seed(0)
    model = network()
    batches = [data(4) for _ in range(3)]
    losses = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses.append(nn.functional.cross_entropy(model(batch[0]), batch[1]))
        return losses[-1]

    history = gross.train(model, batches, loss=loss, quiet=True, epochs=1)
    assert history.epochs[0]["loss"] == pytest.approx(sum(x.item() for x in losses) / 3)


def test_divergence_is_seen() -> None:
    """Catches a loss of NaN that nobody reads because it is the last."""
    batches = [data(4) for _ in range(2)]
    batches[-1][0].fill_(torch.nan)
    with pytest.raises(gross.training.loop.DivergenceError, match="the loss is nan at step 2"):
        gross.train(network(), batches, quiet=True, epochs=1)


def test_evaluation_by_graphs() -> None:
    """Catches a graph that keeps the first batch's values, counts one twice, or another
    configuration's; and a last batch of another size."""
    model = network().eval()
    every = list(product((1, 4, 8), repeat=2))
    given = data(22)
    with torch.inference_mode():
        found = []
        for configuration in every:
            set_configuration(model, configuration)
            right = model(given[0].to(DEVICE)).argmax(1).cpu() == given[1]
            found.append(100 * right.float().mean().item())
    for graphs in (False, True):
        accuracy = gross.Accuracy(given, batch_size=4, graphs=graphs)
        assert gross.evaluate(model, every, accuracy) == pytest.approx(found)


def test_graphs_of_a_network() -> None:
    """Catches a graph that is replayed for another configuration or shape, or whose result the next
    call overwrites."""
    model = network().eval()
    graphed = gross.Graphed(model)
    for _ in range(3):
        for size, count in product((1, 8), (2, 3)):
            set_configuration(model, size)
            images = torch.randn(count, 3, 6, 6, device=DEVICE)
            with torch.no_grad():
                expected = model(images)
            first = graphed(images)
            graphed(torch.zeros_like(images))
            torch.testing.assert_close(first, expected)
    assert len(graphed._replays) == 4


def test_exported_to_a_device() -> None:
    """Catches an exported network that is elsewhere than asked for, or whose graph is another
    network."""
    model = network().eval().cpu()
    images = data(4)[0]
    with torch.no_grad():
        expected = model(images)
    exported = gross.export(model, example=images, device=DEVICE, graphs=True)
    for _ in range(3):
        torch.testing.assert_close(
            exported(images.to(DEVICE)).cpu(), expected, rtol=1e-3, atol=1e-4
        )


@pytest.mark.skipif(DRY, reason="a CPU's own values are there when they are asked for")
def test_pinned_copies() -> None:
    """Catches a copy to the device that the host waits for."""
    tensor = torch.randn(1000, 1000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert gross.devices.moved(tensor, torch.device(DEVICE)).device.type == DEVICE
    finally:
        torch.cuda.set_sync_debug_mode("default")
