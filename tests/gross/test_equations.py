"""Equations 4, 5 and 6 of the paper, from Ψ alone up to a decomposed layer."""

import pytest
import torch
import torch.nn.functional as F
from gross.decomposition import block_term_series, decompose
from gross.supernet import set_configuration
from torch import nn

from gross_kernels import GroSSConv2d, expand
from gross_kernels.series import Series, residuals, sum_terms


def integers(*shape: int) -> torch.Tensor:
    """Small whole numbers in float64: every sum of their products is exact, so that equality can be
    tested as equality."""
    return torch.randint(-4, 5, shape, dtype=torch.float64)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("in_channels", "out_channels"), [(12, 12), (12, 24), (24, 12)])
@pytest.mark.parametrize(("g", "h"), [(2, 2), (2, 4), (2, 12), (4, 12)])
def test_equation_4_the_expanded_weight_gives_the_same_output(in_channels, out_channels, g, h):
    """Catches blocks put at the wrong input channels, above all where the widths differ."""
    weight, features = integers(out_channels, g, 3, 3), integers(2, in_channels, 5, 5)
    grouped = F.conv2d(features, weight, groups=in_channels // g)
    assert torch.equal(
        F.conv2d(features, expand(weight, h, in_channels), groups=in_channels // h), grouped
    )


def test_expansions_compose_and_are_linear():
    """Catches an expansion that depends on the way it is reached, which would make equation 5
    depend on the order of its terms."""
    a, b = integers(8, 1, 3, 3), integers(8, 1, 3, 3)
    assert torch.equal(expand(expand(a, 2, 8), 8, 8), expand(a, 8, 8))
    assert torch.equal(expand(a + b, 4, 8), expand(a, 4, 8) + expand(b, 4, 8))


def test_equations_5_and_6_are_inverse_to_each_other():
    """Catches a residual taken against the wrong term: the first n terms must sum to the n-th
    weight exactly."""
    weights = [integers(8, s, 3, 3) for s in (1, 2, 4, 8)]
    terms = residuals(weights, 8)
    for n, weight in enumerate(weights, start=1):
        assert torch.equal(sum_terms(Series(terms, n), 8), weight)


GEOMETRIES = [
    {"padding": 1},
    {"stride": 2, "padding": 1, "bias": False},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (2, 0), "padding_mode": "circular", "stride": (1, 2)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("width", [16, (8, 16)])
def test_a_layer_equals_each_of_its_independent_bottlenecks(geometry, width):
    """Catches a bottleneck whose stride, padding, bias or groups are not where Table 1 has them, at
    any group size."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, **geometry)
    width_in, width_out = (width, width) if isinstance(width, int) else width
    bottlenecks = {
        s: (
            torch.randn(width_in, 16, 1, 1),
            torch.randn(width_out, s, 3, 3),
            torch.randn(24, width_out, 1, 1),
        )
        for s in (1, 2, 4, 8)
    }
    layer = GroSSConv2d.from_bottlenecks(conv, bottlenecks)
    image = torch.randn(2, 16, 9, 10)
    for s, (p, r, q) in bottlenecks.items():
        grouped = nn.Conv2d(
            width_in, width_out, 3, groups=width_in // s, **{**geometry, "bias": False}
        )
        grouped.weight = nn.Parameter(r)
        expected = F.conv2d(grouped(F.conv2d(image, p)), q, conv.bias)
        layer.group_size = s
        assert relative_error(layer(image), expected) < 1e-6


def test_a_supernet_equals_the_network_of_independent_bottlenecks_at_every_group_size():
    """Catches a decomposition that the surgery loses or mixes up between layers on its way into the
    network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3)
    )
    supernet = decompose(
        model, (1, 2, 8), width={"3": 16}, sweeps=3, keep_costlier=True, quiet=True
    )
    fits = {k: block_term_series(model[k].weight.detach(), (1, 2, 8), sweeps=3) for k in (1, 3)}
    image = torch.randn(2, 3, 12, 12)
    for i, sizes in enumerate([(1, 1), (2, 2), (8, 8)]):
        network = [*model]
        for k, terms in fits.items():
            term = terms[i]
            padding = model[k].padding
            pointwise = [term.pointwise_in, term.pointwise_out]
            convolutions = [nn.Conv2d(w.shape[1], w.shape[0], 1, bias=False) for w in pointwise]
            for convolution, weight in zip(convolutions, pointwise, strict=True):
                convolution.weight = nn.Parameter(weight)
            convolutions[1].bias = model[k].bias
            width = len(term.grouped)
            grouped = nn.Conv2d(
                width, width, 3, padding=padding, groups=width // sizes[0], bias=False
            )
            grouped.weight = nn.Parameter(term.grouped)
            network[k] = nn.Sequential(convolutions[0], grouped, convolutions[1])
        set_configuration(supernet, sizes)
        assert relative_error(supernet(image), nn.Sequential(*network)(image)) < 1e-5
