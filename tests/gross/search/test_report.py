"""Rankings, tables, figures and the study: the paper's own numbers where it prints them."""

import json
import random
from dataclasses import replace

import gross
import pytest
import scipy.stats
import torch
from gross.architecture_search import SearchResult, Study, agreement, average_precision, study
from gross.architecture_search import report as evidence
from gross.architecture_search.individual import Point
from gross.data import Data, Images
from gross.networks import PUBLISHED
from gross.training import Recipe
from sklearn.metrics import average_precision_score

from .networks import rugged, supernet


def test_average_precision_is_scikit_learns():
    """Catches ranks that begin at zero, relevance by the wrong accuracy, and removal from the
    wrong end."""
    generator = random.Random(0)
    for _ in range(20):
        true = [generator.random() for _ in range(45)]
        found = [t + generator.gauss(0, 0.3) for t in true]
        for removed in (0, 10, 20, 30):
            kept = sorted(range(45), key=lambda i: -true[i])[removed:]
            relevant = [i in kept[:5] for i in kept]
            expected = average_precision_score(relevant, [found[i] for i in kept])
            assert average_precision(found, true, removed=removed) == pytest.approx(expected)


def test_agreement_is_one_for_the_truth_and_minus_one_for_its_opposite():
    """Catches correlations of something else."""
    true = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0]
    same, opposite = agreement(true, true), agreement([-t for t in true], true)
    assert same.precision == {0: 1.0}
    assert same.kendall == same.spearman == pytest.approx(1)
    assert opposite.kendall == opposite.spearman == pytest.approx(-1)
    other = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert agreement(other, true).kendall == pytest.approx(scipy.stats.kendalltau(other, true)[0])
    with pytest.raises(ValueError, match="removed: got 3 of 7"):
        average_precision(true, true, removed=3)


def test_reductions_are_those_that_the_paper_prints():
    """Catches percentages of the wrong total: all of Table 2's, from the configurations alone."""
    net = gross.decompose(
        gross.networks.build("4-layer"),
        **gross.networks.structure("4-layer"),
        method="random",
        quiet=True,
    )
    printed = [row for row in PUBLISHED if row.network == "4-layer" and row.baseline]
    assert len(printed) == 5
    for row in printed:
        # A search of a single configuration finds it.
        method = gross.architecture_search.BreadthFirst(1, 0, (row.configuration,))
        result = gross.search(net, lambda model: 1.0, row.baseline, method, input_size=(3, 32, 32))
        true = {row.configuration: row.true_accuracy, row.baseline: 50.0}
        base, found, *_ = evidence.rows([result], true)
        assert (base.kind, base.configuration) == ("baseline", row.baseline)
        found = evidence._row(
            "found",
            next(e for e in result.evaluations if e.configuration == row.configuration),
            true,
            result,
        )
        assert round(found.macs_cut, 2) == pytest.approx(row.macs_cut, abs=0.011)
        assert round(found.grouped_cut, 2) == pytest.approx(row.grouped_cut, abs=0.011)
        assert found.gained == pytest.approx(row.true_accuracy - 50)


def test_changes_have_one_minus_sign():
    """Catches a hyphen beside a minus sign, "−-5.00 %" for what costs more, and "-0.00"."""
    row = evidence.Row("found", (1,), "1", 2e6, None, 60.0, 60.0, -0.333, -5.0, 0.0)
    (line,) = evidence.search_table([row]).splitlines()[2:]
    assert line.endswith("| −0.33 | +5.00 % | 0.00 % |")
    assert "| +0.33 | −5.00 % |" in evidence.search_table(
        [replace(row, gained=0.333, macs_cut=5.0)]
    )
    assert "| 0.00 |" in evidence.search_table([replace(row, gained=-0.001)])


def points(count: int) -> Study:
    generator = random.Random(0)
    drawn = []
    for i in range(count):
        true = 70 + generator.random()
        drawn.append(Point((i,), True, true + 0.1, true - 5, true - generator.random(), true, 1.0))
    return Study((*drawn, Point((99,), False, 0.0, 0.0, 0.0, 90.0, 1.0)), (5, 100))


def test_files_have_the_tables_and_the_figures(tmp_path):
    """Catches a report without a search, a figure that is empty, and points that were not drawn at
    random in the ranking."""
    searches = [
        gross.search(supernet(), rugged, base, input_size=(3, 8, 8))
        for base in [(2, 2, 2, 2), (4, 4, 4, 4)]
    ]
    files = evidence.write(tmp_path / "report", searches, points(45))
    names = ["report.json", "report.md", "search.png", "study.png"]
    assert [path.name for path in files] == names
    text = files[1].read_text()
    assert all(" ".join(map(str, result.configuration)) in text for result in searches)
    content = json.loads(files[0].read_text())
    assert content["agreement"]["gross"]["kendall"] == pytest.approx(1)
    assert content["agreement"]["gross"]["mean"] == pytest.approx(1)
    assert content["agreement"]["partial"]["mean"] < 0.9
    assert [row["kind"] for row in content["searches"]] == ["baseline", "found", "random"] * 2
    assert all(path.stat().st_size > 10_000 for path in files[2:])
    with pytest.raises(ValueError, match="searches: got none"):
        evidence.write(tmp_path)


@pytest.fixture
def data() -> Data:
    torch.manual_seed(0)
    labels = torch.arange(5).repeat(24)
    pixels = torch.randint(0, 90, (120, 3, 8, 8)) + 30 * labels[:, None, None, None]
    parts = [
        Images(pixels[rows].to(torch.uint8), labels[rows])
        for rows in (slice(0, 60), slice(60, 120), slice(60, 120))
    ]
    return Data("stripes", *parts, tuple("abcde"), (3, 8, 8))


def test_a_study_compares_three_strategies_and_goes_on_where_it_stopped(tmp_path, data):
    """Catches accuracies of another epoch, another configuration or another network, points that
    are fine-tuned twice, and a directory of another study."""
    decomposed = supernet(2)
    tuned = supernet(2)
    recipe = Recipe(epochs=3, batch_size=20, trains="all").override({"optimizer.lr": 0.02})
    gross.finetune(tuned, data, recipe, quiet=True)
    arguments = (tuned, decomposed, data, recipe, tmp_path)
    seen: list[int] = []

    def stop(done: int, total: int, point: Point) -> None:
        seen.append(total)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(*arguments, count=5, partial=1, also=[(8, 8)], progress=stop)
    fresh: list[float] = []
    found = study(
        *arguments,
        count=5,
        partial=1,
        also=[(8, 8)],
        progress=lambda done, total, point: fresh.append(point.seconds),
    )
    assert (
        len(found.points)
        == seen[0]
        == 5 + ((8, 8) not in {p.configuration for p in found.points[:5]})
    )
    journal = (tmp_path / "study.jsonl").read_text().splitlines()
    assert len(journal) == 1 + len(found.points)
    one = found.points[3]
    assert one.gross == gross.evaluate(tuned, [one.configuration], data.validation)[0]
    assert one.without == gross.evaluate(decomposed, [one.configuration], data.validation)[0]
    alone = supernet(2)
    history = gross.finetune(alone, data, recipe, configuration=one.configuration, quiet=True)
    accuracies = [epoch["accuracy"] for epoch in history.epochs]
    assert (one.partial, one.true) == pytest.approx((accuracies[0], accuracies[-1]))
    assert {p.true for p in found.points} != {p.without for p in found.points}
    found.save(tmp_path / "study.json")
    assert Study.load(tmp_path / "study.json") == found
    with pytest.raises(ValueError, match="another recipe"):
        study(*arguments, count=5, partial=2)
    with pytest.raises(ValueError, match="partial: got 4 epochs, accepted are 1 to 3"):
        study(*arguments, partial=4)


def test_a_study_file_of_something_else_is_refused(tmp_path):
    """Catches an error from deep inside."""
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a study"):
        Study.load(tmp_path / "study.json")
    with pytest.raises(ValueError, match="not the result of a search"):
        SearchResult.load(tmp_path / "study.json")
