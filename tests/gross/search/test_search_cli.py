"""``gross search``, ``evaluate``, ``latency``, ``export``, ``report`` and ``study``: what they
print and write, and their exit status."""

import json
from pathlib import Path

import gross
import pytest
import torch
from gross.cli import app
from gross.latency import LatencyTable
from PIL import Image
from typer.testing import CliRunner, Result


def gross_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def content(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "supernet.safetensors"
    net = gross.decompose(
        gross.networks.build("4-layer"), (1, 8, 32), keep_costlier=True, method="random", quiet=True
    )
    gross.save(net, path)
    return path


def test_search_writes_what_report_reads(saved, tmp_path):
    """Catches options that do not reach the search, and searches in the wrong order."""
    output = tmp_path / "search.json"
    arguments = ("search", saved, "--images", 60, "--output", output, "--runs", 2)
    bases = ("--base", "8,8,8", "--base", "1,1,1")
    found = content(gross_command(*arguments, *bases, "--json"))["searches"]
    assert [search["base"]["configuration"] for search in found] == [[1, 1, 1], [8, 8, 8]]
    assert found[1]["configuration"] in [e["configuration"] for e in found[1]["evaluations"]]
    assert output.with_suffix(".journal").exists()
    text = gross_command(*arguments, "--macs", "70%", "--method", "exhaustive")
    assert text.exit_code == 0, text.output
    assert "found" in text.stdout
    report = gross_command("report", output, "--output", tmp_path / "report")
    assert report.exit_code == 0, report.output
    assert (tmp_path / "report" / "search.png").exists()


def test_search_takes_a_metric_of_ones_own(saved, tmp_path, monkeypatch):
    """Catches a metric that is not the one that is maximised, MACs that are not counted without a
    data set, and a journal of another metric."""
    (tmp_path / "my_metrics.py").write_text(
        "from gross import configuration\n"
        "def odd(model):\n"
        "    first, second, third = configuration(model)\n"
        "    return float('nan') if first == 1 else second - third\n"
        "depth = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ("search", saved, "--metric", "my_metrics:odd", "--method", "exhaustive")
    with pytest.warns(UserWarning, match="returned NaN"):
        found = content(gross_command(*arguments, "--base", "8,32,32", "--json"))["searches"][0]
    assert found["configuration"] == [8, 32, 1]
    assert found["score"] == 31
    assert found["base"]["score"] == 0
    assert found["evaluations"][0]["costs"]["macs"] == 1952256
    written = (*arguments, "--macs", "70%", "--journal", tmp_path / "a.journal")
    assert gross_command(*written).exit_code == 0
    other = gross_command("search", saved, *written[4:], "--images", 9)
    assert "written for another metric" in other.stderr


def test_evaluate_counts_right_answers_and_macs(saved):
    """Catches another split than the validation images, and configurations in another order."""
    chosen = ("--configuration", "8,1,32", "--configuration", "1,1,1")
    rows = content(gross_command("evaluate", saved, *chosen, "--json"))["evaluations"]
    data = gross.data.load("digits")
    expected = gross.evaluate(gross.load(saved), [(8, 1, 32), (1, 1, 1)], data.validation)
    assert [row["accuracy"] for row in rows] == expected
    assert rows[1]["macs"] == 1952256
    every = content(gross_command("evaluate", saved, "--all", "--images", 9, "--json"))
    assert len(every["evaluations"]) == 27
    assert "1 1 1" in gross_command("evaluate", saved, "--images", 9).stdout


def test_latency_writes_a_table_that_a_search_takes(saved, tmp_path):
    """Catches a budget in milliseconds that is one in MACs."""
    output = tmp_path / "latency.json"
    found = content(gross_command("latency", saved, "--seconds", 0, "--output", output, "--json"))
    assert found["check"]["median_error"] > 0
    limit = sum(layer["8"] for layer in found["layers"].values()) + found["rest"]
    result = content(
        gross_command(
            *("search", saved, "--images", 30, "--latency", output, "--milliseconds", limit),
            *("--method", "exhaustive", "--json"),
        )
    )["searches"][0]
    assert result["limits"] == {"milliseconds": limit}
    assert all(e["costs"]["milliseconds"] <= limit for e in result["evaluations"])


@pytest.mark.parametrize("options", [(), ("--plain",), ("--tune",)])
def test_export_writes_a_file_and_compares(saved, tmp_path, options):
    """Catches another configuration in the file, kernels where none are wanted, and a comparison
    with another network."""
    output = tmp_path / "network.pt2"
    arguments = ("export", saved, "--output", output, "--configuration", "8,1,32", "--batch", 2)
    found = content(gross_command(*arguments, *options, "--json"))
    dense, plain, ours = found["networks"]
    macs = gross.macs(gross.load(saved), (3, 32, 32), (8, 1, 32)).total
    assert plain["macs"] == macs < dense["macs"]
    assert macs <= ours["macs"] <= dense["macs"]  # Some layers run merged.
    assert dense["difference"] == 0 < plain["difference"] < 1e-4 > ours["difference"] > 0
    images = torch.randn(3, 3, 32, 32)
    expected = gross.export(gross.load(saved), (8, 1, 32), kernels=False)(images)
    program = torch.export.load(output)
    assert ("gross" in str(program.graph)) == (options != ("--plain",))
    torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)
    loaded = gross.load_program(output)
    torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-5)


def test_export_in_8_bits(saved, tmp_path):
    """Catches options that do not reach the export, and a file in float32."""
    options = ("--precision", "int8", "--calibration", "digits:16", "--batch", 2, "--json")
    program, other = tmp_path / "network.pt2", tmp_path / "network.onnx"
    found = content(gross_command("export", saved, "--output", program, *options))
    rows = {row["network"]: row for row in found["networks"]}
    lowered = rows["gross's kernels, int8"]
    assert 0 < lowered["in_8_bits"] < lowered["macs"]
    assert rows["gross's kernels"]["in_8_bits"] == 0
    assert 1e-4 < lowered["difference"] < 0.2
    images = torch.randn(2, 3, 32, 32)
    wanted, got = gross.export(gross.load(saved), example=images), gross.load_program(program)
    with torch.inference_mode():
        wanted, got = wanted(images), got(images)
    assert 1e-4 < float((got - wanted).norm() / wanted.norm()) < 0.2
    content(gross_command("export", saved, "--output", other, *options))
    assert b"QuantizeLinear" in other.read_bytes()


def test_latency_in_8_bits(saved, tmp_path):
    """Catches a precision that does not reach the budget."""
    table = tmp_path / "table.json"
    options = ("--calibration", "digits:16", "--seconds", 0.01, "--output", table, "--json")
    found = content(gross_command("latency", saved, *options))
    assert set(found["int8_layers"]) == set(found["layers"])
    searched = content(
        gross_command(
            *("search", saved, "--milliseconds", "1000", "--latency", table, "--images", 4),
            *("--precision", "int8", "--method", "random", "--evaluations", 1, "--json"),
            *("--calibration", "digits:16"),
        )
    )
    (result,) = searched["searches"]
    sizes = result["configuration"]
    layers = zip(found["int8_layers"].values(), sizes, strict=True)
    wanted = found["int8_rest"] + sum(layer[str(size)] for layer, size in layers)
    (evaluation,) = [e for e in result["evaluations"] if e["configuration"] == sizes]
    assert evaluation["costs"]["milliseconds"] == pytest.approx(wanted)


def test_a_search_for_precisions_is_exported(saved, tmp_path):
    """Catches options that do not reach the search, and an export of other sizes or precisions."""
    net = gross.load(saved)
    names = list(gross.supernet.decomposed_layers(net))
    # The second layer is fast in float32, the others are in 8 bits.
    times = [{size: 1.0 + size / 100 for size in (1, 8, 32)} for _ in names]
    slow = [{size: 3.0 + size / 100 for size in (1, 8, 32)} for _ in names]
    table = LatencyTable(
        *("a device", 1, (1, 3, 32, 32), "float32", True, 1.0),
        *(dict(zip(names, (slow[0], times[1], slow[2]), strict=True)), 9.0, 0.5),
        dict(zip(names, (times[0], slow[1], times[2]), strict=True)),
    )
    table.save(tmp_path / "table.json")
    found, program = tmp_path / "found.json", tmp_path / "network.pt2"
    calibration = ("--calibration", "digits:16", "--json")
    result = content(
        gross_command(
            *("search", saved, "--latency", tmp_path / "table.json", "--precision", "mixed"),
            *("--milliseconds", 4.1, "--images", 20, "--runs", 2, "--output", found, *calibration),
        )
    )["searches"][0]
    assert result["int8"] == [names[0], names[2]]
    arguments = ("export", saved, "--search", found, "--output", program, "--batch", 2)
    exported = content(gross_command(*arguments, *calibration))
    assert exported["configuration"] == result["configuration"]
    rows = {row["network"]: row for row in exported["networks"]}
    lowered = rows["gross's kernels, int8"]
    assert 0 < lowered["in_8_bits"] < lowered["macs"]
    text = gross_command(*arguments, *calibration[:2])
    assert "as asked for" in text.stdout
    assert text.stdout.count("as asked for") == 1
    report = gross_command("report", found, "--output", tmp_path / "report")
    assert report.exit_code == 0, report.output
    beside = gross_command(*arguments, "--configuration", "1,1,1", *calibration)
    assert "--configuration or --precision beside it" in " ".join(beside.stderr.split())
    plain = gross_command(*arguments, "--plain", *calibration)
    assert "both precisions" in " ".join(plain.stderr.split())
    assert "--calibration" in gross_command(*arguments).stderr


def test_study_goes_all_the_way(saved, tmp_path):
    """Catches options that do not reach the study."""
    result = gross_command(
        *("study", saved, "--decomposed", saved, "--count", 5, "--partial", 1),
        *("--set", "epochs=2", "--output", tmp_path / "study"),
    )
    assert result.exit_code == 0, result.output
    assert "5 random configurations" in result.stdout
    assert "![study](study.png)" in result.stdout
    assert len(result.stderr.strip().splitlines()) >= 5
    assert (tmp_path / "study" / "study.png").exists()
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    assert found["schedule"] == [1, 2]
    report = gross_command(
        "report", "--study", tmp_path / "study" / "study.json", "--output", tmp_path / "report"
    )
    assert report.exit_code == 0, report.output


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (("search", "--base", "1,1"), "configuration: got 2 group sizes", 1),
        (("search", "--macs", "1000"), "accepted is at least", 1),
        (("search", "--macs", "few"), "accepted are numbers and shares", 2),
        (("search", "--base", "1,1,1", "--macs", "50%"), "other limits beside it", 2),
        (("search", "--milliseconds", "3"), "needed for it is latency", 1),
        (("search", "--method", "luck"), "got 'luck'", 1),
        (("search", "--metric", "psnr"), "accepted are module:function", 2),
        (("search", "--metric", "json:nothing"), "no attribute 'nothing'", 2),
        (("search", "--metric", "math:pi"), "is float and cannot be called", 2),
        (("search", "--metric", "math:sqrt", "--images", "3"), "a metric of your own beside", 2),
        (("search", "--metric", "math:sqrt", "--runs", "1"), "every evaluation failed", 1),
        (("evaluate", "--configuration", "1,2,3"), "got 2 for decomposed layer 1", 1),
        (("evaluate", "--data", "folder:nowhere"), "nowhere", 1),
        (("export", "--output", "network.pth"), "is a .pt2 or .onnx file", 2),
        (("export", "--output", "a.pt2", "--precision", "int8"), "--calibration", 2),
        (
            ("export", "--output", "a.pt2", "--precision", "int4"),
            "accepted are float32 and int8",
            2,
        ),
        (("search", "--precision", "int8"), "--calibration", 2),
        (("search", "--precision", "int4"), "accepted are float32, int8, mixed", 2),
        (("search", "--calibration", "digits:8"), "--calibration", 2),
        (
            ("search", "--precision", "mixed", "--calibration", "digits:8"),
            "none in milliseconds",
            1,
        ),
        (
            ("search", "--precision", "mixed", "--calibration", "digits:8", "--base", "1,1,1"),
            "--precision mixed beside it",
            2,
        ),
        (("export", "--output", "no/a.onnx"), "a file in a folder that exists", 2),
        (("latency", "--output", "no/a.json"), "a file in a folder that exists", 2),
        (("search", "--output", "no/a.json"), "a file in a folder that exists", 2),
        (("search", "--journal", "no/a.journal"), "a file in a folder that exists", 2),
        (("export", "--configuration", "5,5,5", "--output", "a.onnx"), "got 5", 1),
    ],
)
def test_bad_input_is_one_line_and_an_exit_status(saved, arguments, message, status, monkeypatch):
    """Catches tracebacks."""
    monkeypatch.setenv("COLUMNS", "300")
    result = gross_command(arguments[0], saved, *arguments[1:])
    assert result.exit_code == status, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_other_data_than_those_of_the_training_are_named(saved, tmp_path):
    """Catches accuracies of ten per cent that nobody explains: digits and CIFAR-10 both have ten
    classes and, here, images of one shape."""
    arguments = ("--set", "epochs=1", "--set", "schedule.after=[]", "--output", tmp_path / "run")
    tuned = gross_command("finetune", saved, "--recipe", "4-layer-gross", *arguments)
    assert tuned.exit_code == 0, tuned.output
    supernet = tmp_path / "run" / "supernet.safetensors"
    same = gross_command("evaluate", supernet, "--configuration", "1,1,1", "--images", 9)
    assert (same.exit_code, same.stderr) == (0, "")
    for label in range(10):
        for part in ("train", "test"):
            folder = tmp_path / "photographs" / part / str(label)
            folder.mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (32, 32)).save(folder / f"{i}.png")
    data = f"folder:{tmp_path / 'photographs'}"
    other = gross_command("evaluate", supernet, "--configuration", "1,1,1", "--data", data)
    assert "was fine-tuned on digits, and is evaluated on folder:" in other.stderr


def test_a_missing_file_is_named():
    """Catches a traceback for the most common mistake."""
    assert "nothing.safetensors" in gross_command("evaluate", "nothing.safetensors").stderr
    assert gross_command("report").exit_code == 1
