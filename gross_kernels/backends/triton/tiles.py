"""Which tile a kernel works on: a small table by shape class, precision and architecture; optional
autotuning.

What the table is made from: the arithmetic below, predicted and **unmeasured** (no GPU was at
hand), and registers and shared memory as the compiler reports them. A 3×3 convolution, 16-bit,
channels-last, on an H200 (132 multiprocessors; copy 4.3 TB/s = 19 bytes a clock and multiprocessor;
first-level cache and shared memory 128 bytes a clock together; ``mma.sync`` about 2600 products a
clock):

* ``march``, groups of up to 16: 4 packs of 16 channels are a line of 128 bytes, one warp each. A
  step of 64 columns reads 8 KB and writes 8 KB: 855 clocks of the memory. Its 3 reads (one for each
  column of the kernel) go into shared memory and out of it: 384 clocks. Its 9 × 64 × 16 × 16 × 4
  products: 228. So the memory is the limit, with room, but the second-level cache sees 3 × 8 + 8
  KB: at 5.5 TB/s (assumed) 1340 clocks, 64 % of a copy; this is the bound to watch. Triton keeps
  the weights in shared memory and reads them for every row, an instruction a tap: 144 more clocks.
  Sums are 96 registers of up to 255, so 2 programs of 4 warps a multiprocessor, each with two rows
  of loads under way: 96 KB, where 26 KB hide 800 ns.
* groups of 32 and 64: one pack, 4 or 8 warps; weights (18 and 36 KB) in shared memory, where the
  instructions of warp groups read them. A pack of 32 is 64 bytes of a pixel. Groups of 64 are two
  parts, so the source is read twice as often. With Triton before 3.9 (:data:`WARP_GROUPS`)
  instructions of single warps, two warps (:data:`TWO_WARPS`), and four parts of groups of 64.
* float32: twice the bytes, half the products; 2 packs of 16 channels are a line. Three passes of
  TF32 hold the weights twice, which leaves 16 columns. Strict float32 has no matrix unit on NVIDIA:
  ``gather``, slow, for those who ask.
* a program assembles its weights once, 9 × 16 × 16 × 4 numbers a term, about 5000 clocks for the
  series (1, 4, 16): as much as 6 steps. The rows of the program share it, so rows are split as
  little as fills the machine once (``forward.run_length``).
* weight gradient, groups of up to 16: all 9 taps of 16×16 in a pair of warps (36 registers each), 4
  packs, 8 warps, up to 255 registers, so one program a multiprocessor, and nothing but its own
  loads for the next rows to hide the memory's latency (:func:`stages_of`). A step reads the
  gradient's row once and the input's 3 times: 32 KB through the second-level cache for 16 KB from
  memory, at 5.5 TB/s 1340 of 855 clocks, 64 % of a copy. Groups of 32 are 4 parts of 16×16, groups
  of 64 hold one row of taps at a time: 2 and 3 times the reads.

Registers and spills of every entry are checked at compile time by
tests/gross_kernels/triton/test_compilation.py."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import triton

#: Most bytes of weights that ``march`` holds: of one part where every warp has its own, and of a
#: program that shares.
MOST_WEIGHTS_OF_A_WARP = 25 * 16 * 16 * 2
MOST_WEIGHTS_OF_A_PROGRAM = 9 * 64 * 32 * 2
#: Most rows of sums that ``march`` holds.
MOST_HISTORY = 5
#: Triton's version, on which it depends what fits into the registers.
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
#: Whether ``march`` may use the instructions of warp groups (tiles of 64 lanes, four warps): Triton
#: 3.5 and 3.6 fail to compile its rotating sums with them, 3.9 does not. Fewer lanes use those of
#: single warps.
WARP_GROUPS = VERSION >= (3, 9)
#: Most lanes of ``march`` in 16 bits on Hopper and newer, where each warp has a part. Triton 3.8
#: holds so much of the weights' assembly at once that with 64 it spills 56 to 113 numbers.
MOST_LANES_ON_HOPPER = 32 if VERSION == (3, 8) else 64
#: Warps of groups of 32 and 64 on Hopper. Four warps on 32 lanes, of which each takes 16, do every
#: product twice; of 64 lanes they would become a warp group. Two spill in the loop with Triton 3.8,
#: and everywhere at stride 2 or where every element has an address of its own.
TWO_WARPS = VERSION < (3, 8)
#: Warps that a multiprocessor has registers for: of 255 each thread.
WARPS_PER_PROCESSOR = 8
#: What a program of ``march`` does before its first row, the weights' assembly, in rows.
ASSEMBLY = 6


class Tile(NamedTuple):
    """One choice.

    Attributes:
        march: whether the weights stay on the chip and rows are marched down (else each is
            assembled where needed).
        lanes: pixels (columns, for ``march``) of the result.
        parts: parts of packs side by side, one warp each if more than one.
        source, result: channels of the tile.
        warps, stages: Triton's options.
    """

    march: bool
    lanes: int
    parts: int
    source: int
    result: int
    warps: int
    stages: int


class WeightTile(NamedTuple):
    """One choice for the weight gradient.

    Attributes:
        all_rows, all_columns: whether a program holds all rows and columns of the kernel, or one.
        lanes: columns of the output.
        parts: parts of packs side by side, one warp each if more than one.
        input, output: channels of the tile.
        warps, stages: Triton's options.
    """

    all_rows: bool
    all_columns: bool
    lanes: int
    parts: int
    input: int
    output: int
    warps: int
    stages: int


class PairTile(NamedTuple):
    """One choice for grouped and last convolution in one kernel.

    Attributes:
        pixels: of a program.
        out: output channels of a program.
        source: channels of a product's depth.
        warps, stages: Triton's options.
    """

    pixels: int
    out: int
    source: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """What the table is keyed by: channels of a group on both sides, groups, terms, taps, rows of
    sums, whether strided, whether packs begin at multiples of 16 bytes, bytes of a number, how
    float32 is multiplied, architecture ("sm_90", "gfx942")."""

    source: int
    result: int
    groups: int
    terms: int
    taps: int
    history: int
    strided: bool
    aligned: bool
    itemsize: int
    precision: str
    architecture: str

    @property
    def amd(self) -> bool:
        """Whether the device is AMD's."""
        return self.architecture.startswith("gfx")

    @property
    def strict(self) -> bool:
        """Whether the products have no matrix unit: strict float32 on NVIDIA."""
        return self.itemsize == 4 and self.precision == "ieee" and not self.amd

    @property
    def generation(self) -> int:
        """90 of "sm_90"; 0 of AMD's."""
        return 0 if self.amd else int(self.architecture.removeprefix("sm_"))

    @property
    def hopper(self) -> bool:
        """Whether the device is NVIDIA's Hopper or newer."""
        return self.generation >= 90


TileT = TypeVar("TileT", bound=tuple)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(0, number - 1).bit_length()


def stages_of(shape: Shape) -> int:
    """Buffers of loads, and one: with two stages the next row's loads begin after the products, and
    nothing is under way meanwhile. A third costs registers where there are none left: on Ampere,
    with weights held twice, or addresses of single elements. AMD's and the small GPUs from 120 on
    have not the shared memory."""
    roomy = 90 <= shape.generation < 120
    return 3 if roomy and shape.aligned and shape.precision != "tf32x3" else 2


def correlation(shape: Shape) -> list[Tile]:
    """Tiles for the forward pass and the input gradient, the predicted best one first."""
    source, result = max(16, power_of_two(shape.source)), max(16, power_of_two(shape.result))
    narrow, three_pass = shape.itemsize == 2, shape.precision == "tf32x3"
    stages = stages_of(shape)
    if shape.strict:
        # No matrix unit: products by the ordinary one, whose operands fill the registers.
        return [Tile(False, lanes, 1, 16, 16, 4, 1) for lanes in (32, 64)]
    choices = []
    if source == 16:
        per_pack = max(1, 16 // max(shape.source, shape.result))
        parts = -(-shape.groups // per_pack) * -(-shape.result * per_pack // 16)
        together = min(4 if narrow else 2, power_of_two(parts + 1) // 2)
        # Weights that are held twice, or five rows of sums, leave fewer registers; so does Ampere's
        # way to load them.
        most = 16 if three_pass else 32
        if narrow and shape.history <= 3:
            most = 64 if shape.amd else MOST_LANES_ON_HOPPER if shape.hopper else 32
        if together > 1 and shape.taps * 256 * shape.itemsize <= MOST_WEIGHTS_OF_A_WARP:
            choices = [
                Tile(True, lanes, together, 16, 16, together, stages)
                for lanes in (most, max(16, most // 2))
            ]
        elif shape.taps <= 9:
            choices = [
                Tile(True, lanes, 1, 16, 16, 4, stages)
                for lanes in ((64, 128) if WARP_GROUPS or not shape.hopper else (32, 16))
            ]
        if three_pass and (shape.strided or together == 1):
            choices = []
    elif (
        source <= 64
        and shape.taps * source * 32 * shape.itemsize <= MOST_WEIGHTS_OF_A_PROGRAM
        and not three_pass
    ):
        # Without 16-byte loads every element has an address of its own: half the lanes.
        lanes = 64 if shape.aligned else 32
        if shape.hopper and not WARP_GROUPS:
            if source == 32 or narrow:
                four = Tile(True, 32, 1, source, min(result, 1024 // source), 4, stages)
                two = four._replace(lanes=source, warps=2)
                calm = narrow and shape.aligned and not shape.strided
                choices = [two, four] if TWO_WARPS and calm else [four]
        elif source == 32:
            choices = [Tile(True, lanes, 1, 32, min(result, 32), 4, n) for n in (stages, 2)]
        elif narrow and shape.amd:
            choices = [Tile(True, lanes, 1, 64, min(result, 32), 4, 2)]
        elif narrow:
            choices = [
                Tile(True, 2 * lanes, 1, 64, min(result, 32), 8, stages),
                Tile(True, lanes, 1, 64, 16, 4, stages),
            ]
    if shape.history > MOST_HISTORY:
        choices = []
    stages = 1 if three_pass else stages
    lanes = 128 if narrow and shape.aligned else 64 if shape.aligned else 32
    most = 16 if shape.terms > 7 else 32
    return choices + [
        Tile(False, n, 1, min(32, source), min(most, result), 4, stages)
        for n in (lanes, lanes // 2)
    ]


def weight_gradient(shape: Shape) -> list[WeightTile]:
    """Tiles for the weight gradient's first pass, the predicted best one first. ``shape.source`` is
    the input."""
    narrow, three_pass = shape.itemsize == 2, shape.precision == "tf32x3"
    stages = stages_of(shape)
    if shape.strict:
        return [WeightTile(False, False, lanes, 1, 16, 16, 4, 1) for lanes in (32, 64)]
    source, result = max(16, power_of_two(shape.source)), max(16, power_of_two(shape.result))
    columns = shape.taps // shape.history
    if not shape.aligned:
        source, result = min(32, source), min(32, result)
        return [
            WeightTile(False, not three_pass and columns <= 5, n, 1, source, result, 4, stages)
            for n in (16, 32)
        ]
    everything = shape.taps <= 9 and not three_pass
    if max(source, result) <= (32 if everything else 16):
        # Groups of 32 in four parts: a program that held all taps of 32×32 would spill.
        per_pack = max(1, 16 // max(shape.source, shape.result))
        parts = (
            -(-shape.groups // per_pack)
            * -(-shape.source * per_pack // 16)
            * -(-shape.result * per_pack // 16)
        )
        together = min(2 if three_pass else 4, power_of_two(parts + 1) // 2)
        if together == 1:
            return [WeightTile(False, columns <= 5, n, 1, 16, 16, 4, stages) for n in (32, 64)]
        if three_pass:
            lanes = (32, 16) if columns <= 3 else (16, 32)
            return [
                WeightTile(False, columns <= 5, n, together, 16, 16, together, stages)
                for n in lanes
            ]
        lanes = (64, 32) if narrow else (32, 16)
        return [
            WeightTile(everything, columns <= 9, n, together, 16, 16, 2 * together, stages)
            for n in lanes
        ]
    source, result = min(64, source), min(64, result)
    if narrow:
        return [WeightTile(False, columns <= 3, n, 1, source, result, 8, stages) for n in (64, 32)]
    warps = 8 if shape.hopper and source * result == 64 * 64 else 4
    return [
        WeightTile(False, columns <= 3 and not three_pass, n, 1, source, result, warps, stages)
        for n in (32, 16)
    ]


#: KB of shared memory for the loads of :func:`pair`'s kernel that are under way, by generation
#: from which on: AMD, A100 and smaller Amperes, Hopper, Blackwell (which keeps operands there
#: besides) and its small ones.
MOST_LOADS = {0: 48, 80: 144, 86: 80, 90: 208, 100: 96, 120: 64}


def pair(shape: Shape, out_channels: int) -> PairTile:
    """The tile of the kernel of grouped and last convolution.

    Its sums, pixels by output channels, are the half of the registers of 8 warps; more of either
    would read weights or pixels less often. All taps of a part are loaded at once."""
    source = max(16, power_of_two(shape.source))
    out = max(16, power_of_two(out_channels))
    if shape.strict:
        return PairTile(32, min(32, out), 16, 4, 1)
    if shape.precision == "tf32x3":
        return PairTile(64, min(64, out), 16, 4, 1)
    generation = shape.generation
    # Blackwell's sums are in a memory of their own and pass through the registers.
    out = min(out, 256 if shape.itemsize == 2 and generation < 100 else 128)
    limit = 1024 * MOST_LOADS[max(since for since in MOST_LOADS if generation >= since)]
    # Nor do dozens of its products at once fit.
    choices = (
        [] if generation >= 100 and source > 16 else [(128, stages_of(shape)), (128, 2), (64, 2)]
    )
    for pixels, stages in choices:
        loads = (pixels * source * shape.taps + 16 * out) * shape.itemsize
        if (stages - 1) * loads <= limit:
            return PairTile(pixels, out, min(32, source), 8 if pixels * out > 8192 else 4, stages)
    return PairTile(64, min(64, out), 16, 4, 1)


# Autotuning -------------------------------------------------------------------------------------

#: Set to 1 to time every candidate at the first call of a kind, and to keep the fastest on disk.
AUTOTUNE = os.environ.get("GROSS_KERNELS_AUTOTUNE") == "1"


def choose(
    name: str, candidates: Sequence[TileT], seconds: Callable[[TileT], float], device: str
) -> TileT:
    """The table's first tile or, with ``GROSS_KERNELS_AUTOTUNE=1``, the fastest by ``seconds``,
    which is remembered.

    Args:
        name: the kind of calls.
        candidates: from the table.
        seconds: times one tile; infinite where it cannot run.
        device: name of the GPU; each has a file of its own.

    Raises:
        RuntimeError: if none can.
    """
    if not AUTOTUNE or len(candidates) == 1:
        return candidates[0]
    path = cache_file(device)
    found = remembered(path).get(name)
    for tile in candidates:
        if list(tile) == found:
            return tile
    times = [seconds(tile) for tile in candidates]
    best = candidates[times.index(min(times))]
    if math.isinf(min(times)):
        raise RuntimeError(
            f"GROSS_KERNELS_AUTOTUNE: got no tile that runs on {device} of {len(candidates)} for "
            f"{name}; unset, the first is taken, and says what it lacks"
        )
    write(path, remembered(path) | {name: list(best)})
    return best


def cache_file(device: str) -> Path:
    """Where choices are kept: ``$XDG_CACHE_HOME/gross_kernels/<device>.json``."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gross_kernels"
    return folder / f"{re.sub('[^A-Za-z0-9.]+', '-', device)}.json"


def remembered(path: Path) -> dict[str, list]:
    """Choices by kind of calls; none where the file is missing or is not what :func:`write`
    writes."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(path: Path, choices: dict[str, list]) -> None:
    """Whole or not at all: another process may read, or write, at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
        json.dump(choices, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
