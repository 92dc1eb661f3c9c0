"""The ``gross`` command: what it prints where, what it writes, and its exit status."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import gross.__main__
import pytest
import torch
from gross import networks
from gross.cli import app
from gross.cli.app import EXAMPLE
from gross.decomposition import decompose
from gross.supernet import decomposed_layers
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]


def gross_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def output(tmp_path):
    return tmp_path / "supernet.safetensors"


def test_decompose_fits_a_users_weights_and_saves_the_supernet(tmp_path, output):
    """Catches an option that does not reach the fit, weights that are not loaded, and progress on
    the output stream."""
    model = networks.build("4-layer", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "trained.pth")
    arguments = (
        "--weights",
        tmp_path / "trained.pth",
        "--num-classes",
        3,
        "--group-sizes",
        "1,32",
        "--sweeps",
        1,
    )
    result = gross_command(
        "decompose",
        "4-layer",
        "--output",
        output,
        *arguments,
        "--skip",
        "features.9",
        "--keep-costlier",
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["saved", str(output)]
    assert "left alone" in result.stderr
    supernet = gross.load(output)
    layers = decomposed_layers(supernet)
    # The first convolution is not skipped where others are, but its three channels are too few.
    assert "features.0" in result.stderr.partition("would keep 3 of")[2]
    assert {name: layer.group_sizes for name, layer in layers.items()} == {
        "features.3": (1, 32),
        "features.6": (1, 32),
    }
    # At group size 32 the second layer is exact.
    image = torch.randn(1, 32, 8, 8)
    torch.testing.assert_close(
        layers["features.3"](image), model.features[3](image), rtol=1e-3, atol=1e-4
    )


def test_decompose_gives_the_papers_structure_by_default_and_json_on_request(output):
    """Catches text among the JSON, and the paper's networks decomposed in another structure than
    the paper's."""
    result = gross_command("decompose", "4-layer", "-o", output, "--method", "random", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert result.stderr == ""
    assert content["output"] == str(output)
    assert {
        name: tuple(layer["group_sizes"]) for name, layer in content["layers"].items()
    } == networks.structure("4-layer")["group_sizes"]
    assert content["provenance"]["network"] == "4-layer"
    assert content["decomposition"]["layers"][0]["macs_before"] == 16 * 16 * 32 * (32 * 9 + 1)


def test_macs_counts_a_network_a_configuration_and_a_saved_supernet(output):
    """Catches a target taken for another kind, and a configuration that is not passed on."""
    assert json.loads(gross_command("macs", "4-layer", "--json").stdout)["total"] == 5_127_680
    content = json.loads(
        gross_command("macs", "4-layer", "--configuration", "16,8,16", "--json").stdout
    )
    assert (content["total"], content["grouped"], content["configuration"]) == (
        3_325_440,
        1_474_560,
        [16, 8, 16],
    )
    gross_command("decompose", "4-layer", "-o", output, "--method", "random", "--json")
    printed = gross_command("macs", output, "--configuration", "1,1,1")
    assert printed.exit_code == 0
    assert "1,952,256" in printed.stdout


def test_networks_of_the_user_are_taken_as_module_and_function(output):
    """Catches a command that serves the paper's networks alone."""
    network = "torchvision.models:squeezenet1_1"
    result = gross_command(
        "decompose", network, "-o", output, "--method", "random", "--width", "16,32", "--json"
    )
    assert result.exit_code == 0, result.output
    assert {tuple(layer["width"]) for layer in json.loads(result.stdout)["layers"].values()} == {
        (16, 32)
    }
    counted = gross_command("macs", network, "--input-size", "3,64,64", "--json")
    assert json.loads(counted.stdout)["total"] == gross.macs(make_squeezenet(), (3, 64, 64)).total


def make_squeezenet() -> nn.Module:
    from torchvision.models import squeezenet1_1

    return squeezenet1_1()


def test_info_lists_networks_and_says_what_a_file_is(output):
    """Catches numbers that do not belong to their network, and a saved supernet that cannot be told
    from another."""
    rows = {
        row["network"]: row
        for row in json.loads(gross_command("info", "--json").stdout)["networks"]
    }
    assert rows["4-layer"]["configurations"] == 252
    assert rows["resnet18"]["macs"] == 1_819_040_768
    assert all(name in gross_command("info").stdout for name in networks.NETWORKS)
    gross_command("decompose", "4-layer", "-o", output, "--method", "random", "--json")
    assert json.loads(gross_command("info", output, "--json").stdout)["network"] == ["4-layer", 10]
    printed = gross_command("info", output).stdout
    assert all(
        text in printed
        for text in ("supernet of 4-layer", "features.9", "1 2 4 8 16 32 64", "created")
    )


@pytest.mark.parametrize("command", [[], ["decompose"], ["macs"], ["info"]])
def test_help_is_worth_reading(command):
    """Catches an option without a word, and help that does not say how to call the command."""
    result = gross_command(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    if command in (["decompose"], ["macs"]):
        assert "Example: gross" in result.stdout
        assert "vgg16-cifar" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["decompose", "5-layer", "-o", "OUTPUT"], 2, "5-layer"),
        (["decompose", "4-layer"], 2, "--output"),
        (["decompose", "4-layer", "-o", "absent/supernet.safetensors"], 2, "folder that exists"),
        (["decompose", "4-layer", "-o", "OUTPUT", "--group-sizes", "1;4"], 2, "ints with commas"),
        (["decompose", "4-layer", "-o", "OUTPUT", "--method", "svd"], 2, "svd"),
        (
            ["decompose", "4-layer", "-o", "OUTPUT", "--weights", "absent.pth"],
            1,
            "no file at absent.pth",
        ),
        (
            ["decompose", "4-layer", "-o", "OUTPUT", "--group-sizes", "3,9"],
            1,
            "none of the group sizes fits",
        ),
        (["macs", "4-layer", "--configuration", "1,2,3"], 1, "got 3 for decomposed layer 2"),
        (["macs", "torchvision.models:squeezenet1_1"], 2, "--input-size"),
        (["macs", "torchvision.models:squeezenet9"], 2, "no attribute"),
        (["macs", "builtins:dict"], 2, "returns dict"),
        (["info", "absent.safetensors"], 1, "no file at absent.safetensors"),
        (["search"], 2, "search"),
    ],
)
def test_failures_have_a_status_and_one_reason_on_the_error_stream(
    output, arguments, status, message
):
    """Catches a traceback in place of a reason, success after a failure, and a wrong command line
    reported as failed work."""
    result = gross_command(
        *[output if argument == "OUTPUT" else argument for argument in arguments]
    )
    assert result.exit_code == status, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not output.exists()


def test_the_networks_that_help_names_are_ones_that_work(output):
    """Catches an example in the help that fails (MobileNetV2 has nothing to decompose)."""
    assert EXAMPLE in " ".join(gross_command("decompose", "--help").stdout.split())
    result = gross_command("decompose", EXAMPLE, "-o", output, "--method", "random", "--json")
    assert result.exit_code == 0, result.output
    refused = gross_command("decompose", "torchvision.models:mobilenet_v2", "-o", output)
    assert refused.exit_code == 1
    assert "none can be decomposed" in refused.stderr


def test_macs_reads_what_decompose_wrote_of_a_users_network(output, tmp_path, monkeypatch):
    """Catches a file that the command itself wrote and cannot read: the network is not one of the
    paper's, but the file says which function made it."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    made = gross_command("decompose", "mine:net", "-o", output, "--sweeps", "1")
    assert made.exit_code == 0, made.output
    size = ("--input-size", "3,16,16", "--json")
    counted = json.loads(gross_command("macs", output, *size).stdout)
    assert counted["configuration"] == [4]
    one = json.loads(gross_command("macs", output, "--configuration", "1", *size).stdout)
    assert counted["grouped"] == 4 * one["grouped"] == 4 * 12 * 12 * 16 * 9
    # A file that does not say it, or says something else, is helped by the command line.
    gross.save(gross.load(output, mine_net()), output)
    assert "needed is model" in gross_command("macs", output, *size).stderr
    helped = gross_command("macs", output, "--network", "mine:net", *size)
    assert json.loads(helped.stdout)["total"] == counted["total"]


def mine_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))


def test_without_its_libraries_the_command_says_so_in_one_line_and_exits_with_1(tmp_path):
    """Catches a traceback where the extra is not installed; and ``python -m gross`` that is no
    command."""
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(name='typer')\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "gross", "--help"]
    without, whole = (
        subprocess.run(
            command, env=os.environ | {"PYTHONPATH": each}, capture_output=True, text=True
        )
        for each in (path, os.pathsep.join(sys.path))
    )
    assert (without.returncode, without.stdout) == (1, "")
    (line,) = without.stderr.splitlines()
    assert "pip install gross-kernels[gross]" in line
    assert (whole.returncode, whole.stderr) == (0, "")
    assert "Usage: gross" in whole.stdout


def test_the_command_is_installed_under_its_name():
    """Catches an entry point that names something else than the function that guards the
    imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["gross"].partition(":")
    assert getattr(importlib.import_module(module), function) is gross.__main__.main


def test_decompose_calibrates_on_training_images(tmp_path, output, monkeypatch):
    """Catches a calibration that does not reach the fit, another number of images than was asked
    for, and a colon of the path taken for the count's."""
    seen = []

    def watch(model, sizes, *, calibration, **options):
        seen.append(calibration)
        return decompose(model, sizes, calibration=calibration, **options)

    monkeypatch.setattr("gross.cli.decompose.decompose", watch)
    folder = tmp_path / "photos"
    for part in ("train", "test"):
        (folder / part / "cat").mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / part / "cat" / f"{number}.png")
    for data, shape in {
        "digits:40": (40, 3, 32, 32),
        f"folder:{folder}:3": (3, 3, 32, 32),
    }.items():
        result = gross_command(
            *("decompose", "4-layer", "-o", output, "--sweeps", 1, "--group-sizes", "1"),
            *("--skip", "features.6", "--skip", "features.9", "--calibration", data),
        )
        assert result.exit_code == 0, result.output
        assert "response error" in result.stderr
        assert seen[-1].shape == shape
        about = json.loads(gross_command("info", output, "--json").stdout)
        assert about["provenance"]["calibration"] == data


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        ("digits:0", 2, "got 'digits:0', accepted is a COUNT of at least 1"),
        ("digits:2000", 1, "got 2000 images of 'digits', accepted are at most 1184"),
        ("numbers", 1, "got 'numbers', accepted are 'digits', 'cifar10' and 'folder:PATH'"),
        ("folder:nowhere", 1, "no folder at nowhere"),
        ("folder:", 1, "got 'folder:', accepted are"),
    ],
)
def test_calibration_data_that_do_not_fit_are_named(data, status, message, output):
    """Catches a calibration on fewer images than were asked for, and a traceback."""
    result = gross_command("decompose", "4-layer", "-o", output, "--calibration", data)
    assert result.exit_code == status
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not output.exists()
