"""Copies of networks: what a copy of the model in the supernet, or in a count, has kept."""

import threading
from collections.abc import Iterator

import gross
import pytest
import torch
from gross.copying import copy_model, shapes_of
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm


def network() -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(c, 16, 3) for c in (3, 16, 16)))


def structured(model: nn.Module, **options) -> nn.Module:
    return gross.decompose(model, (1, 4), method="random", quiet=True, **options)


# What training is told by parameters --------------------------------------------------------------


def test_frozen_stays_frozen():
    """Catches a frozen backbone that comes back trainable, wholly or in part."""
    model = network()
    model[1].weight.requires_grad_(False)
    supernet = structured(model)
    trained = {name for name, each in supernet.named_parameters() if each.requires_grad}
    assert {name for name in trained if name.startswith("1.")} == {"1.bias"}
    assert "2.grouped.0" in trained
    assert not any(p.requires_grad for p in structured(model.requires_grad_(False)).parameters())
    als = gross.decompose(model, (1, 4), sweeps=1, quiet=True)
    assert not any(parameter.requires_grad for parameter in als.parameters())


def test_attributes_and_hooks_of_parameters_stay():
    """Catches a learning rate or weight decay of a layer's own that is lost without a word, also
    where the layer is left alone."""
    model = network()
    model[0].weight.no_decay, model[1].weight.lr_mult, model[1].bias.lr_mult = True, 0.1, 0.2
    model[1].stage = "body"
    seen = []
    model[0].weight.register_hook(lambda gradient: seen.append("gradient"))
    model[0].bias.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    model[2].weight.register_hook(lambda gradient: seen.append("frozen"))
    model[2].requires_grad_(False)
    supernet = structured(model)
    assert not supernet[2].weight.requires_grad
    assert supernet[0].weight.no_decay
    assert {p.lr_mult for p in supernet[1].parameters() if p is not supernet[1].bias} == {0.1}
    assert supernet[1].bias.lr_mult == 0.2
    assert supernet[1].stage == "body"
    supernet(torch.zeros(1, 3, 8, 8)).sum().backward()
    assert sorted(seen) == ["accumulated", "gradient"]


# What deepcopy refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        weight_norm,
        spectral_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_what_wraps_a_weight_the_old_way_is_copied(wrap):
    """Catches torch's "Only Tensors created explicitly by the user": the wrapped weight is a plain
    attribute with a history after every forward pass with gradients."""
    model = network()
    wrap(model[1])
    image = torch.randn(1, 3, 9, 9)
    model(image).sum().backward()
    supernet = structured(model)
    assert "hooks" in supernet.decomposition_report.left_alone["1"]
    torch.testing.assert_close(
        supernet[1].eval()(model[0](image)), model[1].eval()(model[0](image))
    )
    assert gross.macs(model, (3, 9, 9)).total == gross.macs(network(), (3, 9, 9)).total


class Keeps(nn.Module):
    """Keeps what its last forward pass computed, as RAFT and nnU-Net do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kept = network(), []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.kept.append(self.body(image))
        return self.kept[-1]


def test_a_network_that_keeps_its_outputs_is_copied(tmp_path):
    """Catches copies that fail once the network has run, in decompose, macs and load."""
    model = Keeps()
    output = model(torch.randn(1, 3, 9, 9))
    assert output.requires_grad
    supernet = structured(model)
    assert torch.equal(supernet.kept[0], output)
    assert not supernet.kept[0].requires_grad
    assert gross.macs(model, (3, 9, 9)).total > 0
    supernet(torch.randn(1, 3, 9, 9))
    gross.save(supernet, tmp_path / "saved.safetensors")
    for into in (model, supernet):
        assert len(gross.load(tmp_path / "saved.safetensors", into).kept) > 0


def test_views_in_a_copy_are_views_still():
    """Catches a copy whose buffers no longer share their memory: a running mean and a part of
    it."""
    model = network()
    model.whole = torch.zeros(4)
    model.part = model.whole[:2]
    copied = copy_model(model)
    copied.whole += 1
    assert copied.part.tolist() == [1, 1]
    assert model.part.tolist() == [0, 0]
    assert shapes_of(model).whole.is_meta


def test_what_cannot_be_copied_is_named_with_the_module_that_holds_it():
    """Catches an error out of the middle of deepcopy that leaves the user searching."""
    model = nn.Sequential(network(), nn.ReLU())
    model[0][2].lock = threading.Lock()
    message = r"^model: '0\.2\.lock', a lock in Conv2d, cannot be copied \(TypeError"
    with pytest.raises(ValueError, match=message):
        structured(model)
    with pytest.raises(ValueError, match=message):
        gross.macs(model, (3, 9, 9))


# Networks inside others ---------------------------------------------------------------------------


def test_a_compiled_supernet_is_saved_under_its_own_names(tmp_path):
    """Catches names with "_orig_mod" that no load accepts, of a whole network or of a part."""
    supernet = structured(network())
    gross.save(torch.compile(supernet), tmp_path / "whole.safetensors")
    gross.save(nn.DataParallel(supernet), tmp_path / "parallel.safetensors")
    parted = structured(network())
    parted.load_state_dict(supernet.state_dict())
    parted[1] = torch.compile(parted[1])
    gross.save(parted, tmp_path / "part.safetensors")
    for name in ("whole", "parallel", "part"):
        for into in (network(), torch.compile(network()), structured(network()), parted):
            loaded = gross.load(tmp_path / f"{name}.safetensors", into)
            state = {
                key.replace("_orig_mod.", ""): each for key, each in loaded.state_dict().items()
            }
            assert state.keys() == supernet.state_dict().keys()
            assert all(torch.equal(each, state[key]) for key, each in supernet.state_dict().items())
    assert gross.configuration(torch.compile(supernet)) == (4, 4)
    gross.set_configuration(torch.compile(supernet), {"1": 1})
    assert gross.configuration(parted) == (4, 4)
    assert gross.configuration(supernet) == (1, 4)
    assert gross.macs(parted, (3, 9, 9)).layers[1].group_size == 4


def test_a_compiled_network_or_part_of_one_is_decomposed_under_its_own_names():
    """Catches names with "_orig_mod" in the report and in arguments, and compiled parts that the
    copy cannot hold."""
    parted = network()
    parted[1] = torch.compile(parted[1])
    for model in (parted, torch.compile(network()), nn.DataParallel(network())):
        supernet = structured(model, input_size=(3, 9, 9), width={"1": 8})
        assert gross.configuration(supernet) == (4, 4)
        assert [layer.name for layer in supernet.decomposition_report.layers] == ["1", "2"]
        assert supernet.decomposition_report.layers[0].macs[0] > 0


WRAPPERS = {
    "compile": torch.compile,
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "compiled, parallel": lambda model: nn.DataParallel(torch.compile(model)),
    "distributed, compiled": lambda model: torch.compile(
        nn.parallel.DistributedDataParallel(model)
    ),
}


@pytest.fixture
def alone(tmp_path) -> Iterator[None]:
    """A process group of this process alone, which ``DistributedDataParallel`` needs."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_network_counts_as_the_network_itself(wrap, alone):
    """Catches ``KeyError`` where wrappers prefix the names, of the dense network and of its
    supernet, and a configuration by names that the wrapped one does not have."""
    dense = network()
    supernet = structured(dense)
    for model in (dense, supernet):
        report = gross.macs(wrap(model), (3, 9, 9))
        assert [layer.name for layer in report.layers] == ["0", "1", "2"]
        assert report == gross.macs(model, (3, 9, 9))
    by_name = gross.macs(wrap(supernet), (3, 9, 9), {"2": 1})
    assert by_name.total == gross.macs(supernet, (3, 9, 9), (4, 1)).total


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("supernet", [False, True])
def test_programs_are_not_counted_as_nothing(supernet):
    """Catches zero MACs, and no convolutions, of a network whose layers are not seen."""
    model = (structured(network()) if supernet else network()).eval()
    image = torch.randn(1, 3, 9, 9)
    traced = torch.jit.trace(model, image)
    for program in (
        traced,
        torch.jit.freeze(traced),
        torch.export.export(model, (image,)).module(),
    ):
        for call in (lambda p=program: gross.macs(p, (3, 9, 9)), lambda p=program: structured(p)):
            with pytest.raises(ValueError, match="accepted is the network that it was made from"):
                call()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_program_inside_a_network():
    """Catches a count without it, and a report that does not name it; and an error for an
    activation, in which there is nothing to count."""
    parted = network()
    parted[2] = torch.jit.script(parted[2])
    parted.append(torch.jit.script(nn.SiLU()))
    assert structured(parted).decomposition_report.left_alone["2"] == "a program of TorchScript"
    with pytest.raises(ValueError, match="got '2', a program of TorchScript"):
        gross.macs(parted, (3, 9, 9))
    parted[2] = network()[2]
    assert gross.macs(parted, (3, 9, 9)).total == gross.macs(network(), (3, 9, 9)).total


def test_a_supernet_made_under_inference_mode_trains():
    """Catches parameters that are inference tensors: "Inference tensors cannot be saved for
    backward", an epoch later."""
    model = network()
    with torch.inference_mode():
        made = [
            gross.decompose(
                model, (1, 4), method=method, sweeps=1, input_size=(3, 9, 9), quiet=True
            )
            for method in ("als", "random")
        ]
    for supernet in made:
        supernet(torch.randn(1, 3, 9, 9)).sum().backward()
        assert supernet[0].weight.grad is not None
        assert supernet[1].grouped[0].grad is not None
