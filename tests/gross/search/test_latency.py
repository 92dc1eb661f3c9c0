"""Latency tables: what is timed, how it adds up, and the file."""

import platform
import resource
import statistics
import subprocess
import sys

import gross
import pytest
import torch
from gross import latency
from gross.architecture_search import Budget, costs_of
from gross.latency import LatencyTable
from torch import Tensor, nn

from .networks import rugged, supernet


@pytest.fixture(scope="module")
def measured() -> tuple[nn.Module, Tensor, LatencyTable]:
    torch.manual_seed(0)
    net, example = supernet(), torch.randn(2, 3, 8, 8)
    return net, example, LatencyTable.measure(net, example, seconds=0.2)


def test_every_layer_is_timed_at_every_size(measured):
    """Catches a layer or a size without a number, and numbers that are none."""
    net, _, table = measured
    table.check_layers(net)
    assert all(0 < ms < 1000 for layer in table.layers.values() for ms in layer.values())
    assert 0 < table.rest < 1000
    assert table.dense > 0
    assert table.input_size == (2, 3, 8, 8)
    assert table.device in str(table)


def test_a_prediction_is_the_sum_of_its_parts(measured):
    """Catches a layer that is added twice, or the rest forgotten; and a cost that is another."""
    net, _, table = measured
    wanted = (8, 1, 2, 4)
    parts = [layer[s] for layer, s in zip(table.layers.values(), wanted, strict=True)]
    assert table.milliseconds(wanted) == pytest.approx(table.rest + sum(parts))
    assert costs_of(net, None, table)["milliseconds"](wanted) == table.milliseconds(wanted)


def test_layers_are_timed_where_they_stand(monkeypatch):
    """Catches a layer whose time is another layer's, or has the rest in it, and exported networks
    that do not count: on a clock on which the layer ``i`` takes ``(i + 1)·size`` milliseconds, and
    everything else 5; exported, both take half."""
    now = [0.0]
    monkeypatch.setattr(latency, "_now", lambda device: now[0])
    taken_apart = latency._apart

    def slow(net: nn.Module, c: tuple[int, ...], kernels: bool) -> nn.Module:
        network = taken_apart(net, c, kernels)
        for i, name in enumerate(gross.supernet.decomposed_layers(net)):
            pause(network.get_submodule(name), (i + 1) * c[i])
        pause(network[-1], 5)
        return network

    def fast(net: nn.Module, c: tuple[int, ...], **options: object) -> nn.Module:
        network = nn.Identity()
        pause(network, (5 + sum((i + 1) * size for i, size in enumerate(c))) / 2)
        return network

    def pause(module: nn.Module, milliseconds: float) -> None:
        forward = module.forward

        def slower(input: Tensor) -> Tensor:
            now[0] += milliseconds / 1000
            return forward(input)

        module.forward = slower

    monkeypatch.setattr(latency, "_apart", slow)
    monkeypatch.setattr(latency, "export", fast)
    net, example = supernet(), torch.randn(1, 3, 8, 8)
    table = LatencyTable.measure(net, example, seconds=0)
    expected = [{s: (i + 1) * s / 2 for s in (1, 2, 4, 8)} for i in range(4)]
    for layer, times in zip(table.layers.values(), expected, strict=True):
        assert layer == pytest.approx(times)
    assert table.rest == pytest.approx(2.5)
    check = table.check(net, example, configurations=4, seconds=0)
    assert check.measured == pytest.approx(check.predicted)
    assert check.median_error == pytest.approx(0, abs=1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_activations_are_not_in_fresh_pages():
    """Catches measurements that are of page faults: 48 MB come in fresh pages by default, twice in
    each of four calls. What is kept grows once more where the heap is in pieces. In a process of
    its own, as memory is kept for the rest of one."""
    script = """
import resource, torch
from gross.latency import milliseconds
from torch import nn

net, example = nn.Sequential(nn.Conv2d(3, 48, 1), nn.ReLU()).eval(), torch.ones(1, 3, 512, 512)
milliseconds([net], example, seconds=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
with torch.inference_mode():
    for _ in range(4):
        net(example)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", script]
    faults = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    block = 48 * 2**20 // resource.getpagesize()
    assert faults < 1.5 * block


def test_precision_is_a_column(measured, tmp_path):
    """Catches layers of 8 bits whose times are those of float32, a rest that is another's, and a
    column that a file loses."""
    net, example, _ = measured
    calibration = torch.randn(16, 3, 8, 8)
    table = LatencyTable.measure(net, example, seconds=0.1, calibration=calibration)
    assert {n: set(t) for n, t in table.int8_layers.items()} == {
        n: set(t) for n, t in table.layers.items()
    }
    assert all(0 < ms < 1000 for layer in table.int8_layers.values() for ms in layer.values())
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    names, wanted = list(table.layers), (8, 1, 2, 4)
    lowered = [table.int8_layers[n][s] for n, s in zip(names, wanted, strict=True)]
    assert table.milliseconds(wanted, names) == pytest.approx(table.int8_rest + sum(lowered))
    mixed = table.milliseconds(wanted, names[:1])
    floats = list(zip(names, wanted, strict=True))[1:]
    times = [table.layers[n][s] + table.conversions[n] for n, s in floats]
    assert mixed == pytest.approx(table.int8_rest + table.int8_layers[names[0]][8] + sum(times))
    assert "8 int8" in str(table)
    assert f"{table.conversions[names[1]]:.3f}" in str(table)


def test_conversions_are_those_of_whole_networks(monkeypatch):
    """Catches a layer in float32 among 8 bits that is thought to cost what it costs among its like:
    on a clock on which layer ``i`` takes ``(i + 1)·size`` milliseconds in float32 and half of that
    in 8 bits, everything else 5 and 3, and the conversions around a layer its size and one."""
    now = [0.0]
    monkeypatch.setattr(latency, "_now", lambda device: now[0])

    class Paused(nn.Module):
        def __init__(self, milliseconds: float) -> None:
            super().__init__()
            self.milliseconds = milliseconds

        def forward(self, input: Tensor) -> Tensor:
            now[0] += self.milliseconds / 1000
            return input

    def exported(net: nn.Module, c: tuple[int, ...], precision: object = None, **_: object):
        if precision is None:
            return Paused(5 + sum((i + 1) * size for i, size in enumerate(c)))
        total = 3.0
        for i, (name, size) in enumerate(
            zip(gross.supernet.decomposed_layers(net), c, strict=True)
        ):
            total += (i + 1) * (size + 1 if name in precision.float32 else size / 2)
        return Paused(total)

    class Clock:
        def __init__(self, network: nn.Module, names: list[str], device: object) -> None:
            self.network, self.names = network, names

        def __call__(self, example: Tensor) -> tuple[float, list[float]]:
            c = gross.configuration(self.network)
            parts = [(i + 1) * size for i, size in enumerate(c)]
            return 5 + sum(parts), parts

    names = list(gross.supernet.decomposed_layers(supernet()))
    monkeypatch.setattr(latency, "export", exported)
    monkeypatch.setattr(latency, "_LayerClock", Clock)
    monkeypatch.setattr(
        latency,
        "in_8_bits",
        lambda layer, read, settings: {s: Paused(s * next(place)) for s in layer.group_sizes},
    )
    place = (i + 1 for i in range(4) for _ in range(4))
    example = torch.randn(8, 3, 8, 8)
    table = LatencyTable.measure(supernet(), example, seconds=0, calibration=example)
    for i, name in enumerate(names):
        times = {s: (i + 1) * s / 2 for s in (1, 2, 4, 8)}
        assert table.int8_layers[name] == pytest.approx(times)
        assert table.conversions[name] == pytest.approx(i + 1)
    assert table.int8_rest == pytest.approx(3)
    assert table.milliseconds((8, 1, 2, 4), names[1:]) == pytest.approx(3 + 9 + 1 + 3 + 8)


def test_a_line_through_totals():
    """Catches a factor and a rest that are exchanged, and a rest below zero."""
    assert latency._line([1.0, 2.0, 3.0], [5.0, 7.0, 9.0]) == pytest.approx((2.0, 3.0))
    assert latency._line([1.0, 2.0], [1.0, 3.0]) == pytest.approx((4 / 3, 0.0))
    assert latency._line([2.0], [3.0]) == pytest.approx((1.5, 0.0))


def test_the_error_is_of_whole_networks(measured):
    """Catches an error that compares the prediction with itself."""
    net, example, table = measured
    check = table.check(net, example, configurations=3, seconds=0.1)
    errors = [abs(p - m) / m for p, m in zip(check.predicted, check.measured, strict=True)]
    assert check.median_error == statistics.median(errors) > 0
    assert "median error" in str(check)


def test_a_table_comes_back_from_its_file(measured, tmp_path):
    """Catches group sizes that JSON turns into text, and files of something else."""
    _, _, table = measured
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(ValueError, match="not a latency table"):
        LatencyTable.load(tmp_path / "table.json")


def test_milliseconds_are_a_budget(measured):
    """Catches a search that minds MACs instead; and a table of another network."""
    net, _, table = measured
    limit = table.milliseconds((4, 4, 4, 4))
    budget = Budget(milliseconds=limit, latency=table)
    result = gross.search(net, rugged, budget, "exhaustive")
    assert all(table.milliseconds(e.configuration) <= limit for e in result.evaluations)
    assert any(table.milliseconds(e.configuration) > 0.9 * limit for e in result.evaluations)
    with pytest.raises(ValueError, match="milliseconds, accepted is at least"):
        gross.search(net, rugged, Budget(milliseconds=table.rest / 2, latency=table))
    with pytest.raises(ValueError, match="got a table of the layers"):
        gross.search(supernet(3), rugged, budget)
