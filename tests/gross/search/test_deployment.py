"""``gross.export``: the same outputs with nothing of the other configurations, here and in ONNX
Runtime."""

import gross
import numpy
import onnxruntime
import pytest
import torch
from gross.deployment import save_program
from gross.supernet import configuration, decomposed_layers, set_configuration
from torch import Tensor, nn
from torchvision.models import resnet18

from gross_kernels.program import Program

from .networks import supernet

WANTED = (2, 8, 1, 4)


def expected(net: nn.Module, c: tuple[int, ...], images: Tensor) -> Tensor:
    set_configuration(net, c)
    with torch.inference_mode():
        return net.eval()(images)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 3, 8, 8)


@pytest.mark.parametrize("kernels", [False, True])
def test_the_export_gives_the_supernets_outputs(images, kernels):
    """Catches another configuration's weights, and a supernet that is changed by its export."""
    net = supernet()
    before = configuration(net)
    network = gross.export(net, WANTED, kernels=kernels, example=images)
    assert configuration(net) == before
    with torch.inference_mode():
        torch.testing.assert_close(network(images), expected(net, WANTED, images))
        other = expected(net, (1, 1, 1, 1), images)
        assert not torch.allclose(network(images), other, rtol=1e-2)
    assert not decomposed_layers(network)
    programs = [module for module in network.modules() if isinstance(module, Program)]
    assert bool(programs) == kernels


def test_a_network_that_keeps_its_last_activations(images):
    """Catches a copy that torch refuses: what a network keeps of a call with gradients has a
    history. RAFT and nnU-Net are such networks."""

    class Keeping(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            self.kept = super().forward(input)
            return self.kept

    net = Keeping(supernet())
    net(images).sum().backward()
    network = gross.export(net, WANTED, kernels=False)
    torch.testing.assert_close(network(images), expected(net, WANTED, images))


def test_configurations_in_every_form(images):
    """Catches a configuration that ``set_configuration`` takes and ``export`` does not."""
    net = supernet()
    names = dict(zip(decomposed_layers(net), WANTED, strict=True))
    for given, sizes in ((names, WANTED), (1, (1, 1, 1, 1))):
        network = gross.export(net, given, kernels=False)
        torch.testing.assert_close(network(images), expected(net, sizes, images))


def test_the_active_configuration_is_the_default_and_strides_batch_norms_and_shortcuts_stay():
    """Catches geometry that the three convolutions lose."""
    torch.manual_seed(0)
    net = gross.decompose(resnet18(), (1, 4), keep_costlier=True, method="random", quiet=True)
    set_configuration(net, (4, 1) * 8)
    images = torch.randn(2, 3, 64, 64)
    for kernels in (False, True):
        network = gross.export(net, kernels=kernels, example=images)
        with torch.inference_mode():
            found = network(images)
        torch.testing.assert_close(found, expected(net, (4, 1) * 8, images), rtol=1e-4, atol=1e-4)


def test_files_run_in_onnx_runtime_and_torch_export(tmp_path, images):
    """Catches operators that another runtime does not know, and a batch size that is fixed."""
    net = supernet()
    network = gross.export(net, WANTED, kernels=False)
    save_program(network, images[:1], tmp_path / "network.onnx")
    save_program(network, images[:1], tmp_path / "network.pt2")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    program = torch.export.load(tmp_path / "network.pt2").module()
    for batch in (images, images[:1]):
        wanted = expected(net, WANTED, batch)
        (found,) = session.run(None, {"input": batch.numpy()})
        numpy.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(program(batch), wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.onnx", "network.pt2"]


def test_a_plain_export_can_be_trained(images):
    """Catches weights that are still the supernet's, or need no gradient."""
    net = supernet()
    network = gross.export(net, WANTED, kernels=False).train()
    before = expected(net, WANTED, images)
    network(images).sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= parameter.grad
    assert torch.equal(expected(net, WANTED, images), before)


def test_what_cannot_be_exported_is_refused(tmp_path, images, monkeypatch):
    """Catches files of the wrong kind, and an export whose outputs differ."""
    net = supernet()
    with pytest.raises(ValueError, match="got 3 for decomposed layer 0"):
        gross.export(net, (3, 1, 1, 1), kernels=False)
    with pytest.raises(ValueError, match=r"accepted are \.pt2 and \.onnx"):
        save_program(gross.export(net, kernels=False), images, tmp_path / "network.pth")
    with pytest.raises(ValueError, match="got this package's kernels"):
        save_program(gross.export(net, example=images), images, tmp_path / "network.onnx")
    first = next(iter(decomposed_layers(net).values()))
    monkeypatch.setattr(first, "fold", lambda size: nn.Conv2d(8, 8, 3, padding=1))
    with pytest.raises(RuntimeError, match="outputs differ"):
        gross.export(net, example=images, kernels=False)
