"""The refit of the last pointwise: least squares against LAPACK's, and the prefix that each layer
sees."""

import gross
import pytest
import torch
from gross.decomposition import Calibration, refit
from gross.decomposition.refit import LeastSquares, match_responses
from gross.supernet import set_configuration
from torch import nn


def columns(rows: int, count: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(seed)).double()


def by_lapack(inputs, targets, start, ridge) -> torch.Tensor:
    """The minimum by torch.linalg.lstsq: the ridge is so many more columns."""
    penalty = ridge**0.5 * torch.eye(len(inputs)).double()
    solution = torch.linalg.lstsq(
        torch.cat([inputs, penalty], 1).T,
        torch.cat([targets, start @ penalty], 1).T,
        driver="gelsd",
    )
    return solution.solution.T


@pytest.mark.parametrize("count", [40, 5, 1])
def test_the_solution_is_lapacks(count):
    """Catches a wrong normal equation, a ridge towards zero instead of Q₀, and batches that are not
    added up; with fewer columns than unknowns the ridge alone decides."""
    inputs, targets, start = columns(8, count, 0), columns(6, count, 1), columns(6, 8, 2)
    fit = LeastSquares(start)
    fit.add(inputs[:, :3], targets[:, :3])
    fit.add(inputs[:, 3:], targets[:, 3:])
    assert torch.equal(fit.solution, start)
    fit.solve()
    ridge = refit.RIDGE * inputs.square().sum(1).mean().item()
    expected = by_lapack(inputs, targets, start, ridge)
    torch.testing.assert_close(fit.solution, expected, rtol=1e-9, atol=1e-9)
    residual = (targets - expected @ inputs).square().sum()
    torch.testing.assert_close(fit.residual(), residual, rtol=1e-6, atol=1e-10)


def test_an_exact_start_and_inputs_of_zeros_are_kept():
    """Catches a division by zero, and rounding that grows where nothing is to be gained."""
    inputs, start = columns(8, 40, 0), columns(6, 8, 2)
    fit = LeastSquares(start)
    fit.add(inputs, start @ inputs)
    fit.solve()
    torch.testing.assert_close(fit.solution, start, rtol=1e-10, atol=1e-10)
    fit = LeastSquares(start)
    fit.add(torch.zeros(8, 3).double(), torch.zeros(6, 3).double())
    fit.solve()
    torch.testing.assert_close(fit.solution, start)


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "bias": False}, {"padding_mode": "reflect"}],
)
def test_each_layer_is_fitted_to_the_dense_responses_behind_the_refitted_ones(options):
    """Catches targets with the bias in them, a prefix that is dense or not refitted yet, one size's
    solution at another, and sums of weights taken for terms."""
    torch.manual_seed(0)
    options = {"padding": 1, **options}
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, **options), nn.ReLU(), nn.Conv2d(4, 4, 3, **options)
    ).double()
    images = torch.randn(2, 3, 16, 16).double()
    supernet = gross.decompose(model, (1, 2), skip=(), keep_costlier=True, quiet=True)
    expected, ours = {}, {}
    with torch.no_grad():
        hidden = model[0](images)
        for size in (1, 2):
            x, y = hidden, hidden
            for i in (1, 3):
                first, grouped, last = supernet[i].fold(size)
                r, y = grouped(first(x)), model[i](y)
                bias = 0 if last.bias is None else last.bias[:, None]
                inner, response = (each.transpose(0, 1).flatten(1) for each in (r, y))
                ridge = refit.RIDGE * inner.square().sum(1).mean().item()
                q = by_lapack(inner, response - bias, last.weight[:, :, 0, 0], ridge)
                last.weight.copy_(q[:, :, None, None])
                x = last(r)
                ours[i, size] = (x - y).norm() / y.norm()
                expected[i, size] = q
                x, y = x.relu(), y.relu()
    errors = match_responses(model, supernet, Calibration([images], torch.device("cpu")))
    for (i, size), q in expected.items():
        torch.testing.assert_close(supernet[i].fold(size)[2].weight[..., 0, 0], q)
        error = errors[str(i)][supernet[i].group_sizes.index(size)]
        assert error == pytest.approx(ours[i, size].item(), rel=1e-6)


def test_layers_with_other_sizes_stand_at_the_next_smaller_one():
    """Catches a size asked of a layer that has none such, and one that is fitted to several
    prefixes at once."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))).double()
    images = torch.randn(4, 8, 8, 8).double()
    data = Calibration([images], torch.device("cpu"))
    sizes = {"0": (2, 4), "1": (1, 2, 4, 8), "2": (4,)}
    supernet = gross.decompose(model, sizes, quiet=True)
    errors = match_responses(model, supernet, data)
    assert gross.configuration(supernet) == (4, 8, 4)
    with torch.no_grad():
        expected = model(images)
        set_configuration(supernet, (4, 4, 4))
        error = (supernet(images) - expected).norm() / expected.norm()
    assert errors["2"] == (pytest.approx(error.item(), rel=1e-6),)


def test_a_shared_layer_is_fitted_to_all_its_responses():
    """Catches a second call, or a second layer with the same terms, whose responses are lost or
    overwrite the first's."""
    torch.manual_seed(0)
    conv, other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)
    other.weight = conv.weight
    model = nn.Sequential(conv, nn.Tanh(), conv, nn.Tanh(), other).double()
    images = torch.randn(2, 4, 8, 8).double()
    sizes = {"0": (1,), "4": (1,)}
    supernet = gross.decompose(model, sizes, quiet=True)
    stages = [nn.Sequential(*supernet[i].fold(1)[:2]) for i in (0, 0, 4)]
    start = supernet[0].fold(1)[2].weight[..., 0, 0].detach().double()
    match_responses(model, supernet, Calibration([images], torch.device("cpu")))
    inner, targets = [], []
    with torch.no_grad():
        x = y = images
        for stage, layer in zip(stages, (conv, conv, other), strict=True):
            r, y = stage(x), layer(y)
            inner.append(r.transpose(0, 1).flatten(1))
            targets.append(y.transpose(0, 1).flatten(1) - layer.bias[:, None])
            r_all, t_all = torch.cat(inner, 1), torch.cat(targets, 1)
            ridge = refit.RIDGE * r_all.square().sum(1).mean().item()
            q = by_lapack(r_all, t_all, start, ridge)
            x = (torch.einsum("uo,nohw->nuhw", q, r) + layer.bias[:, None, None]).tanh()
            y = y.tanh()
    torch.testing.assert_close(supernet[0].pointwise_out[0][..., 0, 0].data, q)
    assert supernet[4].pointwise_out[0] is supernet[0].pointwise_out[0]


def test_layers_that_the_model_had_already_are_left_as_they_are():
    """Catches the calibration of a second decomposition that refits the first one's layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
    once = gross.decompose(model, {"1": (1, 2)}, quiet=True)
    twice = gross.decompose(once, {"2": (1, 2)}, calibration=torch.randn(2, 4, 9, 9), quiet=True)
    for name, value in once[1].state_dict().items():
        assert torch.equal(twice[1].state_dict()[name], value)
    first, second = vars(twice)["decomposition_report"].layers
    assert (first.name, first.response_errors) == ("1", None)
    assert second.response_errors is not None
