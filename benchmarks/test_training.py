"""One epoch of fine-tuning the supernet of the paper's 4-layer network beside one epoch of training
the network itself: the papers' recipes, random images, one after the other on the same threads.

5 120 images by default, CIFAR-10's 40 000 with ``--full``. Two figures: the ratio of the epochs'
times, whose goal is 0.35, and the loader's share of a step, whose goal is 0.10. Memory is kept or
given back to the system as glibc does by default: the first is what ``gross train`` does."""

from __future__ import annotations

import statistics
from typing import Any

import gross
import pytest
import torch
from gross.data import Data, Images
from gross.training import Recipe
from gross.training.memory import keep_freed_memory
from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(group="training")


# In this order: memory that is kept stays so for the rest of the process.
@pytest.mark.parametrize("memory", ["given back", "kept"])
def test_finetuning_epoch(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    memory: str,
) -> None:
    full = request.config.getoption("--full", False)
    if memory == "kept" and not keep_freed_memory():
        pytest.skip("this C library cannot be told to keep what is freed")
    data = noise(40_000 if full else 5_120)
    network = gross.networks.build("4-layer")
    structure = gross.networks.structure("4-layer")
    supernet = gross.decompose(network, **structure, method="random", quiet=True)
    # Rates at which random weights and labels stay finite; the work is the same.
    dense = Recipe.load("4-layer").override({"epochs": 1, "optimizer.lr": 1e-5})
    series = Recipe.load("4-layer-gross").override({"epochs": 1, "optimizer.lr": 1e-6})
    records: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def one_round() -> None:
        seed = len(records)
        trained = gross.train(network, data, dense, seed=seed, quiet=True).epochs[0]
        tuned = gross.finetune(supernet, data, series, seed=seed, quiet=True).epochs[0]
        records.append((trained, tuned))

    benchmark.pedantic(one_round, rounds=3 if full else 7, warmup_rounds=1)
    del records[0]
    ratios = sorted(tuned["seconds"] / trained["seconds"] for trained, tuned in records)
    shares = [record["loader_seconds"] / record["seconds"] for pair in records for record in pair]
    figures = {
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "training images/s": statistics.median(t["images_per_second"] for t, _ in records),
        "fine-tuning images/s": statistics.median(t["images_per_second"] for _, t in records),
        "loader share": statistics.median(shares),
    }
    benchmark.extra_info.update(figures | {"memory": memory, "threads": torch.get_num_threads()})
    with capsys.disabled():
        shown = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        print(f"\nmemory {memory}: {shown}")


def noise(count: int) -> Data:
    """Random pixels and labels of CIFAR-10's shape."""
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    train = Images(pixels, torch.randint(10, (count,)))
    few = Images(train.pixels[:10], train.labels[:10])
    return Data("noise", train, few, few, tuple("0123456789"), (3, 32, 32))
