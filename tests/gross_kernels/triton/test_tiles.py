"""Which tile is taken, what autotuning remembers, what float32 means, and which calls Triton
serves."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from gross_kernels import dispatch
from gross_kernels.backends import triton as backend
from gross_kernels.backends.triton import launch, tiles
from gross_kernels.backends.triton.forward import run_length
from gross_kernels.geometry import Geometry
from gross_kernels.series import Series

TILES = [tiles.Tile(True, lanes, 4, 16, 16, 4, 2) for lanes in (64, 32, 16)]
SECONDS = {64: 3.0, 32: 1.0, 16: 2.0}


# Autotuning -------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tiles.Tile]:
    """Autotuning into a folder of its own; the tiles in the order in which they are timed."""
    monkeypatch.setattr(tiles, "AUTOTUNE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return []


def choose(
    timed: list[tiles.Tile], name: str = "a call", device: str = "NVIDIA H200"
) -> tiles.Tile:
    def seconds(tile: tiles.Tile) -> float:
        timed.append(tile)
        return SECONDS[tile.lanes]

    return tiles.choose(name, TILES, seconds, device)


def test_the_table_decides_alone(
    timed: list[tiles.Tile], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches autotuning that nobody asked for."""
    monkeypatch.setattr(tiles, "AUTOTUNE", False)
    assert choose(timed) is TILES[0]
    assert timed == []
    assert list(tmp_path.iterdir()) == []


def test_the_fastest_is_remembered(timed: list[tiles.Tile]) -> None:
    """Catches a slower choice, and timing at every call or in every process."""
    assert choose(timed) is TILES[1]
    assert timed == TILES
    assert choose(timed) is TILES[1]
    assert timed == TILES


def test_calls_and_devices_are_told_apart(timed: list[tiles.Tile], tmp_path: Path) -> None:
    """Catches a choice that is used for another kind of call or another GPU, or that is lost when
    one is added."""
    choose(timed)
    choose(timed, "another call")
    assert len(timed) == 6
    choose(timed, device="NVIDIA A100-SXM4/80GB")
    assert len(timed) == 9
    choose(timed)
    choose(timed, "another call")
    assert len(timed) == 9
    files = {
        path.name: json.loads(path.read_text()) for path in (tmp_path / "gross_kernels").iterdir()
    }
    assert {name: len(choices) for name, choices in files.items()} == {
        "NVIDIA-H200.json": 2,
        "NVIDIA-A100-SXM4-80GB.json": 1,
    }


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a call": "fast"}', '{"a call": [true, 128, 4, 16, 16, 4, 2]}']
)
def test_what_cannot_be_used_is_replaced(timed: list[tiles.Tile], content: str) -> None:
    """Catches a failure over a damaged file, or one from another version: a tile that the table no
    longer has."""
    path = tiles.cache_file("NVIDIA H200")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert choose(timed) is TILES[1]
    assert json.loads(path.read_text())["a call"] == list(TILES[1])


def test_none_that_runs(timed: list[tiles.Tile], tmp_path: Path) -> None:
    """Catches a tile that cannot run, kept for every later process."""
    with pytest.raises(RuntimeError, match="GROSS_KERNELS_AUTOTUNE: got no tile that runs"):
        tiles.choose("a call", TILES, lambda tile: float("inf"), "NVIDIA H200")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PassManager::run failed"),
        triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"),
        triton.runtime.errors.PTXASError("ptxas"),
        triton.compiler.CompilationError("kernel", None, "message"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_candidate_that_fails(
    error: Exception, timed: list[tiles.Tile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches one tile that this Triton cannot compile, and the call fails for it."""

    def time(kernel: Callable[[], None], **_: object) -> float:
        kernel()
        return 1.0

    def plan(tile: tiles.Tile) -> Callable[..., None]:
        def run(*_: object) -> None:
            timed.append(tile)
            if tile is not TILES[2]:
                raise error

        return run

    device = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(launch.triton.testing, "do_bench", time)
    assert launch.tuned("a call", TILES, plan, (device,)) is TILES[2]
    assert timed == TILES


# Runs of rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "programs", "expected"),
    [
        # Two runs of 28 rows fill 224 of 264 places once; one would leave the half of them idle.
        (56, 112, 28),
        # A third program of two would begin a second wave.
        (56, 264, 56),
        # So many programs that there are waves anyhow.
        (56, 5000, 56),
        (1, 3, 1),
    ],
)
def test_run_length_by_hand(rows: int, programs: int, expected: int) -> None:
    """Catches weights that are assembled oftener than it takes to fill the machine, and a last wave
    of few programs."""
    assert run_length(rows, programs, 264, 2) == expected


# Shared memory ----------------------------------------------------------------------------------


def shape(architecture: str, itemsize: int = 2, source: int = 16) -> tiles.Shape:
    return tiles.Shape(
        source, source, 8, 2, 9, 3, False, True, itemsize, "tf32" if itemsize == 4 else "ieee",
        architecture,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "stages"),
    [("sm_80", 2), ("sm_86", 2), ("sm_90", 3), ("sm_100", 3), ("sm_120", 2), ("gfx942", 2)],
)
def test_stages(architecture: str, stages: int) -> None:
    """Catches a third buffer where there is no room for it, and none where there is."""
    assert tiles.correlation(shape(architecture))[0].stages == stages
    assert tiles.weight_gradient(shape(architecture))[0].stages == stages


@pytest.mark.parametrize("source", [16, 32, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("architecture", "room"),
    [("sm_80", 163), ("sm_86", 99), ("sm_90", 227), ("sm_120", 99), ("gfx942", 64)],
)
def test_loads_of_pairs_fit(architecture: str, room: int, itemsize: int, source: int) -> None:
    """Catches a tile whose loads alone are more than a program may have of shared memory."""
    tile = tiles.pair(shape(architecture, itemsize, source), 256)
    loads = (tile.pixels * source * 9 + 16 * tile.out) * itemsize
    assert (tile.stages - 1) * loads < room * 1024
    assert tile.out <= 256
    assert tile.pixels * tile.out <= 128 * 256


# float32 ----------------------------------------------------------------------------------------


@pytest.fixture
def _settings() -> Iterator[None]:
    """Puts torch's settings back, which torch.testing, once imported, forbids to change."""
    before = torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()
    with torch.backends.__allow_nonbracketed_mutation():
        yield
        torch.backends.cudnn.conv.fp32_precision = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize(
    ("convolution", "products", "expected"),
    [
        ("tf32", "highest", "tf32"),
        ("ieee", "highest", "ieee"),
        ("ieee", "high", "tf32x3"),
        ("tf32", "high", "tf32"),
    ],
)
def test_float32_follows_torch(convolution: str, products: str, expected: str) -> None:
    """Catches TF32 where cuDNN's convolutions are strict, and strict products where they are
    not."""
    torch.backends.cudnn.conv.fp32_precision = convolution
    torch.set_float32_matmul_precision(products)
    assert launch.float32_precision() == expected


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("sm_90", ["tf32", "tf32x3"]), ("gfx942", ["tf32", "ieee"]), ("gfx90a", ["ieee", "ieee"])],
)
def test_float32_where_there_is_no_such_product(
    architecture: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a word that Triton refuses on AMD, or less than the user asked for."""
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    torch.set_float32_matmul_precision("high")
    for convolution, precision in zip(("tf32", "ieee"), expected, strict=True):
        torch.backends.cudnn.conv.fp32_precision = convolution
        assert launch.precision_of(torch.float32, 0) == precision
        assert launch.precision_of(torch.bfloat16, 0) == "ieee"


# Dispatch ---------------------------------------------------------------------------------------


def call(**changes: object) -> dispatch.Call:
    values = {"device": "cuda", "dtype": torch.bfloat16, "terms_dtype": torch.float32} | changes
    return dispatch.Call(
        **values, in_channels=64, out_channels=64, group_sizes=(1, 4), kernel_size=(3, 3),
        geometry=Geometry(padding=(1, 1)), active=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "serves"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 0), True)]
)
def test_which_gpus(
    capability: tuple[int, int], serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a GPU whose matrix unit lacks bfloat16, or a served one that is sent to the slow
    definition."""
    backend._served.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    try:
        assert dispatch.choose(call()).name == ("triton" if serves else "reference")
    finally:
        backend._served.cache_clear()


def test_which_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches float64, or tensors of the CPU, that end in a kernel that cannot serve them."""
    monkeypatch.setattr(backend, "_served", lambda index: True)
    assert backend.supports(call())
    assert not backend.supports(call(dtype=torch.float64, terms_dtype=torch.float64))
    assert not backend.supports(call(device="cpu"))
    assert dispatch.choose(call(dtype=torch.float64, terms_dtype=torch.float64)).name == "reference"


def test_choices_are_kept_but_not_against_a_forced_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a choice that is worked out at every call, or that outlives ``use_backend``."""
    input, series = torch.randn(1, 4, 5, 5), Series([torch.randn(4, 2, 3, 3)], 1)
    monkeypatch.setattr(dispatch, "_serving", {})
    assert dispatch.serving("forward", input, series, Geometry()) is dispatch.BACKENDS["cpu"]
    monkeypatch.setattr(dispatch, "choose", lambda call: SimpleNamespace(backend="chosen anew"))
    assert dispatch.serving("forward", input, series, Geometry()) is dispatch.BACKENDS["cpu"]
    assert dispatch.serving("forward", input.double(), series, Geometry()) == "chosen anew"
    with dispatch.use_backend("reference"):
        assert dispatch.serving("forward", input, series, Geometry()) == "chosen anew"
