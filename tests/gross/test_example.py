"""Counting and decomposing networks that take something else than one tensor, or that look at
values."""

import gross
import pytest
import torch
import torchvision
from gross.supernet import decomposed_layers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gross_kernels import GroSSConv2d, SeriesConv2d


def convolution(bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1, bias=bias)


class Stem(nn.Module):
    """A stem and a convolution to decompose; what is between them is a subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1, bias=False), convolution()


class TwoImages(Stem):
    def forward(self, first: torch.Tensor, second: torch.Tensor, negate: bool = False):
        difference = self.stem(first) - self.stem(second)
        return self.body(-difference if negate else difference)


class Named(Stem):
    def forward(self, *, image: torch.Tensor, time: int):
        return self.body(self.stem(image) * time)


class ListOfImages(Stem):
    def forward(self, images: list[torch.Tensor]):
        return [self.body(self.stem(image)) for image in images]


class Values(Stem):
    """Reads a value, as networks do that choose what to run, and nothing of which runs on meta."""

    def forward(self, image: torch.Tensor):
        features = self.stem(image)
        return self.body(features) if features.sum().item() > -1e9 else features


class Attribute(Stem):
    """Holds a tensor that is neither a parameter nor a buffer, as every YOLO that has run."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors = [torch.ones(8, 1, 1)]

    def forward(self, image: torch.Tensor):
        return self.body(self.stem(image) - self.anchors[0])


IMAGE = torch.ones(1, 3, 6, 6)
#: Products of the stem and of the body for one image of 6×6.
STEM, BODY = 36 * 8 * 27, 36 * 8 * 72


@pytest.mark.parametrize(
    ("model", "example", "stems", "bodies"),
    [
        (Attribute(), IMAGE, 1, 1),
        (Values(), IMAGE, 1, 1),
        (Values(), IMAGE.expand(5, 3, 6, 6), 5, 5),
        (TwoImages(), (IMAGE, IMAGE), 2, 1),
        (TwoImages(), (IMAGE, IMAGE, True), 2, 1),
        (TwoImages(), {"first": IMAGE, "second": IMAGE, "negate": True}, 2, 1),
        (Named(), {"image": IMAGE, "time": 3}, 1, 1),
        (ListOfImages(), [IMAGE, IMAGE[0], IMAGE], 3, 3),
    ],
)
def test_a_network_is_called_as_it_takes_its_input(model, example, stems, bodies):
    """Catches an example handed over in another shape than it has, a network that does not run on
    the meta device given up, and images that are not counted."""
    report = gross.macs(model, example=example)
    assert report.total == stems * STEM + bodies * BODY
    assert report.input_size is None
    assert "for the example" in str(report)
    supernet = gross.decompose(model, (1, 4), method="random", example=example, quiet=True)
    (layer,) = supernet.decomposition_report.layers
    assert layer.macs_before == bodies * BODY
    counted = gross.macs(supernet, example=example)
    for size, macs in zip((1, 4), layer.macs, strict=True):
        assert macs == bodies * 36 * (64 + 8 * size * 9 + 64)
        assert counted.with_configuration(size).layers[1].total == macs


@pytest.mark.parametrize("model", [Attribute(), Values()])
def test_input_size_serves_what_does_not_run_on_the_meta_device(model):
    """Catches a network that is refused although its input is one tensor."""
    assert gross.macs(model, (3, 6, 6)).total == STEM + BODY


class Frames(nn.Module):
    """A layer that sees frames as images of their own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.layer(clip.flatten(0, 1))


@pytest.mark.parametrize(
    "layer",
    [
        convolution(bias=True),
        GroSSConv2d(8, 8, 3, padding=1, group_sizes=(1, 4)),
        SeriesConv2d(8, 8, 3, padding=1, group_sizes=(1, 4)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_frames_folded_into_the_batch_count_one_by_one(layer):
    """Catches a decomposed layer counted for one image however many a call has: 8 frames cost 8
    times as much as one, as they do in nn.Conv2d."""
    one = gross.macs(layer, (8, 5, 5)).total
    report = gross.macs(Frames(layer), (8, 8, 5, 5))
    assert report.total == 8 * one
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Frames(layer)(torch.zeros(1, 8, 8, 5, 5))
    biases = 0 if getattr(layer, "bias", None) is None else 8 * 8 * 25
    assert 2 * (report.total - biases) == counter.get_total_flops()
    if isinstance(layer, GroSSConv2d):
        assert report.with_configuration(1).total == 8 * gross.macs(layer, (8, 5, 5), 1).total
    # Without a batch dimension it is one image.
    assert gross.macs(layer, example=torch.zeros(8, 5, 5)).total == one


class Keeps(Stem):
    def forward(self, image: torch.Tensor):
        self.last = self.stem(image)
        self.calls = getattr(self, "calls", 0) + 1
        if self.last.mean().item() > 1e9:
            raise RuntimeError
        return self.body(self.last)


def test_a_forward_on_the_networks_own_device_leaves_the_network_as_it_is():
    """Catches the model itself run in place of a copy: it would keep outputs, count calls and
    update its statistics."""
    model = nn.Sequential(Keeps(), nn.BatchNorm2d(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gross.macs(model, (3, 6, 6))
    assert not hasattr(model[0], "calls")
    assert not hasattr(model[0], "last")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_an_error_of_the_network_says_what_it_was_called_with():
    """Catches an error that leaves the user without the input that caused it, or with the meta
    device's error alone."""
    with pytest.raises(TypeError, match="second") as error:
        gross.macs(TwoImages(), (3, 6, 6))
    assert "input_size=(3, 6, 6)" in "".join(error.value.__notes__)
    with pytest.raises(RuntimeError) as error:
        gross.macs(Values(), example=torch.zeros(1, 5, 6, 6))
    assert "the example" in "".join(error.value.__notes__)
    with pytest.raises(ValueError, match="example: got one beside input_size"):
        gross.macs(Values(), (3, 6, 6), example=IMAGE)


def test_the_forward_pass_comes_before_the_fit(monkeypatch):
    """Catches a fit of minutes that is lost because the network does not take the input."""

    def fit(*args: object) -> None:
        raise AssertionError("fitted")

    monkeypatch.setattr("gross.decomposition.convert.fit_layers", fit)
    with pytest.raises(RuntimeError, match="channels"):
        gross.decompose(Values(), (1, 4), input_size=(5, 6, 6), quiet=True)
    with pytest.raises(AssertionError, match="fitted"):
        gross.decompose(Values(), (1, 4), input_size=(3, 6, 6), quiet=True)


def test_a_detector_is_counted_and_decomposed():
    """Catches what small networks do not show: torchvision's detectors take a list of images and
    choose boxes by value."""
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ).eval()
    images = [torch.rand(3, 64, 64)]
    report = gross.macs(model, example=images)
    assert report.total > 4e8
    flow = torchvision.models.optical_flow.raft_small(weights=None)
    pair = (torch.zeros(1, 3, 128, 128), torch.zeros(1, 3, 128, 128), 1)
    supernet = gross.decompose(flow, method="random", example=pair, quiet=True)
    assert len(decomposed_layers(supernet)) > 10
    reported = supernet.decomposition_report.layers
    assert sum(max(layer.macs) for layer in reported) < sum(layer.macs_before for layer in reported)
