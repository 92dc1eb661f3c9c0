"""The training loop: what trains and what keeps still, what it minimises, and what it refuses."""

import copy
import dataclasses
import signal
import threading
from collections import Counter

import gross
import pytest
import torch
import torch.nn.functional as F
from gross.supernet import configuration, decomposed_layers
from gross.training import (
    DivergenceError,
    Interrupted,
    Recipe,
    cross_entropy,
    distillation,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

QUICK = Recipe(epochs=2, batch_size=16).override({"optimizer.lr": 0.05})
ALONE = QUICK.override({"trains": "decomposition", "batch_norm": "frozen"})


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}


# It trains --------------------------------------------------------------------------------------


def test_a_network_learns_from_scratch(squares, make_network):
    """Catches a loop that does not descend, and records that are not what was measured."""
    network = make_network()
    history = gross.train(network, squares, QUICK, epochs=8, quiet=True)
    first, last = history.epochs[0], history.epochs[-1]
    assert last["loss"] < 0.5 * first["loss"]
    assert last["accuracy"] == gross.training.accuracy(squares.validation)(network.eval()) > 90
    assert [record["epoch"] for record in history.epochs] == list(range(1, 9))
    assert [record["step"] for record in history.epochs] == list(range(3, 25, 3))
    assert last["lr"] == 0.05
    assert last["seconds"] > last["loader_seconds"] > 0


@pytest.mark.parametrize("policy", ["uniform", "temperature", "sandwich", "fair"])
def test_every_configuration_of_a_supernet_learns_together(squares, make_supernet, policy):
    """Catches a policy that does not train: in every configuration the loss must fall, the layers'
    own sizes being drawn apart."""
    supernet = make_supernet()
    configurations = [(a, b) for a in (1, 2, 4) for b in (1, 2, 4)]

    def losses() -> list[float]:
        values = []
        for sizes in configurations:
            gross.set_configuration(supernet, sizes)
            values.append(cross_entropy(supernet.eval(), squares.validation.tensors()).item())
        return values

    before = losses()
    options = {"epochs": 6, "sampling.policy": policy}
    history = gross.finetune(supernet, squares, ALONE, quiet=True, **options)
    assert all(after < b for after, b in zip(losses(), before, strict=True))
    assert history.epochs[-1].keys() >= {"smallest", "largest", "loss"}


def test_the_same_seed_gives_the_same_bits(squares, make_supernet):
    """Catches state outside of the seed: of torch's generator, or of an earlier run."""
    results = []
    for seed in (1, 1, 2):
        supernet = make_supernet()
        torch.manual_seed(len(results))
        gross.finetune(supernet, squares, QUICK, seed=seed, quiet=True)
        results.append(state(supernet))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not all(torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_adamw_clipping_and_the_schedule_reach_the_optimizer(squares, make_network):
    """Catches recipe keys that nothing reads."""
    moved = []
    for clip in (0.0, 1e-3):
        network = make_network()
        before = copy.deepcopy(list(network.parameters()))
        gross.train(network, squares, QUICK, quiet=True, **{"optimizer.clip": clip})
        changes = [(p - q).norm() for p, q in zip(network.parameters(), before, strict=True)]
        moved.append(torch.stack(changes).norm().item())
    # Six steps of at most 0.05 · 0.001, each of which momentum repeats at most ten times.
    assert moved[1] < 6 * 10 * 0.05 * 1e-3 < moved[0]
    options = {"optimizer.name": "adamw", "schedule.after": [1], "optimizer.lr": 1e-3}
    history = gross.train(make_network(), squares, QUICK, quiet=True, **options)
    assert [record["lr"] for record in history.epochs] == pytest.approx([1e-3, 1e-4])


def test_bfloat16_and_compile_train_a_supernet(squares, make_supernet):
    """Catches options that break sampling: one graph must serve all configurations."""
    torch._dynamo.reset()
    supernet = make_supernet()
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.MonkeyPatch.context() as patch:
        compile = torch.compile
        patch.setattr(torch, "compile", lambda model: compile(model, backend="aot_eager"))
        history = gross.finetune(
            supernet, squares, ALONE, epochs=4, quiet=True, precision="bfloat16", compile=True
        )
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    assert {parameter.dtype for parameter in supernet.parameters()} == {torch.float32}


# What trains, and what keeps still --------------------------------------------------------------


def test_the_decomposition_trains_alone_by_default(squares, make_supernet):
    """Catches anything else that moves: other weights, biases, batch-norm statistics."""
    supernet = make_supernet().eval()
    for parameter in supernet[0].parameters():
        parameter.requires_grad_(False)
    gross.set_configuration(supernet, (2, 4))
    before, modes = state(supernet), [m.training for m in supernet.modules()]
    gross.finetune(supernet, squares, epochs=5, batch_size=16, quiet=True)
    terms = {name for name in before if "pointwise" in name or "grouped" in name}
    assert changed(supernet, before) == terms
    assert configuration(supernet) == (2, 4)
    assert [m.training for m in supernet.modules()] == modes
    frozen = {name for name, p in supernet.named_parameters() if not p.requires_grad}
    assert frozen == {"0.weight", "0.bias"}


def test_all_may_train_and_the_users_frozen_stays(squares, make_supernet):
    """Catches a term that the user froze and the loop moves, and options that nothing reads."""
    supernet = make_supernet()
    supernet[3].grouped[0].requires_grad_(False)
    before = state(supernet)
    gross.finetune(supernet, squares, QUICK, quiet=True)
    assert before.keys() - changed(supernet, before) == {"3.grouped.0"}
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    before = state(supernet)
    gross.finetune(supernet, squares, QUICK, batch_norm="frozen", quiet=True)
    assert before.keys() - changed(supernet, before) == {"3.grouped.0"} | statistics


def test_an_individual_configuration_trains_as_a_plain_bottleneck(squares, make_supernet):
    """Catches terms that move together: with n active terms the sums would move n times as far as
    the weights of three plain convolutions, which are trained here beside."""
    supernet = make_supernet()
    sizes = (4, 2)
    plain = copy.deepcopy(supernet)
    for (name, layer), size in zip(decomposed_layers(supernet).items(), sizes, strict=True):
        plain.set_submodule(name, layer.fold(size))
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.count(".") == 2 and name.endswith("weight"))
    before = state(supernet)
    gross.finetune(supernet, squares, ALONE, configuration=sizes, quiet=True)
    gross.train(plain, squares, QUICK, batch_norm="frozen", quiet=True)
    assert configuration(supernet) == sizes
    for name, layer in decomposed_layers(supernet).items():
        trained = plain.get_submodule(name)
        for ours, theirs in zip(layer.fold(), trained, strict=True):
            torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-4, atol=1e-6)
    series = ("pointwise_in", "grouped", "pointwise_out")
    last = {f"3.{s}.2" for s in series} | {f"5.{s}.1" for s in series}
    assert changed(supernet, before) == last


# What is minimised and measured -----------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_terms_that_no_step_used_keep_their_bits(squares, make_supernet, optimizer):
    """Catches a loop that forgets to release them: momentum and weight decay would move them. At
    this temperature every step draws the smallest sizes."""
    supernet = make_supernet()
    before = state(supernet)
    options = {"sampling.policy": "temperature", "sampling.alpha": 1e4}
    options |= {"optimizer.name": optimizer, "optimizer.weight_decay": 0.1}
    gross.finetune(supernet, squares, ALONE, quiet=True, **options)
    series = ("pointwise_in", "grouped", "pointwise_out")
    assert changed(supernet, before) == {f"{layer}.{s}.0" for layer in (3, 5) for s in series}


class Task(nn.Module):
    """Images to images: no class anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(image).relu()).relu())


def test_any_task_trains_with_a_loss_a_metric_and_a_loader_of_the_users():
    """Catches classes in the loop: images to images, batches that are dictionaries, a metric that
    is no accuracy."""
    images = torch.rand(24, 1, 8, 8)
    batches = [{"image": part, "target": part.flip(-1)} for part in images.split(8)]
    supernet = gross.decompose(Task(), (1, 2, 4), sweeps=3, quiet=True)
    measured = []

    def loss(model, batch):
        return F.mse_loss(model(batch["image"]), batch["target"])

    def metric(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        measured.append(configuration(model))
        return -float(loss(model, batches[0]))

    history = gross.finetune(
        supernet, batches, QUICK, loss=loss, metric=metric, quiet=True, epochs=5
    )
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    assert history.epochs[-1]["largest"] > history.epochs[0]["largest"]
    assert Counter(measured) == {(1,): 5, (4,): 5}


def test_a_users_loader_shuffles_by_the_seed(squares, make_network):
    """Catches a loader's order that depends on what came before."""
    loader = DataLoader(TensorDataset(*squares.train.tensors()), batch_size=16, shuffle=True)
    results = []
    for seed in (0, 0, 1):
        network = make_network()
        torch.manual_seed(len(results))
        history = gross.train(network, loader, QUICK, seed=seed, quiet=True)
        results.append(state(network))
        assert history.epochs[-1]["step"] == 6
        assert "accuracy" not in history.epochs[-1]
    assert torch.equal(results[0]["0.weight"], results[1]["0.weight"])
    assert not torch.equal(results[0]["0.weight"], results[2]["0.weight"])


def test_distillation_brings_the_supernet_to_the_network(squares, make_network):
    """Catches a teacher that trains, or whose answers come from training mode; and a distance that
    is not the one asked for."""
    network = make_network().train()
    network[6] = nn.Identity()  # dropout would be the largest part of the distance
    with torch.no_grad():
        network[-1].weight.mul_(10)
    before = state(network)
    inputs, _ = squares.validation.tensors()
    for distance in (None, F.mse_loss):
        supernet = gross.decompose(network, (1, 2, 4), sweeps=3, quiet=True)
        options = (
            {"teacher": network} if distance is None else {"loss": distillation(network, distance)}
        )
        history = gross.finetune(
            supernet, squares, ALONE, epochs=8, quiet=True, **options, **{"optimizer.lr": 0.01}
        )
        assert history.epochs[-1]["loss"] < 0.7 * history.epochs[0]["loss"]
        gross.set_configuration(supernet.eval(), (2, 4))
        with torch.no_grad():
            output, target = supernet(inputs), copy.deepcopy(network).eval()(inputs)
            loss = distillation(network, *([] if distance is None else [distance]))
            found = loss(supernet, (inputs, None))
        p, q = target.double().softmax(1), output.double().softmax(1)
        divergence = (p * (p / q).log()).sum(1).mean()
        expected = divergence if distance is None else (output - target).square().mean().double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
    assert not changed(network, before)
    assert network.training


# What stops it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["3", "5", "the loss itself"])
def test_a_loss_that_is_not_finite_stops_with_step_and_layer(
    squares, make_supernet, tmp_path, where
):
    """Catches a run that goes on with NaN, a layer that is only downstream of the fault, and a
    checkpoint that is overwritten with it."""
    supernet = make_supernet()
    calls = []

    def loss(model, batch):
        calls.append(None)
        if len(calls) == 5 and where in ("3", "5"):
            with torch.no_grad():
                model.get_submodule(where).grouped[0].fill_(float("nan"))
        bad = len(calls) >= 5 and where == "the loss itself"
        return cross_entropy(model, batch) * (float("nan") if bad else 1.0)

    message = f"the loss is nan at step 5 .epoch 2., first seen in .*{where}; the last good"
    with pytest.raises(DivergenceError, match=message):
        gross.finetune(supernet, squares, QUICK, loss=loss, directory=tmp_path, quiet=True)
    assert [p.name for p in sorted(tmp_path.glob("*.safetensors"))] == [
        "checkpoint-000000000.safetensors",
        "checkpoint-000000003.safetensors",
    ]


def test_weights_that_are_not_finite_are_not_saved(squares, make_network, tmp_path):
    """Catches a checkpoint of NaN where the loss of the last step was still finite."""
    calls = []

    def loss(model, batch):
        calls.append(None)
        if len(calls) == 3:
            model[0].weight.register_hook(lambda gradient: gradient * float("inf"))
        return cross_entropy(model, batch)

    with pytest.raises(DivergenceError, match=r"a weight is not finite at step 3.*0\.weight"):
        gross.train(make_network(), squares, QUICK, loss=loss, directory=tmp_path, quiet=True)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["checkpoint-000000000.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_the_run_goes_on_later(
    squares, make_supernet, tmp_path, number
):
    """Catches a step that is cut off, work that is lost, and handlers that stay behind."""
    undisturbed = make_supernet()
    gross.finetune(undisturbed, squares, QUICK, quiet=True)
    calls = []

    def loss(model, batch):
        calls.append(None)
        if len(calls) == 4:
            signal.raise_signal(number)
        return cross_entropy(model, batch)

    handlers = signal.getsignal(number)
    options = {"directory": tmp_path, "quiet": True}
    with pytest.raises(Interrupted, match="stopped after step 4 and saved; to go on"):
        gross.finetune(make_supernet(), squares, QUICK, loss=loss, **options)
    assert signal.getsignal(number) is handlers
    assert len(calls) == 4
    resumed = make_supernet()
    loss.__qualname__ = "changed"
    with pytest.raises(ValueError, match=r"loss: .*, now 'changed'"):
        gross.finetune(resumed, squares, QUICK, loss=loss, resume=True, **options)
    loss.__qualname__ = test_a_signal_finishes_the_step_and_the_run_goes_on_later.__name__
    loss.__qualname__ += ".<locals>.loss"
    history = gross.finetune(resumed, squares, QUICK, loss=loss, resume=True, **options)
    assert not changed(resumed, state(undisturbed))
    assert [record["epoch"] for record in history.epochs] == [1, 2]


def test_a_second_interrupt_stops_at_once(squares, make_network):
    """Catches a run that cannot be stopped."""

    def loss(model, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt) as raised:
        gross.train(make_network(), squares, QUICK, loss=loss, quiet=True)
    assert raised.type is KeyboardInterrupt


def test_it_trains_beside_the_main_thread(squares, make_network):
    """Catches signal handlers set where Python forbids it."""
    errors = []

    def work():
        try:
            gross.train(make_network(), squares, QUICK, quiet=True)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 49}, "batch_size: got 49, accepted are at most the 48 training images"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"optimizer.rate": 1}, "optimizer.rate: unknown"),
        ({"resume": True}, "resume: got no directory"),
        ({"configuration": (1,)}, "configuration: got 1 group sizes"),
        ({"configuration": (1, 3)}, "configuration: got 3 for decomposed layer 1"),
        ({"objective": "response"}, "teacher: got none"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(squares, make_supernet, options, message):
    """Catches a run that begins and then fails, and one that trains something else."""
    supernet = make_supernet()
    before = state(supernet)
    with pytest.raises(ValueError, match=message):
        gross.finetune(supernet, squares, QUICK, quiet=True, **options)
    assert not changed(supernet, before)


def test_data_that_do_not_fit_the_network_are_refused(squares, make_network):
    """Catches images of another size or classes beyond the network's outputs, which fail in the
    middle of an epoch or train nonsense."""
    large = dataclasses.replace(
        squares.validation, pixels=squares.validation.pixels.repeat(1, 1, 2, 2)
    )
    data = dataclasses.replace(squares, validation=large)
    with pytest.raises(ValueError, match=r"data: got images of \(3, 16, 16\), which Sequential"):
        gross.train(make_network(), data, QUICK, quiet=True)
    data = dataclasses.replace(squares, classes=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"data: got 3 classes .* have the shape \(2,\)"):
        gross.train(make_network(), data, QUICK, quiet=True)
    with pytest.raises(TypeError, match="data: got generator"):
        gross.train(make_network(), (x for x in ()), QUICK, quiet=True)
    with pytest.raises(ValueError, match="data: got no batch"):
        gross.train(make_network(), [], QUICK, quiet=True)
    with pytest.raises(ValueError, match="supernet: got Sequential without decomposed layers"):
        gross.finetune(make_network(), squares, QUICK, quiet=True)
    with pytest.raises(ValueError, match="which leaves Sequential nothing to train"):
        gross.train(make_network().requires_grad_(False), squares, QUICK, quiet=True)
    with pytest.raises(ValueError, match="objective: got 'response'"):
        gross.train(make_network(), squares, QUICK, objective="response", quiet=True)


def test_progress_is_one_line_an_epoch_where_there_is_no_terminal(squares, make_supernet, capsys):
    """Catches a bar drawn into a file, progress among the results, and draws that are not
    announced."""
    gross.finetune(make_supernet(), squares, ALONE)
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert "expected draws of each group size:" in lines
    assert "  3  1: 2  2: 2  4: 2" in lines
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 2
    assert epochs[0].startswith("epoch 1/2  loss ")
    assert all(word in epochs[0] for word in ("smallest", "largest", "images/s"))
