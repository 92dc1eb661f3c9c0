"""Structured layers in whole networks: conversion, regularisation, counts, files, export."""

import copy
import json

import gross
import pytest
import torch
import torchvision
import windows as exact
from gross import networks, weights
from gross.cli import app
from gross.copying import copy_model
from gross.structured import plan
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from gross_kernels import CompositeBasis, StructuredConv2d, StructuredLinear


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 3, padding=1, groups=3),
        nn.Conv2d(12, 4, 1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def dense_again(network: nn.Module) -> nn.Module:
    """The network with the dense layers that its structured ones equal."""
    layers = plan.structured_layers(network).values()
    dense = {id(layer): layer.to_dense() for layer in layers}
    return copy_model(network, dense, with_attributes=False).eval()


def test_resnet18_has_the_published_size():
    """Catches layers that are left out or structured otherwise: {C, 2} on every 3×3."""
    with torch.device("meta"):
        network = torchvision.models.resnet18()
    structured = gross.structured.decompose(
        network, (None, 2), input_size=(3, 224, 224), quiet=True
    )
    assert sum(p.numel() for p in structured.parameters()) == 5_586_472
    layers = gross.macs(structured, (3, 224, 224)).layers
    counted = sum(layer.total for layer in layers if layer.kind != "BatchNorm2d")
    assert counted == 882_806_784
    report = structured.structured_report
    assert len(report.layers) == 16
    assert (report.parameters_before, report.parameters) == (11_689_512, 5_586_472)
    assert report.macs == gross.macs(structured, (3, 224, 224)).total
    assert sum(layer.multiplications for layer in report.layers) == sum(
        layer.total for layer in layers if layer.kind == "StructuredConv2d"
    )
    assert all(layer.residual is None for layer in report.layers)


@pytest.mark.parametrize(
    ("name", "structures", "count"),
    [
        ("resnet18", (None, 2), 16),
        ("resnet50", (0.5, 2), 16),
        ("mobilenet_v2", (None, 2), 17),
        ("mobilenet_v2", (0.5, 1), 51),
        ("efficientnet_b0", (None, 2), 16),
    ],
)
def test_networks_of_torchvision(name, structures, count):
    """Catches a network that is converted to another, or that no longer runs: its outputs are those
    of the network with the composite kernels."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(num_classes=7).double().eval()
    structured = gross.structured.decompose(network, structures, input_size=(3, 64, 64), quiet=True)
    report = structured.structured_report
    assert len(report.layers) == count
    assert report.parameters < report.parameters_before
    assert report.macs < report.macs_before
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(structured(images), dense_again(structured)(images))
    text = str(report)
    assert report.layers[0].name in text
    assert "left alone, the first convolution" in text


def test_a_structured_network_is_converted_without_loss():
    """Catches a conversion that loses something where nothing need be lost."""
    network = gross.structured.decompose(
        small().double().eval(), {"2": (5, 2), "4": (2, (1, 3)), "7": 30}, quiet=True
    )
    again = gross.structured.decompose(
        dense_again(network), {"2": (5, 2), "4": (2, (1, 3)), "7": 30}, quiet=True
    )
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(again(images), network(images))
    assert max(layer.residual for layer in again.structured_report.layers) < 1e-14


def test_the_report():
    """Catches counts of another layer, or of one call in place of all."""
    network = nn.Sequential(small(), nn.Identity())
    twice = nn.Sequential(network[0][2], nn.Conv2d(12, 8, 1), network[0][2])
    converted = gross.structured.decompose(
        twice, {"0": (8, 2)}, example=torch.randn(3, 8, 16, 16), quiet=True
    )
    (layer,) = converted.structured_report.layers
    one = [StructuredConv2d(8, 12, 3, 2, 1, bias=False, structure=(8, 2)).operations(n)
           for n in (16, 8)]  # fmt: skip
    assert layer.multiplications == 3 * sum(small.multiplications for small, _ in one)
    assert layer.additions == 3 * sum(small.additions for small, _ in one)
    assert layer.multiplications_before == 3 * sum(large.multiplications for _, large in one)
    assert layer.additions_before == 3 * sum(large.additions for _, large in one)
    assert (layer.parameters_before, layer.parameters) == (8 * 12 * 9, 8 * 12 * 4)
    assert (layer.kind, layer.kernel, layer.structure) == ("Conv2d", (8, 3, 3), (8, 2, 2))


def test_a_network_that_is_structured_in_two_turns():
    """Catches a second report that forgets the first layers, or lists a layer twice."""
    once = gross.structured.decompose(small(), {"2": (8, 2)}, input_size=(3, 8, 8), quiet=True)
    twice = gross.structured.decompose(once, {"4": (2, 2)}, input_size=(3, 8, 8), quiet=True)
    report = twice.structured_report
    assert [layer.name for layer in report.layers] == ["2", "4"]
    assert report.parameters_before == sum(p.numel() for p in small().parameters())
    assert report.macs_before == gross.macs(small(), (3, 8, 8)).total


def test_what_is_left_alone_and_why():
    """Catches a layer that is changed without being asked for, or a reason that is another's."""
    network = small()
    network[4].register_forward_hook(lambda *_: None)
    converted = gross.structured.decompose(network, (None, 2), quiet=True)
    assert list(plan.structured_layers(converted)) == ["2"]
    assert converted.structured_report.left_alone == {
        "0": "the first convolution",
        "4": "it has hooks, which the layer in its place would lose",
        "5": "its kernel of 1×1 is smaller than n = 2",
        "7": "linear layers are structured by name",
    }
    assert isinstance(network[2], nn.Conv2d)
    named = gross.structured.decompose(small(), {"0": (2, 2)}, quiet=True).structured_report
    assert named.left_alone["2"] == "not named in structures"
    skipped = gross.structured.decompose(small(), (4, 2), skip=["2"], quiet=True).structured_report
    assert [layer.name for layer in skipped.layers] == ["4"]
    assert skipped.left_alone["0"] == "its 3 channels are fewer than c = 4"
    assert skipped.left_alone["2"] == "named in skip"
    shared = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match=r"'1' cannot be structured: its weight is shared"):
        gross.structured.decompose(shared, {"1": (2, 2)}, quiet=True)


BAD = [
    ({"2": (9, 2)}, r"structures\['2'\]: got \(9, 2\), accepted is \(c, n\) with c of 1 to 8 .* 3"),
    ({"2": (8, 4)}, r"structures\['2'\]: got .* n of 1 to 3"),
    ({"4": (5, 2)}, r"structures\['4'\]: got .* c of 1 to 4"),
    ({"5": (4, 2)}, r"structures\['5'\]: got .* n of 1 to 1"),
    ({"7": 65}, r"structures\['7'\]: got 65, accepted is an int of 1 to 64"),
    ({"7": (8, 2)}, r"structures\['7'\]: got"),
    ({"2": (1.5, 2)}, r"structures\['2'\]: got 1.5, accepted is a share"),
    ({"2": 4}, r"structures\['2'\]: got 4, accepted is \(c, n\)"),
    ({"22": (4, 2)}, "structures: got '22', accepted are names"),
    ({}, "structures: got no names"),
    ((9, 9), r"model: got Sequential .* none can be structured as \(9, 9\); accepted"),
    ((None, 0), "structures: got 0, accepted is"),
    ((0, 2), "structures: got 0, accepted is"),
    ((2.0, 2), "structures: got 2.0, accepted is a share"),
    ("42", "structures: got '42', accepted is"),
    (2, "structures: got .*, accepted is"),
]


@pytest.mark.parametrize(("structures", "message"), BAD)
@pytest.mark.parametrize("function", [gross.structured.decompose, gross.structured.regularizer])
def test_structures_that_do_not_fit(function, structures, message):
    """Catches an error that does not name the layer and what fits it."""
    options = {"quiet": True} if function is gross.structured.decompose else {}
    with pytest.raises((TypeError, ValueError), match=message):
        function(small(), structures, **options)


def test_weights_that_are_not_finite():
    """Catches a projection of NaN."""
    network = small()
    network[2].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="'2' that is not finite"):
        gross.structured.decompose(network, (None, 2), quiet=True)


# Regularisation ----------------------------------------------------------------------------------


def by_matrices(network: nn.Module, structures: dict[str, tuple]) -> Tensor:
    """Σ ‖(I − A A⁺)W‖/‖W‖ with the matrices of the cuboids."""
    total = torch.zeros((), dtype=torch.float64)
    for name, structure in structures.items():
        weight = network.get_submodule(name).weight
        basis = CompositeBasis(exact.cuboids(weight.shape[1:], structure))
        columns = weight.double().flatten(1).T
        rest = columns - basis.matrix @ (basis.pseudo_inverse @ columns)
        total = total + rest.norm() / columns.norm()
    return total


def test_the_regularizer_is_the_sum_over_layers():
    """Catches another norm, a layer too many or too few, a weight that is not applied, and a
    gradient that is not the sum's."""
    network = small().double()
    structures = {"2": (5, 2, 2), "4": (2, 1, 3), "7": (30,)}
    asked = {"2": (5, 2), "4": (2, (1, 3)), "7": 30}
    penalty = gross.structured.regularizer(network, asked, weight=0.25)
    expected = 0.25 * by_matrices(network, structures)
    torch.testing.assert_close(penalty(), expected)
    weights = [network.get_submodule(name).weight for name in structures]
    torch.testing.assert_close(
        torch.autograd.grad(penalty(), weights), torch.autograd.grad(expected, weights)
    )
    assert sum(penalty.residuals().values()) * 0.25 == pytest.approx(expected.item())
    assert penalty.left_alone["0"] == "not named in structures"


def test_regularised_layers_are_those_that_are_decomposed():
    """Catches a network that is trained towards other structures than it gets."""
    network = small()
    penalty = gross.structured.regularizer(network, (None, 2))
    report = gross.structured.decompose(network, (None, 2), quiet=True).structured_report
    assert penalty.left_alone == report.left_alone
    assert penalty.residuals() == pytest.approx({x.name: x.residual for x in report.layers})


def test_training_makes_kernels_structured():
    """Catches a penalty without effect in gross.train, and one that is not part of its loss."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 5) for _ in range(4)
    ]
    losses, residuals = [], []
    for weight in (0.0, 5.0):
        network = small()
        penalty = gross.structured.regularizer(network, (None, 2), weight=weight)
        history = gross.train(
            network, batches, regularizer=penalty, epochs=12, quiet=True, seed=1,
            **{"optimizer.lr": 0.02},
        )  # fmt: skip
        losses.append(history.epochs[0]["loss"])
        residuals.append(max(penalty.residuals().values()))
    assert residuals[1] < 0.3 < residuals[0]
    assert losses[1] > losses[0] + 1


def test_another_regularizer_is_another_run(tmp_path):
    """Catches a run that goes on with another loss than it began with."""
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    network = small()
    penalty = gross.structured.regularizer(network, (None, 2), weight=0.1)
    gross.train(network, batches, regularizer=penalty, epochs=1, directory=tmp_path, quiet=True)
    other = gross.structured.regularizer(network, (None, 2), weight=0.2)
    with pytest.raises(ValueError, match=r"resume: .* regularizer"):
        gross.train(
            network, batches, regularizer=other, epochs=1, directory=tmp_path, resume=True,
            quiet=True,
        )  # fmt: skip
    with pytest.raises(TypeError, match="regularizer: got"):
        gross.train(network, batches, regularizer=3, epochs=1, quiet=True)


# Files, counts, export ---------------------------------------------------------------------------


def test_a_file_gives_the_network_back(tmp_path):
    """Catches a structure, a weight or the report that is lost on disk."""
    network = gross.structured.decompose(
        small().eval(), {"2": (5, 2), "7": 30}, input_size=(3, 8, 8), quiet=True
    )
    path = tmp_path / "structured.safetensors"
    gross.save(network, path)
    with pytest.raises(ValueError, match="needed is model"):
        gross.load(path)
    again = gross.load(path, small()).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(images), network(images))
    assert again.structured_report == network.structured_report
    assert isinstance(again[7], StructuredLinear)
    assert gross.macs(again, (3, 8, 8)).total == network.structured_report.macs
    assert torch.equal(gross.load(path, again).eval()(images), network(images))
    other = gross.structured.decompose(small(), {"2": (4, 2), "7": 30}, quiet=True)
    with pytest.raises(ValueError, match=r"layer '2' is \(4, 2, 2\), and \(5, 2, 2\) in the file"):
        gross.load(path, other)


def test_a_network_can_have_both_kinds_of_layers(tmp_path):
    """Catches one conversion that undoes, miscounts or forgets the other."""
    torch.manual_seed(0)
    network = gross.networks.build("4-layer").eval()
    supernet = gross.decompose(network, {"features.3": (1, 4)}, quiet=True)
    both = gross.structured.decompose(supernet, {"features.9": (32, 2), "classifier.0": 64},
                                      quiet=True).eval()  # fmt: skip
    gross.set_configuration(both, 4)
    path = tmp_path / "both.safetensors"
    gross.save(both, path)
    again = gross.load(path).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), both(images))
    for kernels in (True, False):
        deployed = gross.export(both, example=images, kernels=kernels)
        with torch.inference_mode():
            torch.testing.assert_close(deployed(images), both(images), rtol=1e-3, atol=1e-4)
        assert isinstance(deployed, nn.Module)


@pytest.mark.parametrize("kernels", [True, False])
def test_exported_networks_compute_the_same(kernels):
    """Catches a structured layer that an export takes for another, or cannot run."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=5).eval()
    structured = gross.structured.decompose(network, (None, 2), quiet=True)
    images = torch.randn(2, 3, 64, 64)
    deployed = gross.export(structured, example=images, kernels=kernels)
    with torch.inference_mode():
        expected = structured(images)
        torch.testing.assert_close(deployed(images), expected, rtol=1e-3, atol=1e-3)
    if kernels:
        kinds = [row.choice for row in deployed.report.steps]
        assert kinds.count("convolution") == 20
        assert set(deployed.report.left.values()) == {
            "a sum-pooling, which is an operator of its own between programs"
        }


def test_a_structured_network_is_copied_and_trains():
    """Catches layers that lose their parameters' attributes, or do not learn."""
    network = small()
    network[2].weight.lr_mult = 3
    network[4].weight.requires_grad_(False)
    structured = gross.structured.decompose(network, (None, 2), quiet=True)
    assert structured[2].weight.lr_mult == 3
    assert not structured[4].weight.requires_grad
    twin = copy.deepcopy(structured)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], 0.05)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(twin(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# On the command line -----------------------------------------------------------------------------


def gross_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_whole_journey_on_the_command_line(tmp_path):
    """Catches options that do not reach the regulariser or the conversion, and files that the next
    command does not take."""
    few = ("--set", "epochs=1", "--seed", 3)
    run = tmp_path / "dense"
    weighted = ("--structure", "all,2", "--structural-weight", 20)
    result = gross_command("train", "4-layer", "-o", run, *few, *weighted)
    assert result.exit_code == 0, result.output
    assert "(weight=20.0, structures={'features.3': (32, 2, 2)" in (run / "run.json").read_text()
    trained = run / "model.safetensors"
    path = tmp_path / "structured.safetensors"
    options = ("-w", trained, "-o", path, "--structure", "all,2")
    result = gross_command("decompose", "4-layer", *options)
    assert result.exit_code == 0, result.output
    assert "3 layers structured" in result.stderr
    model = networks.build("4-layer", weights=trained)
    expected = gross.structured.decompose(model, (None, 2), quiet=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(gross.load(path).eval()(images), expected(images))
    residuals = gross.structured.regularizer(model, (None, 2)).residuals().values()
    assert max(residuals) < 0.7  # of fresh weights it is 0.745
    description = json.loads(gross_command("info", path, "--json").stdout)
    assert description["structured"] == {
        "features.3": [32, 2, 2], "features.6": [32, 2, 2], "features.9": [64, 2, 2],
    }  # fmt: skip
    assert "64×2×2" in gross_command("info", path).stdout
    counted = json.loads(gross_command("macs", path, "--json").stdout)["total"]
    assert counted == gross.macs(expected, (3, 32, 32)).total
    tuned = tmp_path / "tuned"
    result = gross_command("train", path, "-o", tuned, *few)
    assert result.exit_code == 0, result.output
    again = gross.load(tuned / "model.safetensors")
    assert list(plan.structured_layers(again)) == list(description["structured"])
    assert not torch.equal(again.features[3].weight, gross.load(path).features[3].weight)
    assert weights.read(trained)["features.3.weight"].shape == (32, 32, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "4-layer", "-o", "x", "--structure", "all,2"), "both or neither"),
        (("train", "4-layer", "-o", "x", "--structural-weight", "1"), "both or neither"),
        (("decompose", "4-layer", "-o", "x", "--structure", "2"), "accepted is C,N"),
        (
            ("decompose", "4-layer", "-o", "x", "--structure", "8,2", "--group-sizes", "1"),
            "accepted is one of both",
        ),
    ],
)
def test_options_that_do_not_fit_one_another(arguments, message, tmp_path, monkeypatch):
    """Catches an option that is ignored in silence."""
    monkeypatch.chdir(tmp_path)
    result = gross_command(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
