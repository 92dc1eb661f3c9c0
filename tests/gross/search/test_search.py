"""``gross.search``: each method against a plain reference, budgets, journals and failures."""

import itertools
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gross
import numpy as np
import pytest
import torch
from gross.architecture_search import (
    BreadthFirst,
    Budget,
    Evolution,
    Exhaustive,
    SearchResult,
    costs_of,
)
from gross.architecture_search.journal import fingerprint
from gross.architecture_search.space import Space
from gross.macs import macs
from gross.supernet import configuration, decomposed_layers, set_configuration
from torch import nn

from .networks import rugged, supernet

INPUT = (3, 8, 8)
SIZES = (1, 2, 4, 8)


def every_configuration(layers: int = 4) -> list[tuple[int, ...]]:
    return list(itertools.product(SIZES, repeat=layers))


class Counting:
    """A metric that remembers what it was called for."""

    def __init__(self, metric=rugged) -> None:
        self.metric = metric
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, model: nn.Module) -> float:
        self.calls.append(configuration(model))
        return self.metric(model)


def scores() -> dict[tuple[int, ...], float]:
    net = supernet()
    found = {}
    for c in every_configuration():
        set_configuration(net, c)
        found[c] = rugged(net)
    return found


MACS = macs(supernet(), INPUT)


def cost(c: tuple[int, ...]) -> int:
    return MACS.with_configuration(c).total


# Methods ------------------------------------------------------------------------------------------


def test_exhaustive_search_finds_the_best_within_the_base(tmp_path):
    """Catches a filter on the wrong side of the base's cost, and configurations left out."""
    base, metric = (4, 2, 4, 2), Counting()
    result = gross.search(supernet(), metric, base, "exhaustive", input_size=INPUT)
    allowed = [c for c in every_configuration() if cost(c) <= cost(base)]
    assert sorted(metric.calls) == sorted(set(metric.calls)) == sorted(allowed)
    best = max(score for c, score in scores().items() if c in allowed)
    assert result.score == best == scores()[result.configuration]
    assert result.base.score == scores()[base]
    assert result.base.costs["macs"] == cost(base) >= cost(result.configuration)


def greedy(starts, allowed, score) -> list[tuple[int, ...]]:
    """Section 3.4, written down again: where each run ends."""
    ends = []
    for current in starts:
        for _ in range(25):
            best, best_score = current, score[current]
            for i in range(len(current)):
                for size in SIZES:
                    other = (*current[:i], size, *current[i + 1 :])
                    if allowed(other) and score[other] > best_score:
                        best, best_score = other, score[other]
            if best == current:
                break
            current = best
        ends.append(current)
    return ends


def test_breadth_first_search_is_the_papers():
    """Catches a step to a neighbour of two changes, a run that goes on downhill or stops early,
    and starts beyond the base. The reference is written on its own."""
    base, score = (2, 4, 2, 4), scores()
    metric = Counting()
    starts = tuple(c for c in every_configuration() if cost(c) <= cost(base))[::9]
    method = BreadthFirst(runs=len(starts), starts=starts)
    result = gross.search(supernet(), metric, base, method, input_size=INPUT)
    ends = greedy(starts, lambda c: cost(c) <= cost(base), score)
    assert result.score == max(score[c] for c in ends)
    assert len(set(metric.calls)) == len(metric.calls), "no configuration is evaluated twice"
    assert all(cost(c) <= cost(base) for c in metric.calls)
    for start, end in zip(starts, ends, strict=True):
        alone = BreadthFirst(runs=1, starts=(start,))
        assert gross.search(supernet(), rugged, base, alone, input_size=INPUT).score == score[end]


def test_a_run_ends_where_no_neighbour_is_better():
    """Catches steps sideways: on a plateau a run knows its start and that one's neighbours."""
    method = BreadthFirst(runs=1, starts=((1, 1, 1, 1),))
    result = gross.search(supernet(), lambda model: 1.0, None, method)
    assert result.method == "breadth-first"
    assert len(result.evaluations) == 1 + 4 * 3


def test_a_step_limit_ends_a_run():
    """Catches a limit that is not looked at."""
    method = BreadthFirst(runs=1, steps=1, starts=((1, 1, 1, 1),))
    result = gross.search(supernet(), rugged, None, method)
    score, start = scores(), (1, 1, 1, 1)
    near = [c for c in score if sum(a != b for a, b in zip(c, start, strict=True)) <= 1]
    assert result.score == max(score[c] for c in near)


def test_the_first_runs_start_from_the_smaller_search():
    """Catches seeding that is dropped: with one run, the search starts at the best known."""
    net = supernet()
    small = gross.search(net, rugged, (1, 2, 1, 2), "exhaustive", input_size=INPUT)
    metric = Counting()
    result = gross.search(net, metric, (2, 2, 2, 2), input_size=INPUT, smaller=small)
    assert metric.calls[0] == small.configuration == small.top(10)[0]
    assert result.score >= small.score


@pytest.mark.parametrize("method", ["breadth-first", "random", "evolution"])
def test_the_same_seed_gives_the_same_result(method):
    """Catches randomness that is not seeded."""
    runs = [
        gross.search(supernet(6), rugged, "70%", method, input_size=INPUT, seed=seed)
        for seed in (3, 3, 4)
    ]
    evaluated = [[e.configuration for e in run.evaluations] for run in runs]
    assert evaluated[0] == evaluated[1] != evaluated[2]
    assert runs[0].random == runs[1].random
    assert (runs[0].random is None) == (method == "random")


def test_random_search_is_the_baseline_with_as_many_evaluations():
    """Catches a baseline that costs less than what it is compared with."""
    metric = Counting()
    result = gross.search(supernet(6), metric, None, BreadthFirst(runs=2), input_size=INPUT)
    generator = random.Random(1)
    space = Space((SIZES,) * 6)
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < len(result.evaluations):
        drawn.add(space.draw(generator))
    assert drawn <= set(metric.calls)
    assert result.random.score == max(e for c, e in _scores(drawn).items())


def _scores(configurations) -> dict[tuple[int, ...], float]:
    net = supernet(6)
    found = {}
    for c in configurations:
        set_configuration(net, c)
        found[c] = rugged(net)
    return found


def test_random_search_ends_where_there_is_nothing_left():
    """Catches a loop that waits for configurations that do not exist."""
    result = gross.search(supernet(), rugged, (1, 1, 2, 1), "random", input_size=INPUT)
    assert len(result.evaluations) == 1 + 4


def test_evolution_gives_a_front_within_the_budget():
    """Catches objectives the wrong way round, and constraints that do not hold."""
    net = supernet()
    costs = costs_of(net, INPUT)
    method = Evolution(costs["macs"], evaluations=200, population=20)
    metric = Counting()
    result = gross.search(net, metric, (4, 4, 4, 4), method, input_size=INPUT)
    assert all(cost(c) <= cost((4, 4, 4, 4)) for c in metric.calls)
    front = result.front("macs")
    assert [e.score for e in front] == sorted({e.score for e in front})
    assert len(metric.calls) == len(set(metric.calls))


def test_evolution_gets_better():
    """Catches an objective the wrong way round: the last generations against the first."""
    net = supernet(8)
    method = Evolution(costs_of(net)["parameters"], evaluations=240, population=16)
    found = [e.score for e in gross.search(net, rugged, None, method).evaluations]
    assert statistics.mean(found[-40:]) > statistics.mean(found[:16]) + 3


def test_workers_share_a_database(tmp_path):
    """Catches a second worker that evaluates what the first one has."""
    net, storage = supernet(), f"sqlite:///{tmp_path / 'search.db'}"
    costs = costs_of(net, INPUT)
    metrics = [Counting(), Counting()]
    for worker, metric in enumerate(metrics):
        method = Evolution(costs["macs"], 20, 10, storage)
        # Without the baseline's: two searches with one seed draw the same baseline.
        gross.search(net, metric, None, method, input_size=INPUT, seed=worker)
    import optuna

    trials = optuna.load_study(study_name="gross", storage=storage).trials
    assert len(trials) == 40
    first = {tuple(t.params.values()) for t in trials[:20]}
    baseline = len(metrics[1].calls) - len(set(metrics[1].calls) - first)
    assert not first & set(metrics[1].calls[: -baseline or None])


# Budgets ------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_exported_network():
    """Catches a closed form that forgets a bias or a term, against networks that are built."""
    net = supernet()
    costs = costs_of(net, INPUT)
    for c in [(1, 1, 1, 1), (8, 2, 1, 4)]:
        plain = gross.export(net, c, kernels=False)
        assert costs["macs"](c) == macs(plain, INPUT).total
        assert costs["parameters"](c) == sum(p.numel() for p in plain.parameters())
    assert costs["macs"].dense == macs(_dense(), INPUT).total
    assert costs["parameters"].dense == sum(p.numel() for p in _dense().parameters())


def test_costs_of_a_network_that_keeps_its_last_activations():
    """Catches a copy that torch refuses, because a call with gradients gave a tensor a history."""

    class Keeping(nn.Sequential):
        def forward(self, input):
            self.kept = super().forward(input)
            return self.kept

    net = Keeping(supernet())
    net(torch.randn(2, *INPUT)).sum().backward()
    assert costs_of(net, INPUT)["macs"].dense == macs(_dense(), INPUT).total


def _dense() -> nn.Module:
    body = [p for _ in range(4) for p in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *body, *head)


def test_several_limits_hold_at_once():
    """Catches a search that looks at the first limit alone."""
    net = supernet()
    costs = costs_of(net, INPUT)
    parameters = costs["parameters"]((8, 1, 1, 2))
    budget = Budget(macs="62%", parameters=parameters)
    result = gross.search(net, rugged, budget, "exhaustive", input_size=INPUT)
    expected = [
        c
        for c in every_configuration()
        if costs["macs"](c) <= 0.62 * costs["macs"].dense and costs["parameters"](c) <= parameters
    ]
    assert 0 < len(expected) < 256
    assert sorted(e.configuration for e in result.evaluations) == expected
    assert set(result.limits) == {"macs", "parameters"}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (1000, r"got 1,000 macs, accepted is at least 6\d,\d\d\d"),
        ("10%", "accepted is at least"),
        (Budget(parameters=10), "parameters, accepted is at least"),
        ("half", "accepted are positive numbers, shares"),
        ("50", "accepted are positive numbers, shares"),
        (-3, "accepted are positive numbers"),
        (math.nan, "accepted are positive numbers"),
        ((1, 1, 1), "got 3 group sizes"),
        ((1, 1, 1, 3), "got 3 for decomposed layer 3"),
        (Budget(milliseconds=3), "needed for it is latency"),
    ],
)
def test_bad_budgets_are_refused_before_any_evaluation(budget, message):
    """Catches a search that finds out after hours, or never ends."""
    metric = Counting()
    with pytest.raises(ValueError, match=message):
        gross.search(supernet(), metric, budget, input_size=INPUT)
    assert not metric.calls


def test_a_start_is_found_under_a_budget_that_one_configuration_meets():
    """Catches drawing without end: one in 4¹² configurations is allowed."""
    net = supernet(12)
    limit = costs_of(net, INPUT)["macs"]((1,) * 12)
    began = time.perf_counter()
    result = gross.search(net, rugged, limit, input_size=INPUT)
    assert result.configuration == (1,) * 12
    assert time.perf_counter() - began < 10


def test_draws_reach_every_configuration_that_is_allowed():
    """Catches steering that never takes the larger sizes."""
    net = supernet()
    space = Space((SIZES,) * 4, Budget(macs=(1, 1, 1, 4)).limits(costs_of(net, INPUT)))
    generator = random.Random(0)
    assert {space._steered(generator) for _ in range(2000)} == set(space)
    assert {space.draw(generator) for _ in range(2000)} == set(space)


def test_a_space_too_large_is_refused_with_the_time_it_takes():
    """Catches an exhaustive search that would run for years."""
    with pytest.raises(ValueError, match=r"16,777,216 configurations.*days.*breadth-first"):
        gross.search(supernet(12), rugged, None, "exhaustive")
    assert len(gross.search(supernet(2), rugged, None, Exhaustive(16)).evaluations) == 16


# Failures -----------------------------------------------------------------------------------------


def test_a_configuration_that_fails_is_skipped_and_recorded():
    """Catches a search that one configuration ends, and one that calls NaN the best."""
    net = supernet()

    def metric(model: nn.Module) -> float | None:
        c = configuration(model)
        if c[0] == 8:
            raise RuntimeError("out of memory")
        if c[0] == 4:
            return math.nan
        return None if c[0] == 2 else rugged(model)

    set_configuration(net, (8, 8, 8, 8))
    with pytest.warns(UserWarning, match="is skipped"):
        result = gross.search(net, metric, None, "exhaustive")
    errors = {e.configuration[0]: e.error for e in result.evaluations}
    assert "RuntimeError: out of memory" in errors[8]
    assert "NaN" in errors[4]
    assert "no number: None" in errors[2]
    assert errors[1] is None
    assert result.configuration[0] == 1
    assert configuration(net) == (8, 8, 8, 8)
    assert "192 failed" in " ".join(str(result).split())


@pytest.mark.filterwarnings("ignore:configuration")
def test_a_search_in_which_everything_fails_says_why():
    """Catches a result made of nothing."""
    with pytest.raises(ValueError, match=r"every evaluation failed.*no number: 'good'"):
        gross.search(supernet(1), lambda model: "good", None, "exhaustive")


def test_what_is_no_supernet_and_what_is_no_method_are_refused():
    """Catches an error from deep inside."""
    with pytest.raises(ValueError, match="without decomposed layers"):
        gross.search(_dense(), rugged)
    with pytest.raises(ValueError, match="got 'greedy', accepted are 'exhaustive'"):
        gross.search(supernet(), rugged, method="greedy")


def test_a_budget_takes_numpys_numbers():
    """Catches a number of MACs that is taken for a group size, and arrays that are refused."""
    most = cost((2, 2, 2, 2))
    results = [
        gross.search(supernet(), rugged, budget, "exhaustive", input_size=INPUT)
        for budget in (most, np.int64(most), np.array([2, 2, 2, 2]))
    ]
    assert len({result.configuration for result in results}) == 1
    assert results[2].base.configuration == (2, 2, 2, 2)
    assert results[0].base is results[1].base is None


# Accuracy, results, journals ----------------------------------------------------------------------


def test_accuracy_is_searched_by_tree_and_by_configuration_alike():
    """Catches scores given to other configurations, and an input size that is not the images'."""
    net, data = supernet(), (torch.randn(60, *INPUT), torch.randint(5, (60,)))
    by_tree = gross.search(net, data, (4, 4, 4, 4), "exhaustive")
    accuracy = gross.Accuracy(data)
    alone = gross.search(net, lambda m: accuracy(m), (4, 4, 4, 4), "exhaustive", input_size=INPUT)
    found = {e.configuration: e.score for e in by_tree.evaluations}
    assert found == pytest.approx({e.configuration: e.score for e in alone.evaluations})
    assert len({e.score for e in by_tree.evaluations}) > 3


def test_a_result_comes_back_from_its_file(tmp_path):
    """Catches fields that are lost, and files of something else."""
    result = gross.search(supernet(), rugged, (2, 2, 2, 2), input_size=INPUT)
    result.save(tmp_path / "result.json")
    assert SearchResult.load(tmp_path / "result.json") == result
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="not the result of a search"):
        SearchResult.load(tmp_path / "other.json")


def test_a_journal_saves_every_evaluation_from_being_repeated(tmp_path):
    """Catches an evaluation that is not written, or not read."""
    path = tmp_path / "journal.jsonl"
    first, second = Counting(), Counting()
    budget = (2, 4, 2, 4)
    expected = gross.search(supernet(), first, budget, input_size=INPUT, journal=path)
    # The last line is cut off, as by the end of a process.
    path.write_bytes(path.read_bytes()[:-9])
    found = gross.search(supernet(), second, budget, input_size=INPUT, journal=path)
    assert second.calls == [first.calls[-1]]
    assert found.evaluations == expected.evaluations
    third = Counting()
    gross.search(supernet(), third, budget, input_size=INPUT, journal=path)
    assert not third.calls


def test_a_journal_of_something_else_is_refused(tmp_path):
    """Catches scores of another supernet or other data taken for this one's."""
    path = tmp_path / "journal.jsonl"
    data = (torch.randn(20, *INPUT), torch.randint(5, (20,)))
    gross.search(supernet(), data, method="random", journal=path)
    other = supernet()
    with torch.no_grad():
        next(iter(decomposed_layers(other).values())).grouped[0][0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="another supernet"):
        gross.search(other, data, method="random", journal=path)
    with pytest.raises(ValueError, match="another metric"):
        gross.search(supernet(), (data[0], 4 - data[1]), method="random", journal=path)
    (tmp_path / "text").write_text("no journal\n")
    with pytest.raises(ValueError, match="which is none"):
        gross.search(supernet(), data, method="random", journal=tmp_path / "text")


SCRIPT = """
import sys, time, torch, gross
from pathlib import Path
sys.path.insert(0, {tests!r})
from networks import rugged, supernet

def metric(model):
    with open({calls!r}, "a") as file:
        file.write(f"{{gross.configuration(model)}}\\n")
    time.sleep({pause})
    return rugged(model)

result = gross.search(
    supernet(), metric, (4, 2, 4, 2), input_size=(3, 8, 8), journal={journal!r}
)
result.save({result!r})
"""


def test_a_killed_search_goes_on_and_repeats_nothing(tmp_path):
    """Catches what is not yet on the disk when SIGKILL comes: at most the configuration that was
    running is evaluated again, and the result is that of a search that was not killed."""
    calls, result = tmp_path / "calls", tmp_path / "result.json"
    names = {
        "tests": str(Path(__file__).parent),
        "calls": str(calls),
        "journal": str(tmp_path / "journal.jsonl"),
        "result": str(result),
    }
    killed = subprocess.Popen([sys.executable, "-c", SCRIPT.format(pause=0.1, **names)])
    while not calls.exists() or len(calls.read_text().splitlines()) < 20:
        assert killed.poll() is None
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    before = calls.read_text().splitlines()
    assert not result.exists()
    subprocess.run([sys.executable, "-c", SCRIPT.format(pause=0, **names)], check=True)
    after = calls.read_text().splitlines()[len(before) :]
    assert len(set(before) & set(after)) <= 1
    found = SearchResult.load(result)
    expected = gross.search(supernet(), rugged, (4, 2, 4, 2), input_size=INPUT)
    assert found.evaluations == expected.evaluations


RANKS = """
import sys, torch, gross, torch.distributed as dist
sys.path.insert(0, {tests!r})
from networks import supernet
dist.init_process_group("gloo")
torch.manual_seed(0)
data = (torch.randn(40, 3, 8, 8), torch.randint(5, (40,)))
seen = []
net = supernet()
net[-1].register_forward_hook(lambda *a: seen.append(gross.configuration(net)))
for method in ("exhaustive", "evolution"):
    journal = {folder!r} + f"/{{method}}.jsonl"
    result = gross.search(net, data, (4, 4, 4, 4), method, journal=journal)
    result.save({folder!r} + f"/{{method}}-{{dist.get_rank()}}.json")
    print(method, len(set(seen)))
    seen.clear()
dist.destroy_process_group()
"""


def test_two_processes_share_the_evaluations(tmp_path):
    """Catches ranks that all do everything, that end with different results, or that write one
    journal twice."""
    tests = str(Path(__file__).parent)
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=tests, folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", script],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    evaluated = [int(count) for method, count in lines if method == "exhaustive"]
    torch.manual_seed(0)
    data = (torch.randn(40, *INPUT), torch.randint(5, (40,)))
    for method in ("exhaustive", "evolution"):
        expected = gross.search(supernet(), data, (4, 4, 4, 4), method)
        for rank in (0, 1):
            found = SearchResult.load(tmp_path / f"{method}-{rank}.json")
            assert found.evaluations == expected.evaluations
            assert found.random == expected.random
        lines = (tmp_path / f"{method}.jsonl").read_text().splitlines()
        assert len(lines) == len(set(lines)) >= 1 + len(expected.evaluations)
        if method == "exhaustive":
            # Each rank also runs the base, or the configuration that it was in.
            assert sum(evaluated) <= len(expected.evaluations) + 4
            assert min(evaluated) > 0.4 * len(expected.evaluations)


def test_a_fingerprint_does_not_see_the_memory_format():
    """Catches a journal that another memory format makes useless, and strides that bytes cannot be
    taken of."""
    net = supernet()
    before = fingerprint(net)
    assert fingerprint(net.to(memory_format=torch.channels_last)) == before
    assert fingerprint(nn.DataParallel(net)) == before
    assert fingerprint(net.to(torch.bfloat16)) != before


def test_a_wrapped_supernet_is_searched_as_it_is():
    """Catches names and modules of the wrapper taken for the network's."""
    net, data = supernet(), (torch.randn(30, *INPUT), torch.randint(5, (30,)))
    expected = gross.search(net, data, (2, 2, 2, 2))
    found = gross.search(nn.DataParallel(net), data, (2, 2, 2, 2))
    assert found.evaluations == expected.evaluations
    with torch.inference_mode():
        for kernels in (True, False):
            exported, wanted = (
                gross.export(given, (2, 1, 4, 8), example=data[0], kernels=kernels)(data[0])
                for given in (nn.DataParallel(net), net)
            )
            torch.testing.assert_close(exported, wanted)
