"""``gross train`` and ``gross finetune``: what they write, print and refuse."""

import json
import signal
import subprocess
import sys
import time

import gross
import pytest
import torch
from gross import networks, weights
from gross.cli import app
from gross.supernet import configuration
from typer.testing import CliRunner, Result


def gross_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def supernet(tmp_path):
    """A saved supernet, and beside it the weights of the network before."""
    model = networks.build("4-layer")
    torch.save(model.state_dict(), tmp_path / "full.pth")
    path = tmp_path / "supernet.safetensors"
    gross.save(gross.decompose(model, (1, 4, 32), sweeps=1, keep_costlier=True, quiet=True), path)
    return path


def test_train_writes_weights_that_decompose_takes(tmp_path):
    """Catches weights that are not the trained ones, options that do not reach the recipe, and
    progress among the results."""
    output = tmp_path / "run"
    options = ("--set", "epochs=2", "--set", "optimizer.lr=0.05", "--seed", 3)
    result = gross_command("train", "4-layer", "-o", output, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["saved", str(output / "model.safetensors")]
    assert "epoch 2/2" in result.stderr
    recipe = json.loads((output / "run.json").read_text())["recipe"]
    assert (recipe["epochs"], recipe["optimizer.lr"]) == (2, 0.05)
    torch.manual_seed(3)
    model = networks.build("4-layer")
    gross.train(model, gross.data.load(), epochs=2, seed=3, quiet=True, **{"optimizer.lr": 0.05})
    saved = weights.read(output / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    trained = output / "model.safetensors"
    options = ("-w", trained, "-o", tmp_path / "supernet.safetensors", "--sweeps", 1, "--json")
    taken = gross_command("decompose", "4-layer", *options)
    assert taken.exit_code == 0, taken.output


@pytest.mark.parametrize(
    "arguments",
    [(), ("--configuration", "4,1,32"), ("--configuration", "4"), ("--teacher", "FULL")],
)
def test_finetune_writes_a_supernet(supernet, tmp_path, arguments):
    """Catches a command that trains something else than its option says."""
    output = tmp_path / "run"
    arguments = [tmp_path / "full.pth" if a == "FULL" else a for a in arguments]
    result = gross_command(
        "finetune", supernet, "-o", output, "--set", "epochs=1", "--json", *arguments
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    content = json.loads(result.stdout)
    assert content["output"] == str(output / "supernet.safetensors")
    (record,) = content["epochs"]
    individual = "--configuration" in arguments
    assert ("accuracy" in record) == individual
    assert ("smallest" in record) != individual
    trained, before = gross.load(output / "supernet.safetensors"), gross.load(supernet)
    assert not torch.equal(trained.features[3].grouped[1], before.features[3].grouped[1])
    description = json.loads((output / "run.json").read_text())
    expected = {"4,1,32": [4, 1, 32], "4": [4, 4, 4]}.get(arguments[-1]) if individual else None
    assert description["configuration"] == expected
    assert configuration(trained) == tuple(expected or (32, 32, 32))
    assert ("distillation" in description["loss"]) == ("--teacher" in arguments)


def test_response_recipes_need_and_take_the_teacher(supernet, tmp_path):
    """Catches a recipe of the ICLR draft that the command cannot run."""
    options = ("--recipe", "iclr-response", "--set", "epochs=1", "-o", tmp_path / "run")
    result = gross_command("finetune", supernet, *options)
    assert result.exit_code == 1
    assert "teacher: got none" in result.stderr
    result = gross_command("finetune", supernet, *options, "--teacher", tmp_path / "full.pth")
    assert result.exit_code == 0, result.output


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """Catches a step that is cut off, a status of success, and a hint that does not work: it is
    run."""
    output = tmp_path / "run"
    command = ["train", "4-layer", "-o", str(output), "--set", "epochs=1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gross", *command], stderr=subprocess.PIPE, text=True
    )
    while not (output / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in printed
    hint = printed.splitlines()[-1]
    assert hint == f"gross {' '.join(command)} --resume"
    saved = max(output.glob("checkpoint-*.safetensors"))
    assert f"stopped after step {int(saved.stem[-9:])} and saved" in printed
    again = gross_command(*hint.split()[1:-1])
    assert again.exit_code == 1
    assert "which holds a run" in again.stderr
    result = gross_command(*hint.split()[1:], "--set", "epochs=999")
    assert "recipe epochs: 1000, now 999" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "5-layer"], 2, "5-layer"),
        (["train", "4-layer", "--data", "mnist"], 1, "name: got 'mnist'"),
        (["train", "4-layer", "--recipe", "4-layers"], 1, "recipe: got '4-layers'"),
        (["train", "4-layer", "--set", "epochs"], 2, "KEY=VALUE"),
        (["train", "4-layer", "--set", "epoch=3"], 1, "epoch: unknown"),
        (["train", "4-layer", "--set", "epochs=0"], 1, "epochs: got 0"),
        (["train", "4-layer", "--set", "batch_size=2000"], 1, "batch_size: got 2000"),
        (["train", "4-layer", "--precision", "float16"], 1, "precision: got 'float16'"),
        (["train", "4-layer", "--device", "gpu"], 2, "got 'gpu', accepted are cpu, cuda"),
        (["train", "vgg16", "--data", "digits"], 1, "data: got images of (3, 32, 32)"),
        (["finetune", "absent.safetensors"], 1, "no file at absent.safetensors"),
        (["finetune", "SUPERNET", "--configuration", "1,1"], 1, "configuration: got 2"),
        (["finetune", "SUPERNET", "--teacher", "absent.pth"], 1, "no file at absent.pth"),
    ],
)
def test_bad_command_lines_have_one_reason_and_begin_nothing(
    supernet, tmp_path, monkeypatch, arguments, status, message
):
    """Catches a traceback in place of a reason, and a run that begins."""
    if "vgg16" in arguments:  # its first fully-connected layer alone has 400 MB
        small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
        small.append(torch.nn.Linear(7, 10))
        monkeypatch.setattr(networks, "build", lambda *_, **__: small)
    given = [supernet if argument == "SUPERNET" else argument for argument in arguments]
    result = gross_command(*given, "-o", tmp_path / "run")
    assert result.exit_code == status, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not list((tmp_path / "run").glob("*")) if (tmp_path / "run").exists() else True


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_help_says_how_to_call_it(command):
    """Catches an option without a word, and recipes that are not listed."""
    result = gross_command(command, "--help")
    assert result.exit_code == 0
    assert f"Example: gross {command}" in result.stdout
    assert "resnet18-individual" in result.stdout
