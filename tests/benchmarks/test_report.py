"""Tables and plots from a tiny result file."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import report

MACHINE = {
    "device": "a machine",
    "device_type": "cpu",
    "threads": 2,
    "torch": "2.15.0",
    "keeps_memory": True,
    "best_product": {"gflops": 2000.0, "by": "torch.mm"},
    "dtype": "float32",
    "memory_format": "channels_last",
}


def entry(
    suite: str, operation: str, subject: str, setting: Any, ratios: dict[str, float], **more: Any
) -> dict[str, Any]:
    return {
        "suite": suite,
        "operation": operation,
        "subject": subject,
        "setting": setting,
        "batch": 16,
        "macs": 10**9,
        "dense_macs": 4 * 10**9,
        "bytes": 10**6,
        "milliseconds": {"ours": 2.0} | {name: 2.0 * value for name, value in ratios.items()},
        "fastest": dict.fromkeys(ratios, "eager"),
        "ratios": {
            name: {"median": value, "q1": value - 0.5, "q3": value + 0.5}
            for name, value in ratios.items()
        },
        "gflops": 1000.0,
        "gbps": 0.5,
        "narrow": False,
        **MACHINE,
        **more,
    }


ENTRIES = [
    entry("grouped convolution", "forward", "64@56", 16, {"library": 2.0, "materialised": 3.0}),
    entry("grouped convolution", "forward", "64@56", 4, {"library": 4.0, "materialised": 8.0}),
    entry("grouped convolution", "forward", "128@28", 4, {"library": 1.0, "materialised": 2.0}),
    entry("grouped convolution", "input gradient", "128@28", 4, {"library": 5.0}),
    entry(
        "grouped convolution",
        "forward",
        "64@56",
        4,
        {"library": 48.0},
        memory_format="contiguous_format",
    ),
    entry("GroSSConv2d", "inference", "64@56", 4, {"dense": 3.0, "fold": 1.5, "unpacked": 1.25}),
    entry("networks", "training", "4-layer", "8 16 64", {"dense": 2.0, "fold": 1.25}),
]


def cells(summary: str, *start: str) -> list[str]:
    """The cells of the only row that starts with these."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in summary.splitlines()
        if line.startswith("|")
    ]
    (found,) = [row for row in rows if tuple(row[: len(start)]) == start]
    return found


def table(summary: str, title: str) -> str:
    """The part of the summary under a title."""
    (found,) = [part for part in summary.split("\n\n**") if part.lstrip("*").startswith(title)]
    return found


def test_geometric_mean_and_minimum_over_shapes() -> None:
    """Catches an arithmetic mean (2.50), and entries of another precision in the mean."""
    core = table(report.summary(ENTRIES), "Grouped convolution, float32 channels_last")
    assert [cell.split(" (")[0] for cell in cells(core, "4", "2")[2:7]] == [
        "2.00 / 1.00",
        "5.00 / 5.00",
        "",
        "4.00 / 2.00",
        "",
    ]


def test_group_sizes_are_in_numerical_order() -> None:
    """Catches rows in the order of their measurement, or 16 before 4 as text."""
    core = table(report.summary(ENTRIES), "Grouped convolution, float32 channels_last")
    assert [line.split("|")[1].strip() for line in core.splitlines() if line.startswith("|")][
        2:
    ] == ["4", "16"]


def test_efficiency_is_time_ratio_over_mac_ratio() -> None:
    """Catches η upside down: 3 times as fast with a quarter of the MACs is 0.75, and 0.60 where
    unpacked takes 1.25 times as long."""
    layers = table(report.summary(ENTRIES), "GroSSConv2d")
    assert cells(layers, "inference", "4") == [
        "inference",
        "4",
        "1",
        "4.00",
        "3.00 / 3.00",
        "0.75 / 0.75 (≥ 0.95 / 0.80 missed)",
        "0.60 / 0.60",
        "1.50 / 1.50 (≥ 1.70 missed)",
        "0.50",
    ]


def test_training_has_no_unpacked_layer() -> None:
    """Catches a table that needs every baseline of every row."""
    layers = table(
        report.summary(
            [*ENTRIES, entry("GroSSConv2d", "training", "64@56", 4, {"dense": 4.0, "fold": 1.0})]
        ),
        "GroSSConv2d",
    )
    assert cells(layers, "training", "4")[5:7] == ["1.00 / 1.00 (≥ 0.80 reached)", ""]


def test_narrow_layers_have_a_table_of_their_own() -> None:
    """Catches them in the mean that a goal speaks of, and a goal beside theirs."""
    ratios = {"dense": 30.0, "fold": 15.0, "unpacked": 1.0}
    narrow = entry("GroSSConv2d", "inference", "64@224:11-18", 4, ratios, narrow=True)
    summary = report.summary([*ENTRIES, narrow])
    assert cells(table(summary, "GroSSConv2d, "), "inference", "4")[2] == "1"
    assert cells(table(summary, "GroSSConv2d with a narrow bottleneck, "), "inference", "4")[
        4:8
    ] == [
        "30.00 / 30.00",
        "7.50 / 7.50",
        "7.50 / 7.50",
        "15.00 / 15.00",
    ]


def test_8_bits_have_tables_of_their_own() -> None:
    """Catches figures of 8 bits under another baseline's heading, or in float32's tables; and two
    batches in one mean."""
    ratios = {"dense": 3.0, "fold": 1.5, "float32": 1.25}
    eight = {"dtype": "int8"}
    entries = [
        *ENTRIES,
        entry("int8 layer", "inference", "64@56", 4, ratios, **eight),
        entry("int8 layer", "inference", "64@56", 4, dict.fromkeys(ratios, 9.0), batch=1, **eight),
        *(
            entry(
                "int8 convolution", "inference", "64@56", "dense",
                {"library": library, "float32": 4.0}, **eight,
            )
            for library in (0.5, 2.0)
        ),
    ]  # fmt: skip
    summary = report.summary(entries)
    assert cells(table(summary, "Layers in 8 bits, batch 16"), "4") == [
        "4", "1", "4.00", "3.00 / 3.00 (≥ 2.00 reached)", "1.50 / 1.50 (≥ 1.30 reached)",
        "1.25 / 1.25 (≥ 1.50 missed)", "0.50",
    ]  # fmt: skip
    assert cells(table(summary, "Dense convolutions in 8 bits"), "16") == [
        "16", "2", "1.00 / 0.50 (≥ 1.00 / 0.85 missed)", "4.00 / 4.00 (≥ 2.00 reached)", "0.50"
    ]  # fmt: skip
    assert table(summary, "GroSSConv2d, ") == table(report.summary(ENTRIES), "GroSSConv2d, ")


def test_networks_show_time_beside_macs() -> None:
    """Catches a network's ratio without its spread, or the MAC ratio in its place."""
    networks = table(report.summary(ENTRIES), "Networks")
    row = cells(networks, "4-layer", "8 16 64", "training")
    assert row[3:] == ["2.0", "4.00", "2.00 (1.50 to 2.50)", "0.50", "1.25", "0.50"]


def test_structured_layers_show_counts_beside_times() -> None:
    """Catches ratios turned round, and packed layers compared with those that are not."""
    ratios = {"dense": 2.0, "convolution": 0.75, "dense packed": 3.0, "ours packed": 1.5}
    more = {"additions": 10**9, "dense_additions": 3 * 10**9}
    summary = report.summary(
        [
            entry("structured", "inference", "64@56", "64 2", ratios, **more),
            entry("structured", "training", "64@56", "64 2", {"dense": 1.5}, **more),
        ]
    )
    inference = table(summary, "Structured, inference, float32 channels_last")
    assert cells(inference, "64@56", "64 2")[2:] == [
        "16", "2", "4.00", "3.00", "2.00 (1.50 to 2.50)", "2.00", "25%"
    ]  # fmt: skip
    training = table(summary, "Structured, training, float32 channels_last")
    assert cells(training, "64@56", "64 2")[6:] == ["1.50 (1.00 to 2.00)", "", ""]


def test_machine_is_named() -> None:
    """Catches a table that nobody can place, and page faults in the times that nobody is told
    of."""
    assert report.summary(ENTRIES).startswith(
        "a machine; 2 threads; torch 2.15.0; freed memory kept, no fresh pages; "
    )
    fresh = [{**ENTRIES[0], "keeps_memory": False}]
    assert report.summary(fresh).startswith(
        "a machine; 2 threads; torch 2.15.0; memory freed to the system; "
    )


def test_share_is_of_the_best_that_any_entry_saw_in_that_precision() -> None:
    """Catches a share above 1 from an entry during which the machine was disturbed, and float32
    over another's best."""
    one, two, sixteen = (
        {**ENTRIES[3], "gflops": gflops, "dtype": dtype, "best_product": {"gflops": best, "by": by}}
        for gflops, dtype, best, by in (
            (104.0, "float32", 80.0, "torch.mm"),
            (400.0, "float32", 800.0, "1×1 convolution"),
            (400.0, "bfloat16", 1600.0, "3×3 convolution"),
        )
    )
    summary = report.summary([one, two, sixteen])
    best = (
        "1600 GFLOP/s in bfloat16 (3×3 convolution; median of entries 1600), "
        "800 GFLOP/s in float32 (1×1 convolution; median of entries 440)"
    )
    assert summary.split("\n")[0].endswith(f"; best product {best}")
    assert cells(table(summary, "Grouped convolution, float32"), "4")[-1] == "–, 0.25, –"
    assert cells(table(summary, "Grouped convolution, bfloat16"), "4")[-1] == "–, 0.25, –"
    assert [line.split("|")[9].strip() for line in report.details([one, two]).splitlines()[4:]] == [
        "0.13",
        "0.50",
    ]


def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(report.write)
    return app


def test_report_of_a_file(tmp_path: Path) -> None:
    """Catches entries of other suites breaking the report, a plot without its suite, and files left
    half-written."""
    other = {"extra_info": {}, "stats": {}}
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"benchmarks": [{"extra_info": e} for e in ENTRIES] + [other]}))
    result = CliRunner().invoke(app(), [str(file)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "result").iterdir()) == [
        "GroSSConv2d-inference-float32_channels_last.png",
        "grouped_convolution-forward-float32_channels_last.png",
        "grouped_convolution-forward-float32_contiguous_format.png",
        "grouped_convolution-input_gradient-float32_channels_last.png",
        "networks-training-float32_channels_last.png",
        "summary.md",
    ]
    text = (tmp_path / "result" / "summary.md").read_text()
    assert text.startswith(report.summary(ENTRIES))
    assert "library (eager) 48.00 (47.50 to 48.50)" in text


def test_plots_have_a_panel_for_each_shape_and_bars_for_each_size() -> None:
    """Catches bars that overwrite one another: two shapes, the first with two sizes, ours and two
    baselines."""
    figure = report.plots(ENTRIES)["grouped_convolution-forward-float32_channels_last.png"]
    places = {
        axes.get_title(): {round(bar.get_x(), 3) for bars in axes.containers for bar in bars}
        for axes in figure.axes
        if axes.containers
    }
    assert {title: len(xs) for title, xs in places.items()} == {
        "128@28, batch 16": 3,
        "64@56, batch 16": 6,
    }


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"benchmarks": []}', '{"benchmarks": [{"extra_info": {}}]}']
)
def test_what_is_not_a_result_is_refused(tmp_path: Path, content: str) -> None:
    """Catches an empty report from a wrong file."""
    file = tmp_path / "wrong.json"
    file.write_text(content)
    result = CliRunner().invoke(app(), [str(file), "--output", str(tmp_path / "report")])
    assert isinstance(result.exception, ValueError)
    assert "wrong.json" in str(result.exception)
    assert not (tmp_path / "report").exists()
