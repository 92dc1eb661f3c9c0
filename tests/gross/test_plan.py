"""Which convolutions are decomposed, at which sizes and widths, and what is said about the
others."""

import gross
import pytest
import torch
import torch.nn.functional as F
from gross.decomposition import Decomposition
from gross.supernet import decomposed_layers
from torch import nn
from torchvision.models import mobilenet_v2, resnext50_32x4d

from gross_kernels import GroSSConv2d


def structured(model: nn.Module, *args, **options) -> nn.Module:
    return gross.decompose(model, *args, method="random", quiet=True, **options)


def report(model: nn.Module) -> Decomposition:
    return vars(model)["decomposition_report"]


def two(second: nn.Module | None = None) -> nn.Module:
    """A first convolution, which stays, one to decompose, and perhaps another."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)]
    return nn.Sequential(*layers, *([] if second is None else [second]))


# Where nothing, or nothing more, can be done ----------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (mobilenet_v2, r"MobileNetV2 with 52 convolutions.*depthwise.*and 14 more; 1×1"),
        (resnext50_32x4d, r"ResNet with 53 convolutions.*1×1.*; grouped already, 32 groups"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), "the first convolution: 0"),
        (lambda: nn.Sequential(nn.Conv2d(5, 5, 3), nn.Conv2d(5, 5, 3)), "group_sizes=.*4, 16, 32"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3)), "ConvTranspose2d, not nn.Conv2d: 0"),
    ],
)
def test_a_network_in_which_nothing_can_be_decomposed_is_refused_with_what_was_found(make, message):
    """Catches a copy that is returned as if something had been done to it."""
    with torch.device("meta"):
        model = make()
    options = {} if "group_sizes" not in message else {"group_sizes": (4, 16, 32)}
    with pytest.raises(ValueError, match=message):
        structured(model, **options)


def test_a_supernet_is_not_decomposed_again_and_its_report_stays():
    """Catches a second call that returns a copy with an empty report in place of the first one."""
    supernet = structured(two(nn.Conv2d(16, 16, 3)), (1, 4), skip=["0", "2"])
    with pytest.raises(ValueError, match=r"a supernet of 1 decomposed layers.*named in skip: 0, 2"):
        structured(supernet, (1, 4), skip=["0", "2"])
    both = gross.decompose(supernet, {"2": (1, 8)}, sweeps=1, quiet=True)
    assert [layer.name for layer in report(both).layers] == ["1", "2"]
    assert report(both).method == "random and als"
    assert report(both).parameters_before == report(supernet).parameters_before
    assert both[1].grouped[0].equal(supernet[1].grouped[0])
    assert [len(report(supernet).layers), len(report(both).layers)] == [1, 2]


# Layers that cannot get cheaper -----------------------------------------------------------------


def test_sizes_that_cost_more_than_the_convolution_are_left_out():
    """Catches a decomposition that makes the network slower. 32→32: the dense kernel has 9216
    products a pixel, the bottleneck 2048 + 288·s, which is more from s = 25 on."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
    assert structured(model)[1].group_sizes == (1, 4, 16)
    assert structured(model, keep_costlier=True)[1].group_sizes == (1, 4, 16, 32)
    assert structured(model, {"1": (1, 32)})[1].group_sizes == (1, 32)
    # At stride 2 the first pointwise convolution runs at four times the pixels: 5120 + 288·s.
    model[1] = nn.Conv2d(32, 32, 3, stride=2)
    assert structured(model, (1, 2, 4, 8, 16))[1].group_sizes == (1, 2, 4, 8)


def test_a_layer_without_a_cheaper_size_stays_with_that_reason():
    """Catches the last layer of a network for super-resolution, 64→4, which cost 2.8 to 13 times
    its convolution at the width of its input."""
    model = two(nn.Conv2d(16, 16, 2, stride=2))
    supernet = structured(model, (4, 16))
    assert type(supernet[2]) is nn.Conv2d
    assert report(supernet).left_alone["2"] == (
        "at width 16→16 every group size costs more MACs than it does"
    )
    assert isinstance(structured(model, (4, 16), keep_costlier=True)[2], GroSSConv2d)


def test_the_width_is_that_of_the_fewer_channels_and_every_size_saves():
    """Catches a default width that ignores the output's channels."""
    supernet = structured(
        nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 16, 3, padding=1)),
        input_size=(3, 32, 32),
    )
    (layer,) = report(supernet).layers
    assert layer.width == (16, 16)
    assert layer.macs_before == 32 * 32 * 16 * (64 * 9 + 1)
    assert layer.macs == tuple(32 * 32 * (64 * 16 + 16 * s * 9 + 16 * 16 + 16) for s in (1, 4, 16))
    assert max(layer.macs) < layer.macs_before


def test_a_width_that_keeps_almost_nothing_is_not_taken_without_a_word():
    """Catches a bottleneck of 3 channels for 3→64: a relative error of 0.9 and no choice of
    sizes."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 3, 3))
    supernet = structured(model, skip=())
    assert report(supernet).left_alone == {
        "0": "its width 3→3 would keep 3 of its kernel's 27 dimensions",
        "2": "its width 3→3 would keep 3 of its kernel's 27 dimensions",
    }
    assert structured(model, (1,), width=3, skip=())[0].width == (3, 3)
    assert structured(model, {"0": (1,)})[0].width == (3, 3)


# The first convolution --------------------------------------------------------------------------


class Backwards(nn.Module):
    """Registers its first convolution last, and a 1×1 that only shifts colours before it."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Conv2d(3, 3, 1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(self.stem(self.shift(image)))


def test_the_first_convolution_is_the_first_that_is_called():
    """Catches the registered order, or a 1×1, taken for the network's first layer."""
    supernet = structured(Backwards(), (1, 4), input_size=(3, 8, 8))
    assert list(decomposed_layers(supernet)) == ["body"]
    assert report(supernet).left_alone == {"shift": "1×1", "stem": "the first convolution"}
    # Without a call there is the registered order alone, of which the 1×1 is still no first layer.
    with pytest.raises(ValueError, match=r"the first convolution: body"):
        structured(Backwards(), (1, 4))


# What a layer in a convolution's place would lose -----------------------------------------------


def replaced_forward(conv: nn.Conv2d) -> nn.Conv2d:
    conv.forward = lambda input: -F.conv2d(input, conv.weight, conv.bias, padding=1)
    return conv


def replaced_inner_forward(conv: nn.Conv2d) -> nn.Conv2d:
    conv._conv_forward = lambda input, weight, bias: F.conv2d(input, -weight, bias, padding=1)
    return conv


def gradient_hook(conv: nn.Conv2d) -> nn.Conv2d:
    conv.weight.register_hook(lambda gradient: 0 * gradient)
    return conv


def accumulation_hook(conv: nn.Conv2d) -> nn.Conv2d:
    conv.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    return conv


def with_a_mask(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_buffer("mask", torch.ones(1))
    return conv


def with_attributes(conv: nn.Conv2d) -> nn.Conv2d:
    conv.width, conv.group_size, conv.stage = 3, 7, "last"
    return conv


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_attributes, "its attributes group_size, width have names of the layer in its place"),
        (replaced_forward, "its forward was replaced on the instance"),
        (replaced_inner_forward, "its forward was replaced on the instance"),
        (gradient_hook, "its parameters have hooks, which the layer in its place would lose"),
        (accumulation_hook, "its parameters have hooks, which the layer in its place would lose"),
        (with_a_mask, "it holds mask, which the layer in its place would lose"),
    ],
)
def test_a_convolution_that_does_more_is_left_alone_with_the_reason(change, reason):
    """Catches a layer that computes, or trains, as the convolution before the change did."""
    model = two(change(nn.Conv2d(16, 16, 3, padding=1)))
    supernet = structured(model, (1, 4))
    assert report(supernet).left_alone["2"] == reason
    with pytest.raises(ValueError, match=f"'2' cannot be decomposed: {reason}"):
        structured(model, {"2": (1, 4)})


def test_other_kinds_of_convolutions_are_in_the_report():
    """Catches a network that is half transposed convolutions, and a report that says nothing of
    them."""
    model = nn.ModuleList([*two(), nn.ConvTranspose2d(16, 16, 3), nn.Conv1d(4, 4, 3)])
    assert report(structured(model, (1, 4))).left_alone == {
        "0": "the first convolution",
        "2": "ConvTranspose2d, not nn.Conv2d",
        "3": "Conv1d, not nn.Conv2d",
    }


# Convolutions that are called past their place ----------------------------------------------------


class Stored(nn.Module):
    """Calls its second convolution through what ``store`` makes of it."""

    def __init__(self, store) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.other = nn.Conv2d(16, 16, 3, padding=1)
        self.op = store(self.conv)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.other(self.op(self.stem(image)))


def closure(conv: nn.Conv2d):
    return lambda features: conv(features)


@pytest.mark.parametrize(
    "store",
    [
        lambda conv: conv.forward,
        closure,
        lambda conv: [{"op": closure(conv)}][0]["op"],
        lambda conv: lambda features, op=conv: op(features),
    ],
    ids=["bound method", "closure", "nested closure", "default argument"],
)
def test_a_convolution_inside_a_stored_function_is_found_and_left_alone(store):
    """Catches a supernet that goes on calling the convolution, trained or not, whatever its
    configuration."""
    model = Stored(store)
    supernet = structured(model, (1, 4))
    assert list(decomposed_layers(supernet)) == ["other"]
    assert report(supernet).left_alone["conv"] == "'op' holds a function that calls it"
    assert supernet(torch.zeros(1, 3, 6, 6)).shape == (1, 16, 6, 6)


ELSEWHERE: dict[str, nn.Module] = {}


class Global(nn.Module):
    """Calls a convolution through a variable of its program, which no copy of it can change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.other = nn.Conv2d(16, 16, 3, padding=1)
        ELSEWHERE["conv"] = self.conv

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.other(ELSEWHERE["conv"](self.stem(image)))


def test_a_convolution_that_a_forward_pass_reaches_from_elsewhere_is_left_alone():
    """Catches the old convolution called silently: what no attribute shows, a forward pass of a
    copy does."""
    supernet = structured(Global(), (1, 4), example=torch.zeros(1, 3, 6, 6))
    assert list(decomposed_layers(supernet)) == ["other"]
    assert "no copy of the model can change" in report(supernet).left_alone["conv"]
    assert not ELSEWHERE["conv"]._forward_pre_hooks


# Subclasses that are made plain first -----------------------------------------------------------


class SamePadding(nn.Conv2d):
    """Pads as TensorFlow does, which depends on the image, as timm's ``Conv2dSame``."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.conv2d(padded(image), self.weight, self.bias, self.stride)


def padded(image: torch.Tensor) -> torch.Tensor:
    total = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in image.shape[-2:]]
    sides = [(each // 2, each - each // 2) for each in total]
    return F.pad(image, (*sides[1], *sides[0]))


class Padding(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return padded(image)


class Standardised(nn.Conv2d):
    """Convolves with weights of mean 0 and variance 1, as timm's ``ScaledStdConv2d``."""

    def standardised(self) -> torch.Tensor:
        rows = self.weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        return rows.view_as(self.weight)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(image, self.standardised(), self.bias)


def plain(conv: nn.Conv2d, weight: torch.Tensor) -> nn.Conv2d:
    made = nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, conv.padding)
    made.weight, made.bias = nn.Parameter(weight.detach()), conv.bias
    return made


CONVERT = {
    SamePadding: lambda conv: nn.Sequential(Padding(), plain(conv, conv.weight)),
    Standardised: lambda conv: plain(conv, conv.standardised()),
}


def test_subclasses_are_made_plain_and_then_decomposed(tmp_path):
    """Catches a conversion that loses the padding or the standardised weight: at the exact size the
    network must be the one before. And one that changes the given model, or cannot be loaded."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), SamePadding(8, 8, 3, stride=2), Standardised(8, 8, 3, padding=1)
    )
    supernet = gross.decompose(model, (2, 8), keep_costlier=True, convert=CONVERT, quiet=True)
    assert list(decomposed_layers(supernet)) == ["1.1", "2"]
    assert [type(each) for each in model] == [nn.Conv2d, SamePadding, Standardised]
    for side in (11, 12):
        image = torch.randn(2, 3, side, side)
        torch.testing.assert_close(supernet(image), model(image), rtol=1e-3, atol=1e-4)
    own = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in own for parameter in supernet.parameters())
    gross.save(supernet, tmp_path / "saved.safetensors")
    loaded = gross.load(tmp_path / "saved.safetensors", model, convert=CONVERT)
    assert torch.equal(loaded(image), supernet(image))


@pytest.mark.parametrize("made", [nn.Linear(2, 2), nn.Sequential(), "conv"])
def test_a_conversion_to_something_else_is_refused(made):
    """Catches a function that does not return what takes the module's place."""
    with pytest.raises(ValueError, match=r"^convert: got .* for '1', accepted is one nn.Conv2d"):
        structured(
            nn.Sequential(nn.Conv2d(3, 8, 3), SamePadding(8, 8, 3)),
            convert={SamePadding: lambda conv: made},
        )
