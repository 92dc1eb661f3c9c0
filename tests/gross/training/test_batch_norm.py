"""Batch-norm recalibration: the statistics of one configuration."""

import copy

import gross
import pytest
import torch
from gross.training import recalibrate
from torch import nn


def make_network() -> nn.Module:
    """Two batch norms, each behind a layer whose output depends on the configuration."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 1)]
    for _ in range(2):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=0.3), nn.Dropout(0.5)]
    network = nn.Sequential(*layers)
    return gross.decompose(network, (1, 2, 4), skip=(), method="random", quiet=True).train()


def test_statistics_become_those_of_the_configuration():
    """Catches statistics that keep a share of the old ones, or come from dropout's training mode or
    from another configuration: against means and variances taken by hand."""
    supernet = make_network()
    supernet(torch.randn(8, 3, 6, 6))
    before = copy.deepcopy(supernet.state_dict())
    images = torch.randn(12, 3, 6, 6)
    for sizes in ((1, 4), (4, 1)):
        gross.set_configuration(supernet, sizes)
        recalibrate(supernet, images)
        features = supernet[1](supernet[0](images))
        torch.testing.assert_close(supernet[2].running_mean, features.mean((0, 2, 3)))
        torch.testing.assert_close(supernet[2].running_var, features.var((0, 2, 3)))
        inner = supernet[4](copy.deepcopy(supernet[2]).train()(features))
        torch.testing.assert_close(supernet[5].running_mean, inner.mean((0, 2, 3)))
    assert all(m.training for m in supernet.modules())
    assert supernet[2].momentum == 0.3
    moved = {n for n, t in supernet.state_dict().items() if not torch.equal(t, before[n])}
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert moved <= {f"{i}.{name}" for i in (2, 5) for name in names}


def test_batches_count_alike_and_an_iterable_will_do():
    """Catches an average in which the last batch counts most."""
    supernet = make_network()
    images = torch.randn(12, 3, 6, 6)
    recalibrate(supernet, images, batch_size=4)
    cut = copy.deepcopy(supernet.state_dict())
    features = supernet[1](supernet[0](images))
    torch.testing.assert_close(supernet[2].running_mean, features.mean((0, 2, 3)))
    recalibrate(supernet, (images[i : i + 4] for i in (0, 4, 8)))
    assert all(torch.equal(t, cut[n]) for n, t in supernet.state_dict().items())


def test_no_inputs_and_no_batch_norm():
    """Catches statistics that are reset and never filled."""
    supernet = make_network()
    before = copy.deepcopy(supernet.state_dict())
    for nothing in (torch.empty(0, 3, 6, 6), []):
        with pytest.raises(ValueError, match="inputs: got none"):
            recalibrate(supernet, nothing)
    assert all(torch.equal(t, before[n]) for n, t in supernet.state_dict().items())
    recalibrate(nn.Conv2d(3, 8, 1), torch.empty(0, 3, 6, 6))
