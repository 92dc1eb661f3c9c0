"""Block term decomposition of trained kernels: its error beside Tucker deflation and Adam, and what
whole networks cost.

The kernels are those of the paper's 4-layer network after 15 epochs on scikit-learn's digits,
resized to 32×32."""

from __future__ import annotations

import itertools
import resource
import sys
import time
from functools import cache

import gross
import pytest
import tensorly
import torch
import torch.nn.functional as F
import torchvision
from gross.decomposition.block_term import BlockTerm, block_term_series
from gross.networks import build
from pytest_benchmark.fixture import BenchmarkFixture
from sklearn.datasets import load_digits
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

pytestmark = pytest.mark.benchmark(group="decomposition")

GROUP_SIZES = (1, 4, 16, 32)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_trained_kernel(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], layer: int
) -> None:
    """At each size Tucker deflation and Adam get the time that the series has taken up to it."""
    weight = trained_kernels()[layer]
    fits: list[BlockTerm] = benchmark.pedantic(block_term_series, (weight, GROUP_SIZES), rounds=1)
    elapsed = itertools.accumulate(fit.seconds for fit in fits)
    lines = [
        f"\n{tuple(weight.shape)}: relative errors after equal times; condition numbers; "
        "norm of terms over kernel"
    ]
    for fit, seconds in zip(fits, elapsed, strict=True):
        s = fit.group_size
        row = {
            "alternating least squares": fit.relative_error,
            "Tucker deflation": tucker_deflation(weight, s, seconds),
            "Adam": min(adam(weight, s, seconds, rate) for rate in (0.03, 0.1)),
        }
        benchmark.extra_info[f"s = {s}"] = row | {"seconds": fit.seconds}
        assert fit.relative_error <= 1.03 * min(row.values()) + 1e-5
        conditions = [
            float(torch.linalg.cond(each[:, :, 0, 0]))
            for each in (fit.pointwise_in, fit.pointwise_out)
        ]
        lines.append(
            f"s = {s:3d}: "
            + ", ".join(f"{name} {error:.4f}" for name, error in row.items())
            + f"; {seconds:.2f} s; {conditions[0]:.0f}, {conditions[1]:.0f}; "
            + f"{term_norm(fit) / weight.norm():.2f}"
        )
    with capsys.disabled():
        print("\n".join(lines))


@pytest.mark.full
@pytest.mark.parametrize("workers", [2, 1])
@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_network(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], name: str, workers: int
) -> None:
    """All convolutions at the default sizes, 50 sweeps each: the time does not depend on the
    kernels' entries."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)()
    options = {"workers": workers, "tolerance": 0, "quiet": True}
    processor = time.process_time()
    benchmark.pedantic(gross.decompose, (network,), options, rounds=1)
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    with capsys.disabled():
        print(
            f"\n{name}, {workers} workers: {benchmark.stats.stats.total:.0f} s, "
            f"{time.process_time() - processor:.0f} s of processor time, "
            f"peak memory {peak / 1e9:.2f} GB"
        )


@cache
def trained_kernels() -> list[Tensor]:
    """The kernels of the 4-layer network's convolutions."""
    torch.manual_seed(0)
    digits, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(digits).float().reshape(-1, 1, 8, 8).sub(8).div(6)
    images = F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.from_numpy(labels)
    network = build("4-layer")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    for _ in range(15):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return [module.weight.detach() for module in network.modules() if isinstance(module, nn.Conv2d)]


def tucker_deflation(weight: Tensor, group_size: int, seconds: float) -> float:
    """Relative error of partial Tucker decompositions, group after group, each of what the other
    groups leave."""
    width = weight.shape[1]
    blocks = torch.zeros(width // group_size, *weight.shape)
    rest = weight.clone()
    began = time.perf_counter()
    with tensorly.backend_context("pytorch"):
        for i, g in enumerate(itertools.cycle(range(len(blocks)))):
            if i >= len(blocks) and time.perf_counter() - began > seconds:
                break
            rest += blocks[g]
            (core, factors), _ = partial_tucker(rest, [group_size] * 2, [0, 1], n_iter_max=1)
            blocks[g] = tensorly.tenalg.multi_mode_dot(core, factors, [0, 1])
            rest -= blocks[g]
    return (rest.norm() / weight.norm()).item()


def adam(weight: Tensor, group_size: int, seconds: float, rate: float) -> float:
    """Relative error after Adam on P, R and Q, its learning rate falling linearly to zero over the
    time."""
    target = (weight / weight.square().mean().sqrt()).flatten(2)
    width = weight.shape[1]
    groups = width // group_size
    inner = nn.init.orthogonal_(torch.empty(width, width)).reshape(groups, group_size, width)
    outer = torch.randn(groups, group_size, len(weight)) / width**0.5
    core = torch.randn(groups, group_size, group_size, target.shape[2])
    factors = [factor.requires_grad_() for factor in (inner, core, outer)]
    optimizer = torch.optim.Adam(factors, lr=rate)
    began = time.perf_counter()
    while (left := 1 - (time.perf_counter() - began) / seconds) > 0:
        optimizer.param_groups[0]["lr"] = rate * left
        rows = torch.einsum("gmsk,gst->gmtk", core, inner).flatten(2).flatten(0, 1)
        loss = (outer.flatten(0, 1).T @ rows - target.flatten(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.sqrt().item()


def term_norm(fit: BlockTerm) -> float:
    """The root of the summed squares of the norms of the terms."""
    groups = len(fit.pointwise_in) // fit.group_size
    inner = fit.pointwise_in[:, :, 0, 0].unflatten(0, (groups, -1))
    outer = fit.pointwise_out[:, :, 0, 0].unflatten(1, (groups, -1))
    core = fit.grouped.flatten(2).unflatten(0, (groups, -1))
    return torch.einsum("ugm,gmsk,gst->gutk", outer, core, inner).norm().item()
