"""Terms and biases that are computed from other parameters: torch's pruning, parametrisations and
weight norms, and the layers' terms by name."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from gross_kernels import GroSSConv2d, SeriesConv2d

SIZES = (1, 2, 4)
Layer = GroSSConv2d | SeriesConv2d


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def list_of(layer: Layer) -> nn.ParameterList:
    return layer.grouped if isinstance(layer, GroSSConv2d) else layer.terms


def mask(tensor: Tensor) -> Tensor:
    return (torch.arange(tensor.numel()).reshape(tensor.shape) % 3 > 0).to(tensor.dtype)


def weight_norm(module: nn.Module, name: str) -> None:
    """With another norm than the weight has."""
    parametrizations.weight_norm(module, name)
    with torch.no_grad():
        getattr(module.parametrizations, name).original0.mul_(1.5)


def old_weight_norm(module: nn.Module, name: str) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module, name)
    with torch.no_grad():
        getattr(module, f"{name}_g").mul_(1.5)


#: What is done to a parameter, and what that makes of its value.
CHANGES: dict[str, tuple[Callable[[nn.Module, str], object], Callable[[Tensor], Tensor]]] = {
    "pruned": (
        lambda module, name: prune.custom_from_mask(module, name, mask(getattr(module, name))),
        lambda value: value * mask(value),
    ),
    "pruned to zeros": (
        lambda m, name: prune.custom_from_mask(m, name, torch.zeros_like(getattr(m, name))),
        torch.zeros_like,
    ),
    "pruned for good": (
        lambda module, name: [
            prune.custom_from_mask(module, name, mask(getattr(module, name))),
            prune.remove(module, name),
        ],
        lambda value: value * mask(value),
    ),
    "parametrised": (
        lambda module, name: parametrize.register_parametrization(module, name, Doubled()),
        lambda value: 2 * value,
    ),
    "weight norm": (weight_norm, lambda value: 1.5 * value),
    "older weight norm": (old_weight_norm, lambda value: 1.5 * value),
}


@pytest.mark.parametrize("kind", [GroSSConv2d, SeriesConv2d])
@pytest.mark.parametrize("term", range(3))
@pytest.mark.parametrize("change", CHANGES)
def test_term(change: str, term: int, kind: type[Layer]) -> None:
    """Catches a mask that is ignored, terms that change places, and a value computed once and kept
    when the parameters behind it have been trained."""
    layer, input = kind(4, 4, 3, group_sizes=SIZES), torch.randn(2, 4, 6, 5)
    expected = copy.deepcopy(layer)
    make, value = CHANGES[change]
    make(list_of(layer), str(term))
    for _ in range(2):
        parameter = list_of(expected)[term]
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(value(parameter))
        for size in SIZES:
            layer.group_size = expected.group_size = size
            torch.testing.assert_close(layer(input), expected(input))
        with torch.no_grad():
            parameter.copy_(kept)
            # A step of training, to those behind the term.
            scale = 1 if change == "pruned for good" else 0.5
            for tensor in list_of(expected):
                tensor.mul_(scale)
            for name, tensor in list_of(layer).named_parameters():
                if "original1" not in name and not name.endswith("_v"):
                    tensor.mul_(scale)


@pytest.mark.parametrize("change", ["pruned", "parametrised", "weight norm"])
def test_gradient_reaches_what_is_behind(change: str) -> None:
    """Catches a graph from the time of pruning, which a second step cannot differentiate."""
    layer, input = GroSSConv2d(4, 4, 3, group_sizes=SIZES), torch.randn(2, 4, 6, 5)
    CHANGES[change][0](layer.grouped, "1")
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        before = [p.detach().clone() for p in layer.grouped.parameters()]
        optimiser.zero_grad()
        layer(input).square().sum().backward()
        optimiser.step()
        assert not any(map(torch.equal, before, layer.grouped.parameters()))


@pytest.mark.parametrize("change", ["pruned", "parametrised"])
def test_bias(change: str) -> None:
    """Catches a bias that is taken as it was."""
    layer, input = GroSSConv2d(4, 4, 3, group_sizes=SIZES), torch.randn(2, 4, 6, 5)
    make, value = CHANGES[change]
    without, bias = layer(input) - layer.bias[:, None, None], layer.bias.detach().clone()
    make(layer, "bias")
    torch.testing.assert_close(layer(input), without + value(bias)[:, None, None])


def test_pack_says_no() -> None:
    """Catches packed weights of parameters that are others at every call."""
    layer = GroSSConv2d(4, 4, 3, group_sizes=SIZES).eval()
    parametrize.register_parametrization(layer.grouped, "0", Doubled())
    with pytest.raises(RuntimeError, match=r"pack: got .*parametrised.* accepted .*remove"):
        layer.pack()
    parametrize.remove_parametrizations(layer.grouped, "0")
    input = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        expected = layer(input)
        assert torch.equal(layer.pack()(input), expected)


def test_release_inactive() -> None:
    """Catches gradients of zeros that stay with what is behind an inactive term."""
    layer = SeriesConv2d(4, 4, 3, group_sizes=SIZES)
    for name in ("0", "2"):
        prune.custom_from_mask(layer.terms, name, mask(layer.terms[int(name)]))
    parametrize.register_parametrization(layer.terms, "1", Doubled())
    layer.group_size = 1
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    layer.release_inactive()
    kept = [name for name, p in layer.terms.named_parameters() if p.grad is not None]
    assert kept == ["0_orig"]
