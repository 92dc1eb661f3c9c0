"""Every public argument is checked: a function found here by its signature whose argument is not
fails, so that nobody has to remember."""

import inspect
import types
from collections.abc import Callable
from typing import Any

import gross
import numpy as np
import pytest
import torch
from gross import (
    architecture_search,
    decomposition,
    latency,
    networks,
    storage,
    structured,
    weights,
)
from gross.data import Data, Images
from gross.decomposition import vbmf
from gross.deployment import save_program
from gross.macs import MacsReport
from torch import nn

MODULES = (gross, gross.macs, decomposition, decomposition.block_term, vbmf, architecture_search)
ROOMS = (
    "gross.architecture_search",
    "gross.decomposition",
    "gross.deployment",
    "gross.evaluation",
    "gross.macs",
    "gross.networks",
    "gross.storage",
    "gross.structured",
    "gross.supernet",
)


def dense() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))


def decomposed() -> nn.Module:
    return gross.decompose(dense(), (1, 2), method="random", quiet=True)


def report() -> MacsReport:
    return gross.macs(decomposed(), (3, 8, 8))


def saved(path: Any) -> str:
    gross.save(decomposed(), path / "supernet.safetensors")
    return str(path / "supernet.safetensors")


def classifier() -> nn.Module:
    """A supernet that gives logits for images of 3×8×8."""
    return nn.Sequential(decomposed(), nn.Flatten(), nn.Linear(128, 2))


def data() -> Data:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    part = Images(images, torch.tensor([0, 1, 0, 1]))
    return Data("nothing", part, part, part, ("a", "b"), (3, 8, 8))


IMAGES = torch.zeros(2, 3, 8, 8)
LABELS = torch.tensor([0, 1])
KERNEL = torch.ones(4, 4, 3, 3)
#: The arguments without which a function cannot be called, and what the test's folder has to do
#: with them.
NEEDED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "decompose": lambda path: {"model": dense()},
    "structured.decompose": lambda path: {"model": dense(), "structures": (None, 2)},
    "structured.regularizer": lambda path: {"model": dense(), "structures": (None, 2)},
    "macs": lambda path: {"model": dense(), "input_size": (3, 8, 8)},
    "save": lambda path: {"model": decomposed(), "path": path / "x.safetensors"},
    "load": lambda path: {"path": saved(path), "model": dense()},
    "describe": lambda path: {"path": saved(path)},
    "configuration": lambda path: {"model": decomposed()},
    "set_configuration": lambda path: {"model": decomposed(), "configuration": 1},
    "decomposed_layers": lambda path: {"model": decomposed()},
    "build": lambda path: {"name": "4-layer"},
    "input_size": lambda path: {"name": "4-layer"},
    "structure": lambda path: {"name": "4-layer"},
    "block_term": lambda path: {"weight": KERNEL, "group_size": 2},
    "block_term_series": lambda path: {"weight": KERNEL, "group_sizes": (1, 2)},
    "vbmf_group_size": lambda path: {"weight": KERNEL, "group_sizes": (1, 2)},
    "energy_group_size": lambda path: {"weight": KERNEL, "group_sizes": (1, 2)},
    "vbmf_rank": lambda path: {"matrix": KERNEL[0, 0]},
    "energy_rank": lambda path: {"matrix": KERNEL[0, 0]},
    "with_configuration": lambda path: {"self": report(), "configuration": 1},
    "search": lambda path: {"supernet": classifier(), "metric": (IMAGES, LABELS)},
    "evaluate": lambda path: {
        "supernet": classifier(),
        "configurations": [(1,)],
        "data": (IMAGES, LABELS),
    },
    "costs_of": lambda path: {"supernet": classifier()},
    "study": lambda path: {
        "supernet": classifier(),
        "decomposed": classifier(),
        "data": data(),
        "recipe": "4-layer-individual",
        "directory": path / "study",
        "epochs": 1,
        "partial": 1,
    },
    "agreement": lambda path: {"found": [1.0, 2.0, 3.0], "true": [1.0, 2.0, 3.0]},
    "average_precision": lambda path: {"found": [1.0] * 6, "true": [1.0] * 6},
    "export": lambda path: {"supernet": classifier(), "example": IMAGES},
    "load_program": lambda path: {"path": path / "network.pt2"},
    "save_program": lambda path: {
        "network": dense(),
        "example": IMAGES,
        "path": path / "network.pt2",
    },
    "measure": lambda path: {"supernet": classifier(), "example": IMAGES, "seconds": 0},
    "milliseconds": lambda path: {"networks": [dense()], "example": IMAGES, "seconds": 0},
}


def public_functions() -> dict[str, Callable[..., Any]]:
    """The functions that users call, those of what other people's modules they use left out."""
    found = {"with_configuration": MacsReport.with_configuration, "describe": storage.describe}
    found["decomposed_layers"] = gross.supernet.decomposed_layers
    found["save_program"] = save_program
    found["measure"] = latency.LatencyTable.measure
    found["milliseconds"] = latency.milliseconds
    found["structured.decompose"] = structured.decompose
    found["structured.regularizer"] = structured.regularizer
    for module in (*MODULES, networks):
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            if (
                isinstance(value, types.FunctionType)
                and value.__module__.startswith(ROOMS)
                and not name.startswith("_")
                and (hasattr(module, "__all__") or value.__module__ == module.__name__)
            ):
                found[name] = value
    return found


FUNCTIONS = public_functions()
ARGUMENTS = [
    (name, argument)
    for name, function in FUNCTIONS.items()
    for argument in inspect.signature(function).parameters
    if argument not in ("self", "overrides")
]


def test_the_functions_that_users_call_are_among_them():
    """Catches a search for functions that finds none, and then proves nothing."""
    assert FUNCTIONS.keys() == NEEDED.keys()
    assert len(ARGUMENTS) > 50


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_an_argument_of_no_meaning_is_refused_by_name(name, argument, tmp_path):
    """Catches an argument that is used unchecked: the error would come from deep inside, after
    work, and not name it."""
    arguments = NEEDED[name](tmp_path)
    if argument == "example":
        arguments.pop("input_size", None)
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b.*: got .*, accepted"):
        FUNCTIONS[name](**{**arguments, argument: object()})


#: Values that have the right type, and no meaning.
OUT_OF_RANGE = [
    ("decompose", "group_sizes", (0, 2)),
    ("decompose", "group_sizes", (1, True)),
    ("decompose", "group_sizes", {}),
    ("decompose", "group_sizes", {"1": 4}),
    ("decompose", "width", -1),
    ("decompose", "width", (8, 8, 8)),
    ("decompose", "width", {"1": "8"}),
    ("decompose", "skip", [3]),
    ("decompose", "convert", {}),
    ("decompose", "convert", {nn.Linear: nn.Conv2d}),
    ("decompose", "convert", {"Conv2d": nn.Conv2d}),
    ("decompose", "sweeps", 0),
    ("decompose", "sweeps", 2.0),
    ("decompose", "tolerance", -1e-9),
    ("decompose", "tolerance", float("nan")),
    ("decompose", "ridge", 0),
    ("decompose", "ridge", float("inf")),
    ("decompose", "seed", 1.5),
    ("decompose", "workers", 0),
    ("decompose", "input_size", (3, -8, 8)),
    ("structured.decompose", "skip", "1"),
    ("structured.decompose", "skip", [3]),
    ("structured.decompose", "input_size", (3, -8, 8)),
    ("structured.regularizer", "weight", -1),
    ("structured.regularizer", "weight", True),
    ("macs", "input_size", None),
    ("macs", "input_size", "388"),
    ("macs", "configuration", (1, 2)),
    ("set_configuration", "configuration", 3),
    ("set_configuration", "configuration", True),
    ("set_configuration", "configuration", ()),
    ("set_configuration", "configuration", {"2": 1}),
    ("set_configuration", "configuration", {"1": 3}),
    ("set_configuration", "configuration", "1"),
    ("save", "provenance", {"call": print}),
    ("build", "num_classes", 0),
    ("build", "name", "5-layer"),
    ("block_term", "group_size", 3),
    ("block_term", "sweeps", 0),
    ("block_term", "weight", KERNEL.int()),
    ("block_term", "dtype", torch.float16),
    ("vbmf_group_size", "group_sizes", ()),
    ("vbmf_rank", "noise_variance", -1.0),
    ("energy_rank", "energy", 1.5),
    ("energy_rank", "matrix", KERNEL),
    ("search", "metric", 3),
    ("search", "budget", -1),
    ("search", "budget", True),
    ("search", "budget", "half"),
    ("search", "budget", gross.Budget(parameters=1)),
    ("search", "method", "luck"),
    ("search", "seed", 1.5),
    ("evaluate", "configurations", 1),
    ("evaluate", "data", IMAGES),
    ("costs_of", "latency", {}),
    ("study", "count", 4),
    ("study", "partial", 2),
    ("study", "also", 1),
    ("average_precision", "removed", -1),
    ("average_precision", "top", 0),
    ("average_precision", "found", [float("nan")] * 6),
    ("export", "kernels", 1),
    ("export", "precision", "int4"),
    ("export", "calibration", IMAGES),
    ("save_program", "precision", "int4"),
    ("save_program", "calibration", IMAGES),
    ("export", "supernet", gross),
    ("save_program", "path", "network.pth"),
    ("measure", "supernet", dense()),
    ("measure", "seconds", -1),
    ("milliseconds", "networks", [gross]),
    ("milliseconds", "seconds", float("inf")),
]


@pytest.mark.parametrize(("name", "argument", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(name, argument, value, tmp_path):
    """Catches a bare Python error, and a wrong result in place of one."""
    before = {key: each for key, each in NEEDED[name](tmp_path).items() if key != "self"}
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b.*[gG]ot .*, ") as error:
        FUNCTIONS[name](**{**before, argument: value})
    assert "accepted" in str(error.value) or "at least one is needed" in str(error.value)


def test_numbers_of_numpy_and_torch_become_pythons(tmp_path):
    """Catches numpy's integers that are refused where nn.Conv2d takes them, and those that reach a
    configuration, a report or a file, which JSON refuses to write."""
    channels = np.int64(8)
    model = nn.Sequential(
        nn.Conv2d(3, channels, np.int64(3)),
        nn.Conv2d(channels, channels, (np.int32(3), 3), np.int64(1), padding=np.int64(1)),
    )
    supernet = gross.decompose(
        model,
        np.array([1, 2]),
        width=np.int64(8),
        sweeps=np.int64(1),
        seed=np.int64(3),
        input_size=np.array([3, 8, 8]),
        quiet=True,
    )
    assert supernet(torch.zeros(1, 3, 8, 8)).shape == (1, 8, 6, 6)
    for configuration in (np.array([1]), torch.tensor([1]), [np.int64(1)], np.int64(1)):
        gross.set_configuration(supernet, configuration)
        chosen = gross.configuration(supernet)
        counted = gross.macs(supernet, (3, 8, 8)).with_configuration(configuration)
        assert chosen == counted.configuration == (1,)
        assert type(chosen[0]) is type(counted.configuration[0]) is int
    gross.save(supernet, tmp_path / "saved.safetensors", provenance={"epochs": np.arange(2)})
    described = storage.describe(tmp_path / "saved.safetensors")
    assert described.provenance["epochs"] == [0, 1]
    assert described.layers["1"]["in_channels"] == 8
    assert gross.configuration(gross.load(tmp_path / "saved.safetensors", model)) == (1,)


def test_weight_files_name_what_is_wrong(tmp_path):
    """Catches a path that is none, in the functions that the command line rests on."""
    with pytest.raises(TypeError, match="weights: got"):
        networks.build("4-layer", weights=object())
    with pytest.raises(FileNotFoundError, match=r"no file at .*absent\.pth"):
        weights.read(tmp_path / "absent.pth")
