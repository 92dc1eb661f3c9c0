"""Response reconstruction: equation 9, and what moves under it."""

import copy

import gross
import pytest
import torch
from gross.training import Recipe, ResponseLoss
from torch import nn

RECIPE = Recipe(epochs=4, batch_size=16, objective="response", trains="decomposition").override(
    {"batch_norm": "frozen", "optimizer.lr": 0.003, "sampling.policy": "temperature"}
)


def test_the_loss_is_equation_9_over_all_layers_at_once(make_network, make_supernet):
    """Catches squared norms, a mean over elements, targets of the supernet's own inputs, and layers
    left out."""
    network, supernet = make_network().eval(), make_supernet().eval()
    gross.set_configuration(supernet, (1, 2))
    images = torch.randn(3, 3, 8, 8)
    loss = ResponseLoss(supernet, network)
    found = loss(supernet, (images, None))
    loss.close()
    with torch.no_grad():
        expected = 0.0
        for index in (3, 5):
            target, response = network[: index + 1](images), supernet[: index + 1](images)
            expected += (response - target).double().norm() / target.double().norm()
    torch.testing.assert_close(found.double(), expected)
    assert not any(m._forward_hooks for m in [*network.modules(), *supernet.modules()])


def test_the_layers_alone_learn_the_networks_responses(squares, make_network, make_supernet):
    """Catches biases, other layers, statistics or the original network that move, and a loss that
    does not fall in every configuration."""
    network, supernet = make_network().train(), make_supernet()
    before = [copy.deepcopy(model.state_dict()) for model in (network, supernet)]
    images, _ = squares.validation.tensors()

    def error(sizes) -> float:
        gross.set_configuration(supernet.eval(), sizes)
        loss = ResponseLoss(supernet, network)
        with torch.no_grad():
            value = loss(supernet, images)
        loss.close()
        return value.item()

    errors = {sizes: error(sizes) for sizes in ((1, 1), (1, 4), (2, 1))}
    gross.finetune(supernet, squares, RECIPE, teacher=network, quiet=True)
    assert all(error(sizes) < 0.97 * errors[sizes] for sizes in errors)
    for model, state in zip((network, supernet), before, strict=True):
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, state[n])}
        assert all("pointwise" in name or "grouped" in name for name in moved)
        assert bool(moved) == (model is supernet)
    assert network.training
    assert not any(m._forward_hooks for m in [*network.modules(), *supernet.modules()])


def test_another_network_is_refused(squares, make_supernet):
    """Catches targets of a network that lacks the layers."""
    with pytest.raises(ValueError, match="teacher: got Conv2d without '3', accepted is"):
        gross.finetune(make_supernet(), squares, RECIPE, teacher=nn.Conv2d(3, 8, 3), quiet=True)
