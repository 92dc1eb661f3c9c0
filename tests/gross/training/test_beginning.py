"""The frozen beginning of a network, in pieces of the batch."""

import pytest
import torch
from gross.training.beginning import PIECE, in_pieces
from torch import nn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)
    )
    for parameter in layers[0].parameters():
        parameter.requires_grad_(False)
    return nn.Sequential(layers, nn.Flatten(), nn.Linear(4 * 14 * 14, 2))


def images_seen(module: nn.Module, seen: list[int]) -> None:
    """Notes how many images each call of a module gets, without a hook."""
    forward = module.forward

    def watched(input: torch.Tensor) -> torch.Tensor:
        seen.append(len(input))
        return forward(input)

    module.forward = watched


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_pieces_give_outputs_and_gradients_of_the_whole_batch(format):
    """Catches images lost or out of order, a gradient cut off behind the beginning, another memory
    format, and pieces that are not taken."""
    model = network()
    images = torch.randn(300, 3, 32, 32).to(memory_format=format)
    expected = model(images)
    (gradient,) = torch.autograd.grad(expected.sum(), model[0][3].weight)
    seen: list[int] = []
    images_seen(model[0][0], seen)
    with in_pieces(model):
        behind = model[0](images)
        output = model(images)
    assert max(seen) == PIECE // (8 * 32 * 32) == 128
    assert sum(seen) == 2 * 300 + 1
    torch.testing.assert_close(output, expected)
    assert behind.is_contiguous(memory_format=format)
    (again,) = torch.autograd.grad(output.sum(), model[0][3].weight)
    torch.testing.assert_close(again, gradient)
    seen.clear()
    model(images)
    assert seen == [300]


def trained(model: nn.Sequential) -> torch.Tensor:
    model[0][0].weight.requires_grad_(True)
    return torch.randn(300, 3, 32, 32)


def watched(model: nn.Sequential) -> torch.Tensor:
    model[0][0].register_forward_hook(lambda *_: None)
    return torch.randn(300, 3, 32, 32)


def needs_gradient(model: nn.Sequential) -> torch.Tensor:
    return torch.randn(300, 3, 32, 32, requires_grad=True)


@pytest.mark.parametrize("case", [trained, watched, needs_gradient])
def test_what_is_not_frozen_runs_whole(case):
    """Catches a convolution that trains, or an input whose gradient is asked for, cut off from its
    gradient; and a hook that sees a part of the batch."""
    model = network()
    images = case(model)
    seen: list[int] = []
    images_seen(model[0][0], seen)
    with in_pieces(model):
        model(images).sum().backward()
    assert seen == [300]
    if case is trained:
        assert model[0][0].weight.grad is not None
    if case is needs_gradient:
        assert images.grad is not None


def test_a_single_image_and_other_inputs_run():
    """Catches a beginning that asks for a batch."""
    model = network()[0]
    image = torch.randn(3, 32, 32)
    with in_pieces(model):
        torch.testing.assert_close(model(image), model(image[None])[0])
