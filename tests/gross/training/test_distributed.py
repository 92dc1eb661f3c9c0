"""Two processes on one batch: the weights of one process on the whole of it."""

import json
import subprocess
import sys

import gross
import pytest
import torch
from gross import weights
from gross.data import Shard
from gross.training import distributed

#: A fine-tuning without dropout, which is drawn in each process on its own.
PROGRAM = """
import sys, torch, gross
from gross.data import Data, Images
from gross.training import Recipe, cross_entropy
from gross.training.distributed import launched, shard
def loss(model, batch):
    assert len(batch[1]) == 16 // shard().count
    return cross_entropy(model, batch)
torch.set_num_threads(1)
torch.manual_seed(0)
pixels = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
split = Images(pixels, torch.arange(64) % 10)
data = Data("noise", split, split, split, tuple("0123456789"), (3, 32, 32))
network = gross.networks.build("4-layer")
network.classifier[2].p = 0.0
with launched(torch.device("cpu")):
    for policy in ("uniform", "sandwich"):
        recipe = Recipe(epochs=2, batch_size=16).override(
            {"sampling.policy": policy, "optimizer.lr": 0.01, "optimizer.weight_decay": 0.01}
        )
        supernet = gross.decompose(network, (1, 4, 32), sweeps=1, quiet=True)
        folder = sys.argv[1] + "/" + policy
        gross.finetune(supernet, data, recipe, loss=loss, directory=folder)
        if shard().index == 0:
            gross.save(supernet, folder + "/supernet.safetensors")
"""


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)


def test_two_processes_train_as_one(tmp_path):
    """Catches processes that draw other configurations, all take the whole batch, the same images
    or other crops of them, or gradients that are summed instead of averaged."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for processes in (1, 2):
        done = launch(processes, str(program), str(tmp_path / str(processes)))
        assert done.returncode == 0, done.stderr
        # One process prints and writes, for two policies.
        assert done.stderr.count("epoch 2/2") == 2
    for policy in ("uniform", "sandwich"):
        folders = [tmp_path / str(processes) / policy for processes in (1, 2)]
        one, two = (weights.read_safetensors(f / "supernet.safetensors") for f in folders)
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in folders]
        assert len(lines[0]) == len(lines[1]) == 2
        for a, b in zip(*lines, strict=True):
            assert json.loads(a)["loss"] == pytest.approx(json.loads(b)["loss"], rel=1e-5)


def test_the_command_trains_under_torchrun(tmp_path):
    """Catches a command that torchrun cannot start, and processes that all print or write the same
    files."""
    folder = tmp_path / "run"
    command = ("-m", "gross", "train", "4-layer", "--json", "--set", "epochs=1", "-o", str(folder))
    done = launch(2, *command)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["epochs"]) == 1
    assert (folder / "model.safetensors").is_file()


def test_a_batch_that_cannot_be_divided_is_refused(squares, make_network, monkeypatch):
    """Catches processes whose parts of a batch differ in size: the mean would not be the
    batch's."""
    monkeypatch.setattr(distributed, "shard", lambda: Shard(0, 3))
    message = "batch_size: got 16 for 3 processes, accepted are multiples of 3"
    with pytest.raises(ValueError, match=message):
        gross.train(make_network(), squares, batch_size=16, quiet=True)
