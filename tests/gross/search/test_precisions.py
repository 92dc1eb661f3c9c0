"""Searches that choose precisions: what a layer in 8 bits computes meanwhile, what it costs, and
what is found and exported."""

import itertools
import json
import math
import random
from dataclasses import replace

import gross
import pytest
import torch
from gross.architecture_search import Budget, Evolution, SearchResult, costs_of
from gross.architecture_search import report as evidence
from gross.architecture_search.space import Space
from gross.deployment import Int8
from gross.deployment.mixed import MixedSupernet
from gross.latency import LatencyTable
from gross.supernet import decomposed_layers, set_configuration
from torch import Tensor, nn

from .networks import rugged, supernet

NAMES = ("2", "4")
SIZES = (1, 2, 4, 8)
#: Layer 4 gains nothing by 8 bits, layer 2 a half.
TABLE = LatencyTable(
    "a device",
    1,
    (1, 3, 8, 8),
    "float32",
    True,
    rest=1.0,
    layers={name: {1: 2.0, 2: 3.0, 4: 5.0, 8: 9.0} for name in NAMES},
    dense=20.0,
    int8_rest=0.5,
    conversions={"2": 0.2, "4": -0.1},
    int8_layers={
        "2": {1: 1.0, 2: 1.5, 4: 2.5, 8: 4.5},
        "4": {1: 2.1, 2: 3.1, 4: 5.1, 8: 9.1},
    },
)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return supernet(2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Close:
    """How close the outputs are to those of the largest sizes in float32."""

    fingerprint = "close"

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        self.images, self.wanted = images, run(net, (8, 8), images)

    def __call__(self, model: nn.Module) -> float:
        return -float((model(self.images) - self.wanted).norm() / self.wanted.norm())


def run(net: nn.Module, sizes: tuple[int, ...], images: Tensor) -> Tensor:
    set_configuration(net, sizes)
    with torch.inference_mode():
        return net(images)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def everything(net: nn.Module, images: Tensor) -> dict[tuple, tuple[float, float]]:
    """By configuration and names of the layers in 8 bits: milliseconds and score, one by one."""
    mixed, metric = MixedSupernet(net, [images]), Close(net, images)
    found = {}
    for flags in itertools.product((False, True), repeat=2):
        mixed.set_precision(flags)
        int8 = tuple(itertools.compress(NAMES, flags))
        for c in itertools.product(SIZES, repeat=2):
            set_configuration(mixed.network, c)
            with torch.inference_mode():
                found[c, int8] = (TABLE.milliseconds(c, int8), metric(mixed.network))
    return found


@pytest.fixture(scope="module")
def known(net, images) -> dict[tuple, tuple[float, float]]:
    return everything(net, images)


def searched(net, images, precision="mixed", method="exhaustive", **options) -> SearchResult:
    budget = options.pop("budget", Budget(milliseconds=11.0, latency=TABLE))
    calibration = None if precision == "float32" else images
    options = {"precision": precision, "calibration": calibration, **options}
    return gross.search(net, Close(net, images), budget, method, **options)


# What is computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=2))[1:])
def test_what_a_search_sees_is_what_is_deployed(flags, images):
    """Catches an input with another's range, weights that are not rounded, and anything that stays
    in float32 or should: where no channels can be equalised between layers (SiLU), the two are the
    same but for roundings that fall to the other side. The error of 8 bits is a hundred times as
    large."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 5, 1),
    )
    with torch.no_grad():
        dense.train()(images)
    net = gross.decompose(dense, (4,), keep_costlier=True, quiet=True).eval()
    names = ["2", "5"]
    assert list(decomposed_layers(net)) == names
    mixed = MixedSupernet(net, [images])
    mixed.set_precision(flags)
    floats = [name for name, is_int8 in zip(names, flags, strict=True) if not is_int8]
    settings = Int8(most_error=1e9, float32=floats)
    exported = gross.export(net, example=images, precision=settings, calibration=images)
    with torch.inference_mode():
        wanted, seen, plain = exported(images), mixed.network(images), net(images)
    assert error(seen, wanted) < 0.01 * error(wanted, plain)
    assert 1e-3 < error(wanted, plain) < 0.1


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_its_own_weights(net, images, size):
    """Catches the weights of another size, which compute something else entirely."""
    mixed = MixedSupernet(net, [images])
    mixed.set_precision((True, True))
    set_configuration(mixed.network, size)
    with torch.inference_mode():
        seen = mixed.network(images)
    assert 1e-3 < error(seen, run(net, (size,) * 2, images)) < 0.1


def test_in_float32_nothing_is_rounded(net, images):
    """Catches what is in 8 bits without being told, and a supernet that is changed."""
    before = run(net, (2, 4), images)
    mixed = MixedSupernet(net, [images])
    mixed.set_precision((True, False))
    mixed.set_precision((False, False))
    assert torch.equal(run(mixed.network, (2, 4), images), before)
    assert torch.equal(run(net, (2, 4), images), before)


def test_a_module_that_nothing_calls_and_groups_stay_as_they_are(images):
    """Catches a network that calls a module never, or has one that no kernel of 8 bits takes."""
    torch.manual_seed(0)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.unused = nn.Conv2d(3, 8, 3), nn.Linear(4, 4)
            self.layer, self.grouped = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
            self.reflected = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
            self.last = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.reflected(self.grouped(self.layer(self.first(x).relu()).relu())).relu()
            return self.last(x.mean((2, 3)).unsqueeze(1)).squeeze(1)

    net = gross.decompose(
        Odd().eval(), (2, 4), skip=("first", "reflected"), keep_costlier=True, quiet=True
    )
    mixed = MixedSupernet(net, [images])
    mixed.set_precision((True,))
    with torch.inference_mode():
        assert error(mixed.network(images), run(net, (4,), images)) < 0.1


# What it costs ------------------------------------------------------------------------------------


def tables(seed: int) -> LatencyTable:
    """A table of random times."""
    generator = random.Random(seed)
    layers, lowered = (
        {name: {size: generator.uniform(1, 9) for size in SIZES} for name in NAMES}
        for _ in range(2)
    )
    rest = [generator.uniform(0, 9) for _ in range(2)]
    times = {"rest": rest[0], "int8_rest": rest[1], "layers": layers, "int8_layers": lowered}
    conversions = {name: generator.uniform(-1, 3) for name in NAMES}
    return replace(TABLE, **times, conversions=conversions)


@pytest.mark.parametrize("precision", ["float32", "int8", "mixed"])
@pytest.mark.parametrize("seed", range(4))
def test_costs_are_the_tables(net, seed, precision):
    """Catches times of the other precision, the other rest, and a smallest configuration that is
    none: a budget would be refused that something meets."""
    table = tables(seed)
    cost = costs_of(net, (3, 8, 8), table, precision)["milliseconds"]
    choices = tuple(tuple(layer) for layer in cost.per_layer)
    assert len(choices[0]) == 4
    if precision == "mixed":
        choices = tuple(own + tuple(-size for size in own) for own in choices)
    found = []
    for chosen in itertools.product(*choices):
        int8 = [name for name, choice in zip(NAMES, chosen, strict=True) if choice < 0]
        found.append(table.milliseconds(tuple(map(abs, chosen)), int8))
        assert cost(chosen) == pytest.approx(found[-1])
    assert cost.smallest == pytest.approx(min(found))
    for name in ("macs", "parameters"):
        other = costs_of(net, (3, 8, 8), table, precision)[name]
        plain = costs_of(net, (3, 8, 8))[name]
        assert other(tuple(c[-1] for c in choices)) == plain(tuple(abs(c[-1]) for c in choices))


@pytest.mark.parametrize("seed", range(4))
def test_draws_reach_all_that_is_allowed(net, seed):
    """Catches steering that forgets a precision, or never finds the few that are within."""
    costs = costs_of(net, None, tables(seed), "mixed")
    cost = costs["milliseconds"]
    choices = tuple((*layer, *(-size for size in layer)) for layer in cost.per_layer)
    most = sorted(map(cost, itertools.product(*choices)))[5]
    limits = Budget(milliseconds=most + 1e-9, latency=TABLE).limits(costs)
    space = Space(choices, limits)
    generator = random.Random(0)
    drawn = {space._steered(generator) for _ in range(1000)}
    assert set(space) <= drawn
    assert len(set(space)) == 6
    assert space.allows(space.draw(generator))


# What is found ------------------------------------------------------------------------------------


def test_mixed_is_better_than_either_alone(net, images, known):
    """Catches scores of another precision, a budget by another, and a space without some: against
    every combination, one by one. Layer 2 gains time by 8 bits and layer 4 nothing but an
    error."""
    results = {p: searched(net, images, p) for p in ("float32", "int8", "mixed")}
    allowed = {key: score for key, (time, score) in known.items() if time <= 11.0}
    spaces = {
        "float32": {key for key in allowed if not key[1]},
        "int8": {key for key in allowed if key[1] == NAMES},
        "mixed": set(allowed),
    }
    for precision, result in results.items():
        keys = {(e.configuration, e.int8): e for e in result.evaluations}
        assert set(keys) == spaces[precision]
        for key, e in keys.items():
            assert e.score == pytest.approx(known[key][1], rel=1e-4)
            assert e.costs["milliseconds"] == pytest.approx(known[key][0])
        assert result.score == max(e.score for e in result.evaluations)
        assert result.found.score == result.score
    assert results["mixed"].int8 == ("2",)
    assert results["mixed"].score > max(results["float32"].score, results["int8"].score) + 1e-3


@pytest.mark.parametrize("method", ["breadth-first", "random", "evolution"])
def test_every_method_chooses_precisions(net, images, method):
    """Catches a method that sees sizes alone."""
    best = searched(net, images).score
    if method == "evolution":
        cost = costs_of(net, None, TABLE, "mixed")["milliseconds"]
        method = Evolution(cost, evaluations=150, population=20)
    result = searched(net, images, method=method)
    assert result.score == pytest.approx(best)
    assert {e.int8 for e in result.evaluations} == {(), ("2",), ("4",), NAMES}
    assert all(e.costs["milliseconds"] <= 11.0 for e in result.evaluations)
    if result.random is not None:
        assert result.random.costs["milliseconds"] <= 11.0
        assert min(result.random.configuration) > 0


def test_accuracies_by_tree_are_those_one_by_one(net, images):
    """Catches a tree whose branches share what another precision computed."""
    data = (images, run(net, (2, 8), images).argmax(1))
    budget = Budget(milliseconds=11.0, latency=TABLE)
    options = {"precision": "mixed", "calibration": images}
    result = gross.search(net, data, budget, "exhaustive", **options)
    mixed, accuracy = MixedSupernet(net, [images]), gross.Accuracy(data)
    for e in result.evaluations:
        mixed.set_precision([name in e.int8 for name in NAMES])
        set_configuration(mixed.network, e.configuration)
        assert accuracy(mixed.network) == e.score


@pytest.mark.parametrize("method", ["exhaustive", "breadth-first"])
def test_the_cheapest_that_is_good_enough(net, images, known, method):
    """Catches a bound on the metric that is not held, and the best score where the fewest
    milliseconds are wanted."""
    least = sorted(score for _, score in known.values())[-20]
    budget = Budget(latency=TABLE, least_score=least - 1e-6)
    result = searched(net, images, method=method, budget=budget)
    good = [time for time, score in known.values() if score >= least]
    assert result.found.costs["milliseconds"] == pytest.approx(min(good))
    assert result.score >= least - 1e-4
    assert result.score < max(score for _, score in known.values()) - 1e-3
    with pytest.warns(UserWarning, match="no configuration has a score of 1"):
        searched(net, images, budget=replace(budget, least_score=1.0))


def test_the_first_runs_start_from_the_smaller_search(net, images):
    """Catches starts without their precision."""
    small = searched(net, images, budget=Budget(milliseconds=9.0, latency=TABLE))
    method = gross.architecture_search.BreadthFirst(1, 0)
    seen: list[tuple[bool, ...]] = []

    class Note(MixedSupernet):
        def set_precision(self, int8) -> None:
            seen.append(tuple(int8))
            super().set_precision(int8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gross.architecture_search.searching.MixedSupernet", Note)
        patch.setattr("gross.architecture_search.evaluations.MixedSupernet", Note)
        searched(net, images, method="breadth-first", smaller=small)
    assert method.runs == 1
    assert seen[0] == tuple(name in small.int8 for name in NAMES)


def test_a_journal_holds_precisions(net, images, tmp_path):
    """Catches an evaluation that is repeated or taken for another precision's, and a journal of
    other calibration data."""
    path = tmp_path / "journal"
    first = searched(net, images, journal=path)
    calls: list[int] = []

    class Counted(Close):
        def __call__(self, model: nn.Module) -> float:
            calls.append(1)
            return super().__call__(model)

    budget = Budget(milliseconds=11.0, latency=TABLE)
    options = {"precision": "mixed", "calibration": images, "journal": path}
    again = gross.search(net, Counted(net, images), budget, "exhaustive", **options)
    assert not calls
    assert again.evaluations == first.evaluations
    with pytest.raises(ValueError, match="another calibration"):
        searched(net, images, calibration=images * 2, journal=path)


# What becomes of it -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(net, images) -> SearchResult:
    return searched(net, images, method="breadth-first", input_size=(3, 8, 8))


def test_a_result_comes_back_from_its_file(result, tmp_path):
    """Catches precisions that are lost, and files from before there were any."""
    path = tmp_path / "result.json"
    result.save(path)
    assert SearchResult.load(path) == result
    assert result.layers == NAMES
    content = json.loads(path.read_text())
    (old,) = content["searches"]
    del old["int8"], old["layers"]
    old["evaluations"] = [e for e in old["evaluations"] if not e["int8"]]
    for e in (*old["evaluations"], old["random"]):
        e.pop("int8")
    old["configuration"] = old["evaluations"][0]["configuration"]
    path.write_text(json.dumps(content))
    before = SearchResult.load(path)
    assert before.precision == "float32"
    assert str(before)


def test_reports_show_precisions(result, tmp_path):
    """Catches bits that stand nowhere beside the MACs, and a figure of the wrong cost."""
    (size, other), wanted = result.configuration, result.int8
    assert wanted == ("2",)
    assert f"{size}i {other}" in str(result)
    files = evidence.write(tmp_path, [result])
    text = (tmp_path / "report.md").read_text()
    assert f"| found | {size}i {other} |" in text
    assert f"| {result.found.costs['milliseconds']:.3g} |" in text
    assert all(path.stat().st_size > 100 for path in files)


def test_the_export_has_what_was_found(net, images, result):
    """Catches layers in the other precision, and bounds that take a choice back."""
    options = {"example": images, "calibration": images}
    found = gross.export(net, result.configuration, precision=result.precision, **options)
    bits = {r.name: r.loss.reason for r in found.report.steps if r.loss is not None}
    assert {name for name, reason in bits.items() if not reason} == {"0", "2", "8"}
    assert bits["4"] == "as asked for"
    assert "as asked for" in str(found.report)
    floats = replace(result, int8=())
    assert gross.export(net, precision=floats.precision, example=images).report.error is None
    scored = Close(net, images)(found)
    assert scored == pytest.approx(result.score, abs=0.02)
    with pytest.raises(ValueError, match=r"float32: got 'features', accepted are names of layers"):
        gross.export(net, precision=Int8(float32=["features"]), **options)
    with pytest.raises(TypeError, match="float32: got '2', accepted are names"):
        Int8(float32="2")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"precision": "int4"}, ValueError, "precision: got 'int4'"),
        ({"calibration": None}, TypeError, "calibration: got None"),
        ({"budget": Budget(parameters=1e9)}, ValueError, "got none in milliseconds"),
        ({"budget": Budget(least_score=0.0)}, ValueError, "got no latency table"),
        ({"budget": Budget(milliseconds=9.0)}, ValueError, "got no latency table"),
        (
            {"budget": Budget(milliseconds=9.0, latency=replace(TABLE, int8_layers={}))},
            ValueError,
            "got a table of float32 alone for precision 'mixed'",
        ),
        ({"budget": Budget(milliseconds=2.0, latency=TABLE)}, ValueError, "at least 3.4"),
        ({"precision": "int8", "budget": (8, 8)}, ValueError, r"got the configuration \(8, 8\)"),
        ({"precision": "float32", "calibration": torch.ones(9, 3, 8, 8)}, ValueError, "got data"),
        ({"calibration": [torch.ones(9, 3, 8, 8), 3]}, TypeError, "calibration"),
        ({"calibration": torch.full((9, 3, 8, 8), math.nan)}, ValueError, "not finite"),
    ],
)
def test_bad_input_is_refused_before_any_evaluation(net, images, options, kind, message):
    """Catches a search that finds out later, or searches something else."""
    calls: list[int] = []
    options = {"precision": "mixed", "calibration": images, **options}
    budget = options.pop("budget", Budget(milliseconds=11.0, latency=TABLE))
    with pytest.raises(kind, match=message):
        gross.search(net, lambda model: calls.append(1) or 1.0, budget, **options)
    assert not calls


def test_8_bits_are_for_float32_on_a_cpu(images):
    """Catches an error from deep inside."""
    half = supernet(2).to(torch.bfloat16)
    budget = Budget(milliseconds=11.0, latency=TABLE)
    with pytest.raises(ValueError, match="accepted for 8 bits is float32 on a CPU"):
        gross.search(half, rugged, budget, precision="mixed", calibration=images)
