"""``gross search``, ``evaluate``, ``latency``, ``export``, ``report`` and ``study``."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from .. import data as data_sets
from .. import networks, storage
from ..architecture_search import (
    BreadthFirst,
    Budget,
    Evolution,
    Exhaustive,
    RandomSearch,
    SearchResult,
    costs_of,
    search,
    study,
)
from ..architecture_search import report as evidence
from ..architecture_search.choices import PRECISIONS
from ..architecture_search.cost import Amount
from ..architecture_search.evaluations import Metric
from ..architecture_search.individual import CONFIGURATIONS, PARTIAL, Point, Study
from ..architecture_search.progress import shown
from ..architecture_search.result import load, save
from ..architecture_search.searching import METHODS, STARTS, Method
from ..deployment import Int8, export, save_program
from ..deployment.comparing import comparison
from ..evaluation import Accuracy, evaluate
from ..latency import LatencyTable
from ..macs import macs
from ..report import error_console
from ..supernet import configuration as active_configuration
from ..supernet import decomposed_layers, dense_network
from ..training import Recipe
from ..training.distributed import launched, shard
from ..training.memory import keep_freed_memory
from ..training.recipes import parse
from .app import (
    CALLABLE,
    CalibrationImages,
    InputSize,
    Ints,
    Json,
    Root,
    app,
    check_output,
    device_named,
    failures,
    named,
    show,
    target,
)

Supernet = Annotated[
    Path,
    typer.Argument(
        metavar="SUPERNET",
        help="A supernet that gross saved.",
        exists=True,
        dir_okay=False,
        show_default=False,
    ),
]
Network = Annotated[
    str | None,
    typer.Option(
        help=f"The network before its decomposition, where gross does not know it: {CALLABLE}.",
        show_default=False,
    ),
]
DataSet = Annotated[
    str, typer.Option("--data", help="digits, cifar10 (in ./data), or folder:PATH.")
]
Images = Annotated[
    int | None,
    typer.Option(
        min=1, help="Evaluate on the first so many validation images.", show_default=False
    ),
]
Configuration = Annotated[
    Ints | None,
    typer.Option(
        parser=Ints.parse,
        metavar="S,S,...",
        help="One group size per decomposed layer. By default the saved one.",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Images in one call.")]
Kernels = Annotated[
    bool,
    typer.Option(
        "--kernels/--plain", help="Time gross's kernels, or three plain convolutions a layer."
    ),
]
Calibration = Annotated[
    CalibrationImages | None,
    typer.Option(
        parser=CalibrationImages.parse,
        metavar="DATA[:COUNT]",
        help="For 8 bits: COUNT training images (256) of digits, cifar10 or folder:PATH to find "
        "ranges from.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")]
Graphs = Annotated[
    bool, typer.Option("--graphs", help="On a GPU, replay CUDA graphs: one launch a batch.")
]


@app.command("search")
def search_command(
    supernet: Supernet,
    base: Annotated[
        list[Ints] | None,
        typer.Option(
            parser=Ints.parse,
            metavar="S,S,...",
            help="A base configuration that the found one must not exceed in MACs; repeatable: "
            "each search starts from the best of the next smaller one.",
            show_default=False,
        ),
    ] = None,
    max_macs: Annotated[
        str | None,
        typer.Option("--macs", help="The most MACs: a number, or a share such as 50%."),
    ] = None,
    max_parameters: Annotated[
        str | None, typer.Option("--parameters", help="The most parameters, likewise.")
    ] = None,
    max_milliseconds: Annotated[
        str | None,
        typer.Option("--milliseconds", help="The longest latency, likewise; needs --latency."),
    ] = None,
    latency: Annotated[
        Path | None, typer.Option(help="A table that gross latency wrote.", show_default=False)
    ] = None,
    least_score: Annotated[
        float | None,
        typer.Option(
            help="A score that is enough: the cheapest configuration that has it is wanted.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="float32; int8; or mixed, chosen for each layer, by a --latency table that has "
            "both."
        ),
    ] = "float32",
    calibration: Calibration = None,
    root: Root = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "breadth-first",
    runs: Annotated[int, typer.Option(min=1, help="Breadth-first: from so many starts.")] = 20,
    evaluations: Annotated[int, typer.Option(min=1, help="random, evolution: so many.")] = 500,
    storage_url: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="Evolution: a database shared by several workers, such as sqlite:///search.db.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Exhaustive: the largest space to search.")
    ] = 4096,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What to maximise: module:function, a function of the supernet, set to a "
            "configuration, that returns a number. By default the accuracy on --data.",
            metavar="MODULE:FUNCTION",
            show_default=False,
        ),
    ] = None,
    data: DataSet = "digits",
    images: Images = None,
    input_size: InputSize = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A JSON file for the results.", show_default=False),
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="A file for every evaluation; a search that was killed goes on from it. By "
            "default the output's name with .journal.",
            show_default=False,
        ),
    ] = None,
    network: Network = None,
    seed: Seed = 0,
    device: Device = "cpu",
    graphs: Graphs = False,
    as_json: Json = False,
) -> None:
    """Find the best configuration of SUPERNET within a budget, by its accuracy on validation images
    or by a metric of your own.

    Example: gross search supernet.safetensors --base 8,8,8 --base 16,16,16 --data cifar10

    Example: gross search supernet.safetensors --macs 50% --metric my_metrics:psnr

    Example: gross search supernet.safetensors --milliseconds 0.5 --latency latency.json
    --precision mixed --calibration digits:256 --output found.json

    Under torchrun the processes share the work: torchrun --nproc-per-node=2 -m gross search ...
    """
    with failures(), launched(device_named(device)) as place:
        check_output("--output", output)
        check_output("--journal", journal)
        net = _load(supernet, network, place)
        wanted, size = _metric(metric, supernet, data, images, graphs)
        size = input_size or size or _known_size(supernet)
        table = None if latency is None else LatencyTable.load(latency)
        if precision not in PRECISIONS:
            raise typer.BadParameter(
                f"got {precision!r}, accepted are {', '.join(PRECISIONS)}",
                param_hint="--precision",
            )
        _check_calibration(calibration, precision != "float32")
        if base and precision != "float32":
            raise typer.BadParameter(f"got --precision {precision} beside it", param_hint="--base")
        amounts = {
            "macs": _amount("--macs", max_macs),
            "parameters": _amount("--parameters", max_parameters),
            "milliseconds": _amount("--milliseconds", max_milliseconds),
        }
        if base and any(amount is not None for amount in amounts.values()):
            raise typer.BadParameter("got other limits beside it", param_hint="--base")
        costs = costs_of(net, size, table, precision)
        if base and "macs" not in costs:
            raise typer.BadParameter(
                "needed to count MACs, it is not known for this network", param_hint="--input-size"
            )
        bases = sorted(map(tuple, base or ()), key=lambda c: costs["macs"].checked(c))
        budgets = [Budget(macs=c) for c in bases] or [
            Budget(**amounts, latency=table, least_score=least_score)
        ]
        seen = None if calibration is None else calibration.inputs(root, size, seed)
        book = journal or (None if output is None else output.with_suffix(".journal"))
        results: list[SearchResult] = []
        for budget in budgets:
            settings: dict[str, Method] = {
                "exhaustive": Exhaustive(limit),
                "breadth-first": BreadthFirst(
                    runs, starts=results[-1].top(STARTS) if results else ()
                ),
                "random": RandomSearch(evaluations),
                "evolution": Evolution(
                    costs["milliseconds"] if table else costs.get("macs", costs["parameters"]),
                    evaluations,
                    storage=storage_url,
                ),
            }
            result = search(
                net,
                wanted,
                budget,
                settings.get(method, method),
                input_size=size,
                seed=seed,
                journal=book,
                precision=precision,
                calibration=seen,
                quiet=as_json,
            )
            results.append(result)
        if shard().index == 0:
            if output is not None:
                save(results, output)
            show(
                as_json,
                {"searches": [asdict(result) for result in results]},
                Group(*results),
            )


@app.command("evaluate")
def evaluate_command(
    supernet: Supernet,
    configuration: Annotated[
        list[Ints] | None,
        typer.Option(
            parser=Ints.parse,
            metavar="S,S,...",
            help="One group size per decomposed layer; repeatable. By default every uniform one.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every configuration there is.")] = False,
    data: DataSet = "digits",
    images: Images = None,
    network: Network = None,
    device: Device = "cpu",
    graphs: Graphs = False,
    as_json: Json = False,
) -> None:
    """Accuracy of configurations of SUPERNET on the validation images, with their MACs.

    Example: gross evaluate supernet.safetensors --configuration 1,8,16 --configuration 4,4,4
    """
    with failures():
        net, split = _load(supernet, network, device_named(device)), _data(data, supernet)
        sizes = [layer.group_sizes for layer in decomposed_layers(net).values()]
        uniform = [
            c for s in sizes[0] if all(s in own for own in sizes) for c in [(s,) * len(sizes)]
        ]
        chosen: list[tuple[int, ...]] = [tuple(c) for c in configuration or ()] or uniform
        wanted = list(product(*sizes)) if every else chosen
        metric = Accuracy(split.validation, images=images, graphs=graphs)
        with shown("evaluate", as_json) as bar:
            count = len(wanted)
            accuracies = evaluate(
                net,
                wanted,
                metric,
                progress=lambda done, total: bar(count * done // total, count, math.nan),
            )
        counts = macs(net, split.input_size)
        table = Table("configuration", "MACs", "accuracy", box=SIMPLE_HEAD)
        rows = []
        for c, accuracy in zip(wanted, accuracies, strict=True):
            total = counts.with_configuration(c).total
            rows.append({"configuration": c, "macs": total, "accuracy": accuracy})
            table.add_row(" ".join(map(str, c)), f"{total:,}", f"{accuracy:.2f} %")
        show(as_json, {"evaluations": rows}, table)


@app.command("latency")
def latency_command(
    supernet: Supernet,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A JSON file for the table.", show_default=False),
    ] = None,
    batch: Batch = 1,
    kernels: Kernels = True,
    seconds: Annotated[float, typer.Option(help="How long to measure.")] = 10.0,
    calibration: Calibration = None,
    input_size: InputSize = None,
    root: Root = None,
    network: Network = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time each layer of SUPERNET at each group size on this machine, and check the predictions
    against whole networks.

    Example: gross latency supernet.safetensors --batch 16 --output latency.json
    """
    with failures():
        check_output("--output", output)
        place = device_named(device)
        net = _load(supernet, network, place)
        example = _example(supernet, input_size, batch).to(place)
        images = None
        if calibration is not None:
            images = calibration.inputs(root, tuple(example.shape[1:]), 0)
        table = LatencyTable.measure(
            net, example, kernels=kernels, seconds=seconds, calibration=images
        )
        check = table.check(net, example, seconds=seconds)
        if output is not None:
            table.save(output)
        content = {**asdict(table), "check": {**asdict(check), "median_error": check.median_error}}
        show(as_json, content, Group(table, str(check)))


@app.command("export")
def export_command(
    supernet: Supernet,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The file to write: .pt2 with gross's kernels, for gross.load_program, or .onnx "
            "with plain convolutions.",
            show_default=False,
        ),
    ],
    configuration: Configuration = None,
    batch: Batch = 16,
    input_size: InputSize = None,
    network: Network = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Plain convolutions in a .pt2 file too.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Time how each layer can run, instead of predicting it.")
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            help="float32; or int8, which needs --calibration: with gross's kernels in a .pt2 "
            "file, by ONNX Runtime's quantiser in an .onnx file."
        ),
    ] = "float32",
    calibration: Calibration = None,
    search_file: Annotated[
        Path | None,
        typer.Option(
            "--search",
            help="A file that gross search wrote: its configuration, in its precisions.",
            show_default=False,
        ),
    ] = None,
    most_error: Annotated[
        float,
        typer.Option(
            help="For int8 with gross's kernels: the largest error of the output, relative, root "
            "mean square; layers that would cause more stay in float32."
        ),
    ] = Int8.most_error,
    root: Root = None,
    seed: Seed = 0,
    device: Annotated[
        str, typer.Option(help="Where it is measured: cpu, cuda, cuda:1. The file fits any.")
    ] = "cpu",
    as_json: Json = False,
) -> None:
    """Write one configuration of SUPERNET as the network that is deployed, and measure it.

    The file holds plain weights and takes any batch size. The table compares the dense network,
    the decomposed one in plain convolutions, and the exported one.

    Example: gross export supernet.safetensors --configuration 1,8,16 --output network.pt2

    Example: gross export supernet.safetensors --precision int8 --calibration cifar10:256
    --output network.onnx

    Example: gross export supernet.safetensors --search found.json --calibration cifar10:256
    --output network.pt2
    """
    with failures():
        check_output("--output", output)
        if precision not in ("float32", "int8"):
            raise typer.BadParameter(
                f"got {precision!r}, accepted are float32 and int8", param_hint="--precision"
            )
        settings = Int8(most_error=most_error) if precision == "int8" else None
        if search_file is not None:
            if configuration is not None or settings is not None:
                raise typer.BadParameter(
                    "got --configuration or --precision beside it", param_hint="--search"
                )
            configuration, settings = _found(search_file)
        if search_file is None or settings is not None:
            # A search may have found that nothing is better in 8 bits.
            _check_calibration(calibration, settings is not None)
        if output.suffix not in (".pt2", ".onnx"):
            raise typer.BadParameter(
                f"got {output}, accepted is a .pt2 or .onnx file", param_hint="--output"
            )
        place, cpu = device_named(device), torch.device("cpu")
        if settings is not None and place != cpu:
            raise typer.BadParameter(
                f"got {device!r}, accepted for int8 is cpu", param_hint="--device"
            )
        net = _load(supernet, network, cpu).eval()
        chosen = configuration or active_configuration(net)
        example = _example(supernet, input_size, batch)
        folded = export(net, chosen, example=example, kernels=False)
        fast = export(net, chosen, example=example, tune=tune)
        is_plain = plain or output.suffix == ".onnx"
        if is_plain and settings is not None and settings.float32:
            raise typer.BadParameter(
                "got layers in both precisions, accepted for a file without gross's kernels is one",
                param_hint="--search",
            )
        report = fast.report
        lowered = {}
        if settings is None or calibration is None:
            save_program(folded if is_plain else fast, example, output)
        else:
            images = calibration.inputs(root, tuple(example.shape[1:]), seed)
            if is_plain:
                save_program(folded, example, output, precision="int8", calibration=images)
            else:
                ours = export(
                    net,
                    chosen,
                    example=example,
                    tune=tune,
                    precision=settings,
                    calibration=images,
                )
                save_program(ours, example, output)
                lowered, report = {"gross's kernels, int8": ours}, ours.report
        if place != cpu:
            fast = export(net, chosen, example=example, tune=tune, device=place)
        candidates = {
            "dense": dense_network(net, chosen).to(place),
            "plain convolutions": folded.to(place),
            "gross's kernels": fast,
            **lowered,
        }
        rows = comparison(candidates, example.to(place))
        table = Table(*rows[0], box=SIMPLE_HEAD, title=f"{output}, batch {batch}")
        for row in rows:
            table.add_row(
                row["network"],
                f"{row['macs']:,}",
                f"{row['in_8_bits']:,}",
                f"{row['parameters']:,}",
                f"{row['milliseconds']:.3f}",
                f"{row['difference']:.1e}",
            )
        content = {"output": str(output), "configuration": chosen, "networks": rows}
        show(as_json, content, Group(str(report), table))


@app.command("report")
def report_command(
    searches: Annotated[
        list[Path] | None,
        typer.Argument(metavar="SEARCH", help="Files that gross search wrote."),
    ] = None,
    study_file: Annotated[
        Path | None,
        typer.Option("--study", help="A file that gross study wrote.", show_default=False),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write into.")
    ] = Path("report"),
    as_json: Json = False,
) -> None:
    """Tables and figures from searches and a study: Markdown, PNG and JSON.

    Example: gross report search.json --study study/study.json --output report
    """
    with failures():
        results = [r for path in searches or () for r in load(path)]
        loaded = None if study_file is None else Study.load(study_file)
        files = evidence.write(output, results, loaded)
        show(as_json, {"files": list(map(str, files))}, "\n".join(map(str, files)))


@app.command("study")
def study_command(
    supernet: Supernet,
    decomposed: Annotated[
        Path,
        typer.Option(help="The supernet before its fine-tuning.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder; a stopped study goes on from it.")
    ] = Path("study"),
    data: DataSet = "digits",
    recipe: Annotated[
        str, typer.Option(help="Of the individual fine-tuning: a name or a TOML file.")
    ] = "4-layer-individual",
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another value for the recipe."),
    ] = None,
    count: Annotated[int, typer.Option(min=5, help="Random configurations.")] = CONFIGURATIONS,
    partial: Annotated[int, typer.Option(min=1, help="Epochs of the partial schedule.")] = PARTIAL,
    searches: Annotated[
        list[Path] | None,
        typer.Option("--search", help="Also fine-tune what these searches compare."),
    ] = None,
    network: Network = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Fine-tune random configurations individually, and see whether SUPERNET ranks them as their
    true accuracies do (Table 5, Figure 5).

    Example: gross study tuned.safetensors --decomposed decomposed.safetensors --data cifar10
    """
    with failures():
        split = _data(data, supernet)
        results = [r for path in searches or () for r in load(path)]
        also = [row.configuration for row in evidence.rows(results)]

        def tell(done: int, total: int, point: Point) -> None:
            c = " ".join(map(str, point.configuration))
            error_console().print(
                f"{done} of {total}: {c}, {point.gross:.2f} % in the supernet, {point.true:.2f} % "
                f"on its own after {point.seconds:.0f} s",
                highlight=False,
            )

        place = device_named(device)
        found = study(
            _load(supernet, network, place),
            _load(decomposed, network, place),
            split,
            Recipe.load(recipe).override(dict(map(parse, override or ()))),
            output,
            count=count,
            partial=partial,
            also=also,
            seed=seed,
            progress=tell,
        )
        found.save(output / "study.json")
        evidence.write(output, results, found)
        show(as_json, asdict(found), (output / "report.md").read_text(encoding="utf-8"))


def _load(path: Path, network: str | None, device: torch.device) -> nn.Module:
    # Here, as every command comes by that then runs networks again and again.
    keep_freed_memory()
    return target(str(path), network)[0].to(device)


def _data(name: str, supernet: Path) -> data_sets.Data:
    """A data set; a line on the error stream if the supernet was trained on another one."""
    trained = storage.describe(supernet).provenance.get("data")
    if isinstance(trained, str) and _base_name(trained) != _base_name(name):
        error_console().print(
            f"note: {supernet} was fine-tuned on {trained}, and is evaluated on {name}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return data_sets.load(name)


def _check_calibration(calibration: CalibrationImages | None, needed: bool) -> None:
    if needed != (calibration is not None):
        raise typer.BadParameter(
            "needed for layers in 8 bits, and for nothing else", param_hint="--calibration"
        )


def _found(path: Path) -> tuple[Ints, Int8 | None]:
    """The configuration that a search has found, and what 8 bits it has."""
    results = load(path)
    if len(results) != 1:
        raise typer.BadParameter(
            f"got {path} with {len(results)} searches, accepted is one of a single search",
            param_hint="--search",
        )
    precision = results[0].precision
    return Ints(results[0].configuration), precision if isinstance(precision, Int8) else None


def _base_name(data: str) -> str:
    """The same for a folder wherever it lies."""
    return Path(data.removeprefix("folder:")).name


def _metric(
    name: str | None, supernet: Path, data: str, images: int | None, graphs: bool
) -> tuple[Metric, tuple[int, ...] | None]:
    """What a search maximises, and the size of the images that it is measured on, if known."""
    if name is None:
        split = _data(data, supernet)
        return Accuracy(split.validation, images=images, graphs=graphs), split.input_size
    if images is not None:
        raise typer.BadParameter("got a metric of your own beside it", param_hint="--images")
    return named(name, "--metric", "module:function, a function of the supernet"), None


def _amount(option: str, text: str | None) -> Amount | None:
    if text is None or text.endswith("%"):
        return text
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"got {text!r}, accepted are numbers and shares such as 50%", param_hint=option
        ) from error


def _known_size(path: Path) -> tuple[int, ...] | None:
    """Shape of one input of a saved supernet, if it is of a network of ours."""
    known = storage.describe(path).network
    return None if known is None else networks.input_size(known[0])


def _example(path: Path, input_size: Ints | None, batch: int) -> Tensor:
    """A batch of random images for a saved supernet."""
    size = input_size or _known_size(path)
    if size is None:
        raise typer.BadParameter(
            "needed, it is not known for this network", param_hint="--input-size"
        )
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last)
