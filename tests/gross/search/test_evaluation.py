"""The tree evaluation: every configuration's logits alone, bit for bit, and what is refused."""

import itertools
import warnings

import gross
import pytest
import torch
import torch.nn.functional as F
from gross import evaluation
from gross.evaluation import Accuracy, cut
from gross.supernet import configuration, decomposed_layers, set_configuration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

GROUP_SIZES = (1, 2, 4)


class Block(nn.Module):
    """Two convolutions and the tensor that goes around them."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        activated = F.relu(input)
        output = F.relu(self.second(self.first(activated)))
        return activated.add_(output) if self.inplace else activated + output


class Branching(nn.Module):
    """Cannot be traced: what it computes depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, input: Tensor) -> Tensor:
        return self.body(-input if input.sum() > 0 else input)


def chain(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        *(middle or (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(128, 5),
    )


def supernet(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return gross.decompose(
        model, GROUP_SIZES, keep_costlier=True, method="random", quiet=True
    ).eval()


def every_configuration(model: nn.Module) -> list[tuple[int, ...]]:
    sizes = [layer.group_sizes for layer in decomposed_layers(model).values()]
    return list(itertools.product(*sizes))


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(70, 3, 8, 8), torch.randint(5, (70,))


def alone(model: nn.Module, c: tuple[int, ...], images: Tensor, batch_size: int) -> Tensor:
    """Logits of one configuration."""
    set_configuration(model, c)
    with torch.inference_mode():
        batches = images.contiguous(memory_format=torch.channels_last).split(batch_size)
        return torch.cat([model(batch) for batch in batches])


@pytest.mark.parametrize(
    "model",
    [
        chain(),
        chain(Block()),
        chain(Block(), Block()),
        chain(nn.Conv2d(8, 8, 3, padding=1), Block(inplace=True)),
    ],
    ids=["sequential", "residual", "residual-blocks", "in-place-on-a-shared-tensor"],
)
def test_logits_are_those_of_each_configuration_alone(model, data, monkeypatch):
    """Catches a branch that runs at another branch's group size, an activation that a later
    branch has overwritten, and another batch size or memory format. Bits, not closeness."""
    net = supernet(model)
    logits: dict[tuple[int, ...], list[Tensor]] = {}
    descend = evaluation._Walk._descend

    def listening(self, level, input, configurations, count):
        def note(c: tuple[int, ...], output: Tensor) -> None:
            logits.setdefault(c, []).append(output.clone())
            count(c, output)

        descend(self, level, input, configurations, note if level == 0 else count)

    monkeypatch.setattr(evaluation._Walk, "_descend", listening)
    wanted = every_configuration(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accuracies = gross.evaluate(net, wanted, Accuracy(data, batch_size=32))
    for c, found in zip(wanted, accuracies, strict=True):
        expected = alone(net, c, data[0], 32)
        assert torch.equal(torch.cat(logits[c]), expected), c
        assert found == pytest.approx(100 * (expected.argmax(1) == data[1]).double().mean().item())
    assert len(set(map(str, logits.values()))) == len(wanted), "configurations must differ"


def test_a_shared_prefix_runs_once(data):
    """Catches a walk that is no tree: 3·3 configurations, 1 + 3 + 9 calls."""
    net = supernet(chain())
    calls: list[int] = []
    first, last = decomposed_layers(net).values()
    for layer in (net[0], first, last):
        layer.register_forward_hook(lambda layer, args, output: calls.append(len(args[0])))
    gross.evaluate(net, every_configuration(net), Accuracy(data, batch_size=70))
    assert calls.count(70) == 1 + 3 + 9


def test_a_network_is_cut_between_residual_blocks_and_after_the_pooling():
    """Catches cuts inside a block, where two tensors flow, and cuts before what can be shared."""
    resnet = supernet(resnet18())
    with torch.inference_mode():
        segments = cut(resnet, torch.randn(1, 3, 64, 64))
    assert [segment.layers for segment in segments] == [(), *((i, i + 1) for i in range(0, 16, 2))]
    net = supernet(chain())
    with torch.inference_mode():
        pooled = cut(net, torch.randn(1, 3, 8, 8))
    assert [segment.layers for segment in pooled] == [(), (0,), (1,)]
    assert any(isinstance(module, nn.MaxPool2d) for module in pooled[1].run.modules())


def test_what_cannot_be_traced_runs_alone_and_says_so(data):
    """Catches a silent fall-back, and one that is wrong."""
    net = supernet(Branching())
    wanted = every_configuration(net)
    with pytest.warns(UserWarning, match="on its own.*cannot trace"):
        accuracies = gross.evaluate(net, wanted, Accuracy(data, batch_size=32))
    expected = [
        100 * (alone(net, c, data[0], 32).argmax(1) == data[1]).double().mean().item()
        for c in wanted
    ]
    assert accuracies == pytest.approx(expected)


def test_two_layers_in_one_block_share_nothing_and_it_says_so(data):
    """Catches the missing word where the tree has a single level."""
    net = supernet(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(), nn.Flatten(), nn.Linear(512, 5))
    )
    with pytest.warns(UserWarning, match="no single tensor"):
        gross.evaluate(net, every_configuration(net), data)


def test_a_loader_gives_what_tensors_give_and_repeats_count_once(data):
    """Catches a loader whose last, smaller batch is weighed as a whole one."""
    net = supernet(chain())
    wanted = [(1, 4), (4, 1), (1, 4)]
    loader = DataLoader(TensorDataset(*data), batch_size=32)
    expected = gross.evaluate(net, wanted, Accuracy(data, batch_size=32))
    assert gross.evaluate(net, wanted, loader) == expected
    assert expected[0] == expected[2]
    assert gross.evaluate(net, [], data) == []


def test_mode_and_configuration_come_back(data):
    """Catches a supernet that is left in the last configuration, or in evaluation mode."""
    net = supernet(chain()).train()
    net[3].eval()
    set_configuration(net, (2, 4))
    gross.evaluate(net, [(1, 1)], data)
    assert configuration(net) == (2, 4)
    assert net.training
    assert not net[3].training
    # A tensor made in inference mode would be refused by autograd.
    net(data[0]).sum().backward()


def test_memory_bounds_the_batch(data):
    """Catches a budget that is not looked at."""
    net = supernet(chain())
    sizes: set[int] = set()
    net[0].register_forward_hook(lambda layer, args, output: sizes.add(len(args[0])))
    # At most five tensors of 8·8·8 floats, less than 10 kB an image.
    gross.evaluate(net, [(1, 1)], Accuracy(data, memory=100_000))
    assert 10 <= max(sizes) < 35


def test_a_subset_and_giving_up_are_options(data):
    """Catches options that do nothing, and a hopeless configuration that comes back with a
    number."""
    net = supernet(chain())
    images, labels = data
    part = gross.evaluate(net, [(1, 1)], Accuracy(data, images=50))
    assert part == gross.evaluate(net, [(1, 1)], (images[:50], labels[:50]))
    with torch.inference_mode():
        set_configuration(net, (1, 1))
        labels = net(images).argmax(1)
    rights = gross.evaluate(net, [(1, 1), (4, 4)], (images, labels))
    assert rights[0] == 100 > rights[1]
    kept, given_up = gross.evaluate(
        net, [(1, 1), (4, 4)], Accuracy((images, labels), give_up_below=99.9, batch_size=35)
    )
    assert kept == 100
    assert given_up != given_up


@pytest.mark.parametrize(
    ("wanted", "change", "message"),
    [
        ([(1, 1, 1)], {}, "configuration: got 3 group sizes"),
        ([(1, 3)], {}, "configuration: got 3 for decomposed layer 1"),
        ([(1, 1)], {"images": torch.empty(0, 3, 8, 8), "labels": torch.empty(0)}, "no image"),
        ([(1, 1)], {"images": torch.randn(70, 1, 8, 8)}, "does not take"),
        ([(1, 1)], {"images": torch.randn(70, 3, 16, 16)}, "does not take"),
        ([(1, 1)], {"labels": torch.full((70,), 5)}, "labels 5 to 5, accepted are 0 to 4"),
        ([(1, 1)], {"labels": torch.zeros(3)}, "70 images and 3 labels"),
    ],
)
def test_bad_input_is_named(data, wanted, change, message):
    """Catches other data than the supernet was made for, and configurations of another one."""
    given = {"images": data[0], "labels": data[1], **change}
    with pytest.raises(ValueError, match=message):
        gross.evaluate(supernet(chain()), wanted, (given["images"], given["labels"]))


def test_a_network_that_gives_no_logits_is_refused(data):
    """Catches an accuracy taken of images."""
    net = supernet(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))
    with pytest.raises(ValueError, match="metric of your own"):
        gross.evaluate(net, [(1,)], data)
