"""Saving and loading supernets: what comes back, what is refused, and that nothing is half-written
or half-loaded."""

import copy
import json
import struct
from pathlib import Path

import gross
import pytest
import safetensors.torch
import torch
from gross import networks, storage
from gross.storage import describe
from gross.supernet import configuration, decomposed_layers, set_configuration
from torch import nn
from torchvision.models import resnet18


def small(channels: int = 4, stride: int = 1) -> nn.Module:
    """A network that ``gross.networks`` does not know."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3),
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, 4, 3, stride=stride),
    )


def supernet(model: nn.Module | None = None, group_sizes: tuple[int, ...] = (1, 2, 4)) -> nn.Module:
    return gross.decompose(
        small() if model is None else model,
        group_sizes,
        method="random",
        keep_costlier=True,
        quiet=True,
    )


@pytest.fixture
def four_layer() -> nn.Module:
    return supernet(networks.build("4-layer", num_classes=5), (2, 8, 32))


def equal(a: nn.Module, b: nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        value.dtype == states[1][name].dtype and torch.equal(value, states[1][name])
        for name, value in states[0].items()
    )


def header(path: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file and where it ends, read without any library."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), 8 + length


def rewrite(path: Path, description: dict | None) -> None:
    """Save the tensors of ``path`` again with another description."""
    tensors = safetensors.torch.load_file(path)
    metadata = None if description is None else {storage.KEY: json.dumps(description)}
    safetensors.torch.save_file(tensors, path, metadata)


# What comes back --------------------------------------------------------------------------------


def test_a_known_network_comes_back_without_its_code(tmp_path, four_layer):
    """Catches a lost configuration, class count or structure, and a tensor that stays on the meta
    device or at its initial value."""
    set_configuration(four_layer, (8, 2, 32))
    gross.save(four_layer, tmp_path / "saved.safetensors")
    loaded = gross.load(tmp_path / "saved.safetensors")
    assert equal(loaded, four_layer)
    assert configuration(loaded) == (8, 2, 32)
    assert repr(loaded) == repr(four_layer)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(image), four_layer.eval()(image))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_the_file_keeps_dtypes(tmp_path, four_layer):
    """Catches weights rounded on their way, or a supernet that comes back twice as large."""
    gross.save(four_layer.to(torch.bfloat16), tmp_path / "saved.safetensors")
    assert equal(gross.load(tmp_path / "saved.safetensors"), four_layer)


@pytest.mark.parametrize("name", ["vgg16-cifar", "resnet18"])
def test_the_papers_networks_are_recognised(tmp_path, name):
    """Catches a comparison that depends on group sizes, class count, weights or the active
    configuration. (VGG-16 for ImageNet is the same code at 0.5 GB a file.)"""
    model = networks.build(name, num_classes=3)
    saved = gross.decompose(model, (1, 4), width=8, method="random", quiet=True)
    gross.save(saved, tmp_path / "saved.safetensors")
    assert describe(tmp_path / "saved.safetensors").network == (name, 3)
    assert equal(gross.load(tmp_path / "saved.safetensors"), saved)


def test_a_look_alike_is_not_recognised(tmp_path):
    """Catches a network taken for the paper's because its tensors have the same shapes: it would
    load and compute something else."""
    model = networks.build("4-layer")
    model.features[1] = nn.GELU()
    gross.save(supernet(model), tmp_path / "saved.safetensors")
    assert describe(tmp_path / "saved.safetensors").network is None
    with pytest.raises(ValueError, match="needed is model"):
        gross.load(tmp_path / "saved.safetensors")


@pytest.mark.parametrize("given", ["dense", "supernet", "partly decomposed"])
def test_any_network_comes_back_into_a_given_model(tmp_path, given):
    """Catches a given model that is changed, or whose weights stay in the result; batch statistics
    are part of the state."""
    model = nn.Sequential(small(), small(), nn.Conv2d(4, 3, 1))[::1]
    model[1][0] = nn.Conv2d(4, 4, 3)
    saved = supernet(model)
    saved(torch.randn(2, 3, 16, 16))
    gross.save(saved, tmp_path / "saved.safetensors")
    into = {
        "dense": model,
        "supernet": supernet(model),
        "partly decomposed": gross.decompose(
            model, {"1.2": (1, 2, 4)}, method="random", quiet=True
        ),
    }[given].eval()
    before = copy.deepcopy(into)
    loaded = gross.load(tmp_path / "saved.safetensors", into)
    assert equal(loaded, saved)
    assert equal(into, before)
    assert not loaded.training


def test_a_given_model_says_the_dtype(tmp_path):
    """Catches a model of which a part comes back in the dtype of the file."""
    saved = supernet()
    gross.save(saved, tmp_path / "saved.safetensors")
    loaded = gross.load(tmp_path / "saved.safetensors", small().double())
    assert equal(loaded, saved.double())


def test_shared_layers_and_tied_weights_come_back_shared(tmp_path):
    """Catches a tied weight stored twice, refused by safetensors, or untied by loading."""
    shared, tied = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    tied.weight = shared.weight
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, shared, tied)
    saved = supernet(model)
    gross.save(saved, tmp_path / "saved.safetensors")
    loaded = gross.load(tmp_path / "saved.safetensors", model)
    assert equal(loaded, saved)
    assert loaded[1] is loaded[2]
    assert loaded[1].grouped[0] is loaded[3].grouped[0]


def test_the_description_says_what_the_file_is(tmp_path, four_layer):
    """Catches a description that other programs cannot read, or that lacks where the supernet is
    from."""
    saved = gross.decompose(
        networks.build("4-layer"), {"features.3": (1, 32)}, sweeps=2, quiet=True
    )
    gross.save(saved, tmp_path / "saved.safetensors", provenance={"data": "digits"})
    metadata, _ = header(tmp_path / "saved.safetensors")
    content = json.loads(metadata["__metadata__"][storage.KEY])
    assert content["network"] == ["4-layer", 10]
    assert content["configuration"] == [32]
    assert content["layers"]["features.3"]["group_sizes"] == [1, 32]
    assert content["provenance"]["data"] == "digits"
    assert content["provenance"]["torch"] == torch.__version__
    report = vars(saved)["decomposition_report"]
    assert describe(tmp_path / "saved.safetensors").decomposition == report
    assert vars(gross.load(tmp_path / "saved.safetensors"))["decomposition_report"] == report


# What is refused --------------------------------------------------------------------------------


def test_truncated_files_are_refused(tmp_path, four_layer):
    """Catches a file cut off by a full disk that loads with the missing tensors at their initial
    values."""
    gross.save(four_layer, tmp_path / "saved.safetensors")
    content = (tmp_path / "saved.safetensors").read_bytes()
    _, end_of_header = header(tmp_path / "saved.safetensors")
    for length in (
        0,
        4,
        8,
        end_of_header - 1,
        end_of_header,
        end_of_header + 100,
        len(content) - 1,
    ):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            gross.load(tmp_path / "cut.safetensors")


def test_foreign_files_are_refused(tmp_path, four_layer):
    """Catches a traceback from a parser, and the pickle of another program being opened."""
    path = tmp_path / "foreign.safetensors"
    with pytest.raises(FileNotFoundError, match=r"foreign\.safetensors"):
        gross.load(path)
    path.write_text("just text")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        gross.load(path)
    torch.save(four_layer.state_dict(), path)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        gross.load(path)
    safetensors.torch.save_file(four_layer.state_dict(), path)
    with pytest.raises(ValueError, match=r"no supernet saved by gross\.save"):
        gross.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99, accepted is 1"),
        ({"layers": None}, r"description\.layers: got NoneType"),
        ({"configuration": [8, 8]}, "got 2 group sizes"),
        ({"configuration": [8, 8, 3]}, "got 3 for decomposed layer 2"),
        ({"network": ["5-layer", 5]}, "'5-layer'"),
        ({"shared": {"features.0.bias": "features.99.bias"}}, "features.99.bias"),
    ],
)
def test_broken_descriptions_are_refused(tmp_path, four_layer, change, message):
    """Catches a KeyError that says nothing about the file."""
    path = tmp_path / "broken.safetensors"
    gross.save(four_layer, path)
    description = json.loads(header(path)[0]["__metadata__"][storage.KEY])
    rewrite(path, {**description, **change})
    with pytest.raises(ValueError, match=message) as error:
        gross.load(path)
    assert "broken.safetensors" in str(error.value)


def test_a_description_that_is_not_json_is_refused(tmp_path, four_layer):
    """Catches a parser's message without the file's name."""
    path = tmp_path / "broken.safetensors"
    safetensors.torch.save_file(four_layer.state_dict(), path, {storage.KEY: "{"})
    with pytest.raises(
        ValueError, match=r"broken\.safetensors is not a supernet that this version can read"
    ):
        gross.load(path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (small(stride=2), "'stride'"),
        (small(channels=8), "8"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "got '2'"),
        (nn.Sequential(*small(), nn.Linear(2, 2)), "missing: 3.weight, 3.bias"),
        (supernet(group_sizes=(1, 2)), "'group_sizes'"),
    ],
)
def test_mismatched_models_are_refused_and_left_as_they_are(tmp_path, other, message):
    """Catches a supernet loaded into another geometry, where every shape agrees, and a model that
    is half the old and half the new."""
    gross.save(supernet(), tmp_path / "saved.safetensors")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        gross.load(tmp_path / "saved.safetensors", other)
    assert "saved.safetensors" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_only_supernets_with_values_are_saved(tmp_path):
    """Catches a file that cannot be loaded again."""
    with pytest.raises(ValueError, match="without decomposed layers"):
        gross.save(small(), tmp_path / "saved.safetensors")
    with torch.device("meta"):
        empty = small()
    with pytest.raises(ValueError, match="without values"):
        gross.save(supernet(empty), tmp_path / "saved.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        gross.save(supernet(), tmp_path / "absent" / "saved.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Catches a file that is overwritten in place: a full disk would destroy the supernet that it
    was to replace."""
    path = tmp_path / "saved.safetensors"
    gross.save(supernet(), path)
    before = path.read_bytes()

    def fails_halfway(tensors: dict, target: Path, metadata: dict) -> None:
        Path(target).write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails_halfway)
    with pytest.raises(OSError, match="no space left"):
        gross.save(supernet(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_resnet_counts_its_decomposed_layers(tmp_path):
    """Catches names that change between a model and its description (torchvision's nested
    blocks)."""
    saved = supernet(resnet18(num_classes=3), (1, 16))
    gross.save(saved, tmp_path / "saved.safetensors")
    assert list(describe(tmp_path / "saved.safetensors").layers) == list(decomposed_layers(saved))
