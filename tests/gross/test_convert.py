"""Model surgery: which convolutions are decomposed, what happens to the rest of the model, and what
the report says."""

import copy
import subprocess
import sys
from collections import OrderedDict

import gross
import pytest
import torch
import torch.nn.functional as F
from gross.decomposition import Decomposition, decompose
from gross.supernet import configuration, decomposed_layers, set_configuration
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models import resnet18, resnet50, vgg16

from gross_kernels import GroSSConv2d, expand


def structured(model: nn.Module, *args, **options) -> nn.Module:
    """The decomposition's structure alone, without a word, also where it costs more than it
    saves."""
    return decompose(
        model, *args, **{"method": "random", "quiet": True, "keep_costlier": True, **options}
    )


def report(model: nn.Module) -> Decomposition:
    return vars(model)["decomposition_report"]


def stack(*convolutions: nn.Conv2d) -> nn.Sequential:
    """A first convolution, which is left alone, and then these."""
    return nn.Sequential(nn.Conv2d(3, convolutions[0].in_channels, 3, padding=1), *convolutions)


# What becomes of the model ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "bias": False},
        {"kernel_size": (1, 3), "stride": (2, 1)},
        {"dilation": 2, "padding": "same"},
        {"kernel_size": 2, "padding": "same", "padding_mode": "reflect"},
        {"padding": (2, 1), "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "replicate"},
    ],
)
def test_at_full_width_and_size_the_network_is_unchanged(options):
    """Catches any part of a convolution's geometry that is lost: where the group size is the width
    the decomposition is exact, so that the outputs must agree."""
    model = stack(nn.Conv2d(8, 8, **{"kernel_size": 3, **options})).eval()
    supernet = decompose(model, (2, 8), sweeps=2, keep_costlier=True, quiet=True)
    image = torch.randn(2, 3, 11, 12)
    expected = model(image)
    assert isinstance(supernet[1], GroSSConv2d)
    torch.testing.assert_close(supernet(image), expected, rtol=1e-4, atol=1e-5)
    set_configuration(supernet, (2,))
    assert supernet(image).shape == expected.shape
    assert not torch.allclose(supernet(image), expected, rtol=1e-2)


def test_the_given_model_is_left_as_it_is():
    """Catches surgery on the original, or a supernet whose training would train the original
    too."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    before = copy.deepcopy(model.state_dict())
    supernet = structured(model, (1, 2))
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(1)
    supernet(torch.randn(2, 3, 8, 8))
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["als", "random"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_mode_and_bias_are_the_convolutions(method, dtype):
    """Catches layers made in float32, in training mode, or with a fresh bias where the weights are
    fitted."""
    model = stack(nn.Conv2d(4, 4, 3)).to(dtype).eval()
    supernet = decompose(model, (1, 4), method=method, sweeps=2, keep_costlier=True, quiet=True)
    assert {parameter.dtype for parameter in supernet.parameters()} == {dtype}
    assert not any(module.training for module in supernet.modules())
    assert method == "random" or torch.equal(supernet[1].bias, model[1].bias)


def test_random_needs_no_memory_on_the_meta_device():
    """Catches a structure that is drawn on the host in between: VGG-16 as a supernet would need
    gigabytes."""
    with torch.device("meta"):
        model = vgg16()
    assert all(parameter.is_meta for parameter in structured(model).parameters())


class Nested(nn.Module):
    """Convolutions in every kind of container, one of them also in a plain list and in a
    dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleDict(
            {"a": nn.Sequential(OrderedDict(inner=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))))}
        )
        self.tail = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1)])
        self.order = [self.tail[0]]
        self.by_name = {"tail": (self.tail[0],)}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.blocks["a"](self.stem(image))
        return self.by_name["tail"][0](self.order[0](features))


def test_nested_convolutions_are_found_and_every_reference_follows():
    """Catches a convolution missed in a container, and a plain list or dictionary in which the old
    convolution goes on working."""
    supernet = structured(Nested(), (1, 2))
    assert list(decomposed_layers(supernet)) == ["blocks.a.inner.0", "tail.0"]
    assert supernet.order[0] is supernet.tail[0] is supernet.by_name["tail"][0]
    assert supernet(torch.randn(1, 3, 6, 6)).shape == (1, 4, 6, 6)


def test_a_convolution_in_two_places_becomes_one_layer():
    """Catches a shared convolution that is fitted twice and then trained apart, or counted twice in
    a configuration."""
    shared = nn.Conv2d(4, 4, 3, padding=1)
    supernet = decompose(
        nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared), (1, 2), sweeps=2, quiet=True
    )
    assert supernet[1] is supernet[3]
    assert configuration(supernet) == (2,)
    assert [layer.name for layer in report(supernet).layers] == ["1"]


def test_convolutions_that_share_a_weight_share_their_terms():
    """Catches tied weights that come apart in training, or are fitted twice with different
    results."""
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2)
    second.weight = first.weight
    supernet = decompose(
        stack(first, second), (1, 2), sweeps=2, skip=["0"], keep_costlier=True, quiet=True
    )
    names = ("pointwise_in", "grouped", "pointwise_out")
    assert all(getattr(supernet[1], name)[0] is getattr(supernet[2], name)[0] for name in names)
    assert supernet[2].stride == (2, 2)
    assert supernet[1].bias is not supernet[2].bias


def test_a_weight_shared_with_a_layer_that_stays_is_left_alone():
    """Catches a decomposition that unties a weight without a word."""
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = first.weight
    model = stack(first, second)
    assert (
        report(structured(nn.Sequential(*model, nn.Conv2d(4, 4, 3)), (1, 2), skip=["0", "1"]))
        .left_alone["2"]
        .startswith("its weight is shared")
    )
    with pytest.raises(ValueError, match=r"'2' cannot be decomposed: its weight is shared"):
        structured(model, {"2": (1, 2)})


def test_a_parametrised_convolution_is_decomposed_at_its_present_weight():
    """Catches the raw parameter taken for the weight: weight norm computes with another one."""
    conv = parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(3)
    model = stack(conv)
    supernet = decompose(model, (4,), keep_costlier=True, quiet=True)
    image = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(supernet(image), model(image), rtol=1e-4, atol=1e-5)


def test_the_fit_is_repeatable_and_random_is_fresh():
    """Catches a fit that depends on the global generator, and a structure that copies the weights
    or repeats itself."""
    model = stack(nn.Conv2d(4, 8, 3))
    first, second = (decompose(model, (1, 2), sweeps=3, quiet=True) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    fresh = [structured(model, (1, 2))[1].grouped[0] for _ in range(2)]
    assert not torch.equal(*fresh)


# Which convolutions, and at which sizes ---------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "decomposed", "left_alone"),
    [(vgg16, 12, 1), (resnet18, 16, 4), (resnet50, 16, 37)],
)
def test_torchvisions_networks(make, decomposed, left_alone):
    """Catches convolutions missed or wrongly taken in the networks that users start from."""
    with torch.device("meta"):
        model = make()
    supernet = structured(model, input_size=(3, 64, 64))
    assert len(decomposed_layers(supernet)) == len(report(supernet).layers) == decomposed
    assert len(report(supernet).left_alone) == left_alone
    kept = {
        name: module for name, module in supernet.named_modules() if isinstance(module, nn.Conv2d)
    }
    assert kept.keys() == report(supernet).left_alone.keys()


def test_a_decomposed_resnet_runs_and_trains():
    """Catches a layer that fits the shapes and breaks in the network: residual sums, strides,
    gradients of every first term."""
    supernet = structured(resnet18(num_classes=5), (1, 4))
    set_configuration(supernet, (1, 4) * 8)
    F.cross_entropy(supernet(torch.randn(2, 3, 32, 32)), torch.tensor([0, 4])).backward()
    assert all(
        layer.grouped[0].grad.abs().sum() > 0 for layer in decomposed_layers(supernet).values()
    )


class OwnForward(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return -super().forward(input)


def hooked(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_forward_hook(lambda module, args, output: -output)
    return conv


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 1), "1×1"),
        (nn.Conv2d(4, 4, 3, groups=4), "depthwise"),
        (nn.Conv2d(4, 4, 3, groups=2), "grouped already, 2 groups"),
        (OwnForward(4, 4, 3), "OwnForward has a forward of its own"),
        (hooked(nn.Conv2d(4, 4, 3)), "it has hooks, which the layer in its place would lose"),
        (nn.Conv2d(5, 5, 3), "none of the group sizes fits its width 5→5"),
    ],
)
def test_what_cannot_be_decomposed_is_left_alone_or_refused_by_name(conv, reason):
    """Catches a replacement that computes something else than what it replaces, and silence about
    it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), conv)
    supernet = structured(model, (2, 4))
    assert type(supernet[2]) is type(conv)
    assert report(supernet).left_alone == {"0": "the first convolution", "2": reason}
    with pytest.raises(ValueError, match=r"'2'"):
        structured(model, {"2": (2, 4)})


def test_skip_takes_names_of_convolutions_and_of_modules_around_them():
    """Catches a prefix that matches "block10" for "block1", and a default that cannot be turned
    off."""
    model = nn.ModuleDict({f"block{i}": nn.Sequential(nn.Conv2d(4, 4, 3)) for i in (1, 10)})
    assert list(decomposed_layers(structured(model, (1, 2)))) == ["block10.0"]
    assert list(decomposed_layers(structured(model, (1, 2), skip=()))) == ["block1.0", "block10.0"]
    assert list(decomposed_layers(structured(model, (1, 2), skip=["block1"]))) == ["block10.0"]
    named = {"block1.0": (1, 2), "block10.0": (1, 2)}
    assert list(decomposed_layers(structured(model, named, skip=["block10"]))) == ["block1.0"]


def test_each_layer_takes_the_sizes_that_fit_its_two_widths():
    """Catches sizes tested against one width alone: 24 → 36 in groups of 2 would be 12 groups of 3,
    of 1 would be 24 of 1.5."""
    model = stack(nn.Conv2d(24, 36, 3), nn.Conv2d(36, 12, 3))
    supernet = structured(model, (1, 2, 4, 16), width={"1": (24, 36)})
    assert supernet[1].group_sizes == (2, 4)
    assert supernet[2].group_sizes == (1, 2, 4)
    assert supernet[1].width == (24, 36)
    assert supernet[2].width == (12, 12)


@pytest.mark.parametrize("method", ["als", "random"])
def test_a_mapping_gives_each_layer_its_own_sizes_and_width(method):
    """Catches sizes of one layer given to another, layers decomposed that were not named, and a
    width that the fit ignores."""
    model = stack(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    sizes = {"1": (1, 8), "3": (2, 6)}
    supernet = decompose(model, sizes, width={"3": (6, 9)}, method=method, sweeps=2, quiet=True)
    assert {name: layer.group_sizes for name, layer in decomposed_layers(supernet).items()} == {
        "1": (1, 8),
        "3": (2, 6),
    }
    assert supernet[3].width == (6, 9)
    assert report(supernet).left_alone["2"] == "not named in group_sizes"


# Bad input --------------------------------------------------------------------------------------


def with_weight(value: float) -> nn.Module:
    model = stack(nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model[1].weight[1, 2, 0, 0] = value
    return model


def on_meta() -> nn.Module:
    return stack(nn.Conv2d(4, 4, 3)).to("meta")


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3)), {}, "Sequential without any nn.Conv2d"),
        (
            stack(nn.Conv2d(4, 4, 3)),
            {"group_sizes": (3, 9)},
            r"group_sizes=\(3, 9\).*none of the group sizes fits its width 4→4: 1",
        ),
        (stack(nn.Conv2d(4, 4, 3)), {"group_sizes": (2, 3)}, "each divides the next"),
        (stack(nn.Conv2d(4, 4, 3)), {"group_sizes": ()}, "got 0 group sizes"),
        (
            stack(nn.Conv2d(4, 4, 3)),
            {"group_sizes": {"1": (2, 3)}},
            r"group_sizes\['1'\]: got group size 3",
        ),
        (stack(nn.Conv2d(4, 4, 3)), {"group_sizes": {"body.1": (2,)}}, r"got 'body.1', .*such as"),
        (stack(nn.Conv2d(4, 4, 3)), {"width": {"2": 4}}, r"width: got '2'"),
        (stack(nn.Conv2d(4, 4, 3)), {"width": 0}, "width: got 0"),
        (stack(nn.Conv2d(4, 4, 3)), {"width": {"1": (4, 0)}}, r"width\['1'\]\[1\]: got 0"),
        (stack(nn.Conv2d(4, 4, 3)), {"skip": ["2"]}, r"skip: got '2'"),
        (
            stack(nn.Conv2d(4, 4, 3)),
            {"method": "svd"},
            r"method: got 'svd', accepted is one of 'als', 'random'",
        ),
        (stack(nn.LazyConv2d(4, 3)), {}, "not initialised yet"),
        (with_weight(float("nan")), {}, r"weight of '1' that is not finite"),
        (with_weight(float("inf")), {}, r"weight of '1' that is not finite"),
        (on_meta(), {}, r"'1' on the meta device, .*method='random'"),
    ],
)
def test_bad_input_is_refused_before_any_work_and_named(model, arguments, message):
    """Catches an error minutes into the fit, or one that does not say which layer or argument is
    wrong."""
    with pytest.raises(ValueError, match=message):
        decompose(model, **arguments)


def test_wrong_types_are_refused():
    """Catches a string taken for a collection of one-letter names, and a state dict taken for a
    model."""
    with pytest.raises(TypeError, match="skip"):
        decompose(stack(nn.Conv2d(4, 4, 3)), skip="0")
    with pytest.raises(TypeError, match="model: got OrderedDict"):
        decompose(nn.Conv2d(3, 4, 3).state_dict())


# Report, progress, package ----------------------------------------------------------------------


def test_the_report_says_what_was_done():
    """Catches errors of one layer beside another, and counts that are not those of the exported
    bottleneck."""
    model = stack(nn.Conv2d(4, 8, 3, stride=2, bias=False), nn.Conv2d(8, 8, 3, padding=1))
    supernet = decompose(
        model, (1, 2, 8), sweeps=5, input_size=(3, 9, 9), keep_costlier=True, quiet=True
    )
    decomposition = report(supernet)
    first, second = decomposition.layers
    assert (first.name, first.group_sizes, first.stride) == ("1", (1, 2), (2, 2))
    assert (first.parameters_before, first.macs_before) == (8 * 4 * 9, 4 * 4 * 8 * 4 * 9)
    assert second.errors[0] > second.errors[1] > second.errors[2]
    assert second.errors[2] < 1e-5
    assert first.seconds > 0
    for layer, side in ((first, 9), (second, 4)):
        kernel = model.get_submodule(layer.name).weight.detach()
        for size, error, parameters, macs in zip(
            layer.group_sizes, layer.errors, layer.parameters, layer.macs, strict=True
        ):
            folded = supernet.get_submodule(layer.name).fold(size)
            p, r, q = (convolution.weight.detach() for convolution in folded)
            r = expand(r, len(p), len(p))
            approximation = torch.einsum("uo,oikl,it->utkl", q[..., 0, 0], r, p[..., 0, 0])
            assert error == pytest.approx(
                ((kernel - approximation).norm() / kernel.norm()).item(), abs=1e-5
            )
            assert parameters == sum(parameter.numel() for parameter in folded.parameters())
            assert macs == gross.macs(folded, (layer.in_channels, side, side)).total
    assert decomposition.parameters_before == sum(p.numel() for p in model.parameters())
    assert decomposition.parameters == sum(p.numel() for p in supernet.parameters())
    printed = str(decomposition)
    assert all(
        text in printed
        for text in ("4→8 3×3 /2", "1 2 8", ".000", "left alone, the first convolution: 0")
    )


def test_quiet_prints_nothing_and_otherwise_progress_and_report_go_to_the_error_stream(capsys):
    """Catches a library that writes into a program's output, and a fit of minutes without a sign of
    life."""
    model = stack(nn.Conv2d(4, 4, 3))
    decompose(model, (1, 2), sweeps=2, quiet=True)
    assert capsys.readouterr() == ("", "")
    decompose(model, (1, 2), sweeps=2)
    output, errors = capsys.readouterr()
    assert output == ""
    assert "1/1" in errors
    assert "1 convolutions decomposed" in errors


def test_importing_gross_imports_none_of_the_optional_libraries():
    """Catches an import at the top of a file that makes every user install everything, and a
    function whose name a package has taken."""
    script = """
import sys
before = set(sys.modules)
import gross
new = {name.partition(".")[0] for name in set(sys.modules) - before}
optional = {"torchvision", "tensorly", "sklearn", "safetensors", "typer", "rich", "matplotlib"}
assert not new & optional, new
import types
assert isinstance(gross.decompose, types.FunctionType)
assert isinstance(gross.macs, types.FunctionType)
assert gross.decomposition.block_term.block_term_series is gross.decomposition.block_term_series
assert gross.decomposition.vbmf.vbmf_group_size
"""
    subprocess.run([sys.executable, "-c", script], check=True)
