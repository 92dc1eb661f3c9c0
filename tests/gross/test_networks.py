"""The paper's networks: their definitions (appendix, A.1), initialisation (A.2), structures, and
users' weight files."""

import math
import sys

import gross
import pytest
import torch
from gross.networks import NETWORKS, VGG16_LAYERS, build, input_size, structure
from safetensors.torch import save_file
from torch import nn

from gross_kernels import GroSSConv2d


def build_empty(name: str, **options: int) -> nn.Module:
    with torch.device("meta"):
        return build(name, **options)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Sums over the layers of Tables 1 and 2 of the appendix; those of torchvision's networks
        # are in its documentation.
        ("4-layer", 133_930),
        ("vgg16-cifar", 14_714_688 + 512 * 512 + 512 + 512 * 10 + 10),
        ("vgg16", 138_357_544),
        ("resnet18", 11_689_512),
    ],
)
def test_networks_have_the_layers_of_the_appendix(name, parameters):
    """Catches a layer of a wrong width, a missing bias, a batch norm too many."""
    assert sum(p.numel() for p in build_empty(name).parameters()) == parameters


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_classes", [None, 7])
def test_outputs_are_one_score_per_class(name, num_classes):
    """Catches a classifier that does not fit the features at the network's own input size, or
    ignores ``num_classes``."""
    model = build_empty(name) if num_classes is None else build_empty(name, num_classes=num_classes)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert last.out_features == (num_classes or NETWORKS[name].num_classes)
    assert gross.macs(model, input_size(name)).layers[-1].output_size == (last.out_features,)


def test_initialisation_is_that_of_appendix_a2():
    """Catches "fan in" for "fan out", a standard deviation of 0.01 where the variance is 0.01, and
    biases that are not 0."""
    torch.manual_seed(0)
    for module in build("vgg16-cifar").modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.out_channels * 9))
        elif isinstance(module, nn.Linear):
            expected = 0.1
        else:
            continue
        # The standard deviation of n samples is off by 1/√(2n); five times that.
        assert module.weight.std().item() == pytest.approx(
            expected, rel=5 / math.sqrt(2 * module.weight.numel())
        )
        assert not module.bias.any()


def test_the_narrow_network_keeps_the_variance_of_vgg16():
    """Catches bottlenecks drawn at a layer's own scale, which shrink a signal until VGG-16's depth
    has lost it."""
    torch.manual_seed(0)
    model = build("vgg16-narrow")
    for layer in model.modules():
        if isinstance(layer, GroSSConv2d):
            size = layer.group_sizes[0]
            layer.group_size = size
            with torch.no_grad():
                variance = (
                    layer(torch.randn(4, layer.in_channels, 12, 12))[..., 1:-1, 1:-1].var().item()
                )
            # He's rule in fan-out mode; few channels leave it uncertain by some tens of percent.
            assert variance == pytest.approx(2 * layer.in_channels / layer.out_channels, rel=0.5)
            assert not layer.bias.any()


@pytest.mark.parametrize(
    ("name", "configurations"),
    [("4-layer", 252), ("vgg16-cifar", 4**12), ("vgg16", 4**12), ("resnet18", 4**16)],
)
def test_structures_span_the_papers_search_spaces(name, configurations):
    """Catches a convolution that is missing in a structure, or group sizes that do not fit it
    (section 4.3)."""
    sizes = structure(name)["group_sizes"]
    supernet = gross.decompose(build_empty(name), **structure(name), method="random", quiet=True)
    layers = gross.supernet.decomposed_layers(supernet)
    assert {layer: tuple(module.group_sizes) for layer, module in layers.items()} == sizes
    assert math.prod(map(len, sizes.values())) == configurations


def test_the_narrow_structure_is_table_3_of_the_appendix():
    """Catches a width or group size mistyped in the table, where it would still nest."""
    layers = gross.supernet.decomposed_layers(build_empty("vgg16-narrow"))
    assert tuple(layers) == VGG16_LAYERS
    assert [(*layer.width, *layer.group_sizes) for layer in layers.values()] == [
        (11, 18, 11),
        (10, 24, 5, 10),
        (28, 28, 1, 7, 14, 28),
        (36, 48, 3, 9, 18),
        (60, 48, 15, 30, 60),
        (64, 56, 16, 32, 64),
        (64, 100, 16, 32, 64),
        (116, 100, 29, 58, 116),
        (132, 132, 3, 33, 66),
        (224, 224, 7, 28, 56, 112),
        (224, 224, 7, 28, 56, 112),
        (224, 224, 7, 28, 56, 112),
    ]


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(1)
    return build("4-layer")


@pytest.mark.parametrize("kind", ["pth", "nested.pth", "safetensors"])
def test_weights_load_from_users_files(tmp_path, trained, kind):
    """Catches a format that users have and that is not read, or is read into the wrong layers."""
    path = tmp_path / f"weights.{kind}"
    state = trained.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "nested.pth" else state, path)
    loaded = build("4-layer", weights=path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


class Malicious:
    def __reduce__(self) -> tuple:
        return print, ("code from a weight file was run",)


def test_weight_files_that_cannot_be_used_say_why(tmp_path, trained, capsys):
    """Catches a traceback from deep inside torch, code run from a file, and a model loaded by
    half."""
    good = tmp_path / "good.pth"
    torch.save(trained.state_dict(), good)
    cases = {
        "not a whole file": good.read_bytes()[:-1000],
        "not a whole": b"",
        "torch.save": b"just text",
    }
    for message, content in cases.items():
        path = tmp_path / "broken.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            build("4-layer", weights=path)
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        build("4-layer", weights=tmp_path / "broken.safetensors")
    torch.save({"model": Malicious()}, tmp_path / "malicious.pth")
    with pytest.raises(ValueError, match="weights"):
        build("4-layer", weights=tmp_path / "malicious.pth")
    assert "was run" not in capsys.readouterr().out
    torch.save({"epoch": 3}, tmp_path / "no_tensors.pth")
    with pytest.raises(ValueError, match="no state dict"):
        build("4-layer", weights=tmp_path / "no_tensors.pth")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        build("4-layer", weights=tmp_path / "absent.pth")


def test_weights_of_another_network_are_refused_with_the_differences(tmp_path, trained):
    """Catches ``strict=False``: a network of which a part stays at its initialisation."""
    state = trained.state_dict()
    del state["features.0.bias"]
    state["head.weight"] = torch.zeros(1)
    state["features.3.weight"] = torch.zeros(32, 32, 5, 5)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(
        ValueError,
        match=r"missing: features\.0\.bias.*head\.weight.*features\.3\.weight \(32, 32, 5, 5\)",
    ):
        build("4-layer", weights=tmp_path / "other.pth")


def test_unknown_names_list_the_known_ones():
    """Catches a KeyError in place of help."""
    for function in (build, input_size, structure):
        with pytest.raises(ValueError, match=r"'vgg19'.*'4-layer', 'vgg16-cifar'"):
            function("vgg19")
    with pytest.raises(ValueError, match="num_classes"):
        build("4-layer", num_classes=0)


def test_a_missing_library_is_named_with_the_extra_that_brings_it(monkeypatch):
    """Catches a bare ModuleNotFoundError, which does not say how to mend it."""
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        ImportError, match=r"torchvision\.models.*pip install gross-kernels\[gross\]"
    ):
        build("vgg16")
