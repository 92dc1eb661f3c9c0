"""A run that is killed, disturbed or short of space: what was saved is safe, and the run ends as an
undisturbed one does."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import gross
import pytest
import torch
from gross import weights
from gross.training import Recipe, cross_entropy
from gross.training.checkpoint import Checkpoints, Position

QUICK = Recipe(epochs=2, batch_size=16).override({"optimizer.lr": 0.05})
#: A run whose checkpoints come after every step, so that kills meet the middle of them.
PROGRAM = """
import sys, torch, gross
from gross.data import Data, Images
torch.set_num_threads(1)
torch.manual_seed(0)
pixels, labels = torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (300,))
part = Images(pixels, labels)
data = Data("noise", part, part, part, tuple("0123456789"), (3, 32, 32))
supernet = gross.decompose(gross.networks.build("4-layer"), (1, 4, 32), sweeps=1, quiet=True)
gross.finetune(
    supernet, data, directory=sys.argv[1], resume=True, trains="all", quiet=True,
    epochs=3, batch_size=16, checkpoint_minutes=0,
)
gross.save(supernet, sys.argv[1] + "/supernet.safetensors")
"""


def run(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)])


def steps(folder: Path) -> int:
    """How far the saved part of a run is."""
    names = sorted(path.stem for path in folder.glob("checkpoint-*.safetensors"))
    return int(names[-1].removeprefix("checkpoint-")) if names else 0


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    """Catches anything of the state that a checkpoint lacks (momentum, sampler, place in the epoch,
    dropout), and a file that a kill leaves half-written."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert run(undisturbed).wait() == 0
    moments = random.Random(0)
    seen = [0]
    # 54 steps, killed four times: somewhere in the next dozen, at any moment of a step.
    for _ in range(4):
        process = run(killed)
        target = seen[-1] + moments.randint(4, 12)
        while steps(killed) < target:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        seen.append(steps(killed))
    assert run(killed).wait() == 0
    one, other = (
        weights.read_safetensors(folder / "supernet.safetensors")
        for folder in (undisturbed, killed)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    records = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (undisturbed, killed)
    ]
    for key in ("epoch", "step", "loss", "smallest", "largest"):
        assert [record[key] for record in records[0]] == [record[key] for record in records[1]]
    assert len(records[0]) == 3
    assert not list(killed.glob("*.part"))


@pytest.fixture
def finished(squares, make_supernet, tmp_path):
    """The folder of a run of one epoch of two, and what it would have become."""
    undisturbed = make_supernet()
    gross.finetune(undisturbed, squares, QUICK, quiet=True)

    class EnoughError(Exception):
        pass

    def loss(model, batch, calls=[]):  # noqa: B006 (counts across calls)
        calls.append(None)
        if len(calls) == 5:
            raise EnoughError
        return cross_entropy(model, batch)

    loss.__qualname__ = "cross_entropy"
    with pytest.raises(EnoughError):
        gross.finetune(
            make_supernet(),
            squares,
            QUICK.override({"checkpoint_minutes": 0}),
            loss=loss,
            directory=tmp_path,
            quiet=True,
        )
    return tmp_path, undisturbed


def resume(folder, squares, supernet):
    recipe = QUICK.override({"checkpoint_minutes": 0})
    return gross.finetune(supernet, squares, recipe, directory=folder, resume=True, quiet=True)


@pytest.mark.parametrize("damage", ["cut", "byte", "empty", "tail"])
def test_a_broken_last_checkpoint_falls_back_to_the_one_before(
    finished, squares, make_supernet, capsys, damage
):
    """Catches a run that goes on from damaged weights: a changed byte leaves the file well-formed;
    and one that is silent about it."""
    folder, undisturbed = finished
    last = max(folder.glob("checkpoint-*.safetensors"))
    content = bytearray(last.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "byte":
        content[-100] ^= 1
    elif damage == "empty":
        content = b""
    else:
        content += b"more"
    last.write_bytes(content)
    supernet = make_supernet()
    recipe = QUICK.override({"checkpoint_minutes": 0})
    gross.finetune(supernet, squares, recipe, directory=folder, resume=True)
    printed = capsys.readouterr().err
    assert last.name in printed
    assert "going on from the checkpoint before" in printed
    assert "resumed at epoch 1, step 3" in printed
    same(supernet, undisturbed)


def same(model, other):
    for (name, one), two in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name


def test_no_whole_checkpoint_is_an_error_that_names_them(finished, squares, make_supernet):
    """Catches a run that silently begins again where everything saved is damaged."""
    folder, _ = finished
    for path in folder.glob("checkpoint-*.safetensors"):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"resume: no checkpoint is whole; .*000004"):
        resume(folder, squares, make_supernet())


LIMITED = """
import resource, signal
from gross.training.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = Checkpoints.save
def save_with_little_space(self, position):
    if position.step > 20:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return save(self, position)
Checkpoints.save = save_with_little_space
"""


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path):
    """Catches an old checkpoint that is deleted before the new one is whole, the remains of one
    that is not, and a reason that is no OSError. A limit of the files' size stands in for the
    disk's."""
    command = [sys.executable, "-c", LIMITED + PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "OSError" in done.stderr.splitlines()[-1], done.stderr
    assert steps(tmp_path) == 20
    assert not list(tmp_path.glob("*.part"))
    assert run(tmp_path).wait() == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_metrics_that_cannot_be_written_are_measured_again(
    squares, make_supernet, tmp_path, monkeypatch
):
    """Catches an epoch that is in the checkpoint and not among the metrics, or twice there."""
    real, calls = os.fsync, []

    def full(handle):
        calls.append(None)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        gross.finetune(make_supernet(), squares, QUICK, directory=tmp_path, quiet=True)
    monkeypatch.setattr(os, "fsync", real)
    assert not list(tmp_path.glob("*.part"))
    undisturbed, supernet = make_supernet(), make_supernet()
    gross.finetune(undisturbed, squares, QUICK, quiet=True)
    history = gross.finetune(supernet, squares, QUICK, directory=tmp_path, resume=True, quiet=True)
    same(supernet, undisturbed)
    assert [record["epoch"] for record in history.epochs] == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    squares, make_supernet, tmp_path
):
    """Catches hours of training that cannot be kept."""
    (tmp_path / "file").write_text("")
    supernet = make_supernet()

    def loss(model, batch):
        raise AssertionError("not reached")

    with pytest.raises(OSError, match="file"):
        gross.finetune(supernet, squares, QUICK, loss=loss, directory=tmp_path / "file" / "run")
    with pytest.raises(NotADirectoryError, match=r"directory: got .*file, which is a file"):
        gross.finetune(supernet, squares, QUICK, loss=loss, directory=tmp_path / "file")


def test_a_run_is_not_overwritten_and_goes_on_only_as_itself(finished, squares, make_supernet):
    """Catches two runs in one folder, and a run that goes on with another recipe or data set."""
    folder, _ = finished
    recipe = QUICK.override({"checkpoint_minutes": 0})
    options = {"directory": folder, "quiet": True}
    with pytest.raises(ValueError, match=r"directory: got .*, which holds a run"):
        gross.finetune(make_supernet(), squares, recipe, **options)
    with pytest.raises(ValueError, match=r"recipe optimizer.lr: 0.05, now 0.1; seed: 0, now 1"):
        gross.finetune(
            make_supernet(),
            squares,
            recipe.override({"optimizer.lr": 0.1}),
            seed=1,
            resume=True,
            **options,
        )
    other = dataclasses.replace(squares, name="digits", test=squares.train)
    with pytest.raises(ValueError, match=r"data images: .*; data name: 'squares', now 'digits'"):
        gross.finetune(make_supernet(), other, recipe, resume=True, **options)
    with pytest.raises(ValueError, match=r"configuration: None, now .1, 4."):
        gross.finetune(
            make_supernet(), squares, recipe, configuration=(1, 4), resume=True, **options
        )


def test_the_folder_says_what_was_run_and_measured(finished, squares, make_supernet):
    """Catches a run that nobody can repeat, metrics that are lost on the way, and more than two
    checkpoints."""
    folder, _ = finished
    description = json.loads((folder / "run.json").read_text())
    assert description["recipe"]["optimizer.lr"] == 0.05
    assert description["seed"] == 0
    assert description["data"]["images"] == [48, 20, 20]
    assert description["torch"] == torch.__version__
    assert {"created", "gross-kernels", "revision", "python"} <= description.keys()
    history = resume(folder, squares, make_supernet())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(history.epochs)
    assert history.directory == folder
    assert len(list(folder.glob("checkpoint-*.safetensors"))) == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    losses = {event.step: event.value for event in board.Scalars("loss")}
    assert losses == pytest.approx({r["epoch"]: r["loss"] for r in history.epochs}, rel=1e-5)


def test_resume_without_a_run_begins_one(squares, make_supernet, tmp_path):
    """Catches a batch system's job, which always says resume, that fails on its first start."""
    history = gross.finetune(
        make_supernet(), squares, QUICK, directory=tmp_path / "new" / "run", resume=True, quiet=True
    )
    assert len(history.epochs) == 2
    again = gross.finetune(
        make_supernet(), squares, QUICK, directory=tmp_path / "new" / "run", resume=True, quiet=True
    )
    assert again.epochs == history.epochs


def test_tied_layers_and_adamw_are_saved(tmp_path):
    """Catches tensors that are stored twice, which safetensors refuses, and an optimizer's state
    that is no tensor of the parameter's shape."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    saved = Checkpoints(tmp_path, model, optimizer, parameters, None)
    saved.save(Position(step=7))
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    expected = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer.zero_grad()
    position, broken = saved.restore()
    assert (position.step, broken) == (7, [])
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, expected[n]) for n, p in parameters.items())
